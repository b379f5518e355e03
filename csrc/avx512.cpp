// AVX-512 (F, BW, VL, DQ); compiled a second time with BELLBIT_VNNI for machines that add bytes in one instruction.
#include <immintrin.h>

#include "body.h"

namespace bellbit {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using X = __m512i;
  using W = __m512i;  // the 32 bits in every lane
  using B = __mmask64;
  using T = __m512;  // the eight entries twice
  struct C { __m512i low, high; };

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce(F a) { return _mm512_reduce_add_ps(a); }

  static __m512i word(const uint8_t* bits) {
    int32_t word;
    std::memcpy(&word, bits, 4);
    return _mm512_set1_epi32(word);
  }
  static __m512i lanes(int first) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  }
  static W signs(const uint8_t* bits) { return word(bits); }
  template <int Half>
  static F flip(W signs, F x) {
    // The lane's bit goes to the sign bit, then x ⊕ (¬bit ∧ sign bit): 1.3 times faster than a masked addition.
    const __m512i turned = _mm512_sllv_epi32(signs, _mm512_sub_epi32(_mm512_set1_epi32(31), lanes(16 * Half)));
    const __m512i sign_bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(x), turned, sign_bit, 0xD2));
  }

  static I izero() { return _mm512_setzero_si512(); }
  static X load8(const int8_t* p) { return _mm512_loadu_si512(p); }
  static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static B bits8(const uint8_t* bits) {
    uint64_t word;
    std::memcpy(&word, bits, 8);
    return _cvtu64_mask64(word);
  }
  static X keep(B bits, X x) { return _mm512_maskz_mov_epi8(bits, x); }
  template <int Factor>
  static I add_bytes(I acc, X x) {
    const __m512i factor = _mm512_set1_epi8(Factor);
#ifdef BELLBIT_VNNI
    return _mm512_dpbusd_epi32(acc, factor, x);
#else
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(factor, x), _mm512_set1_epi16(1)));
#endif
  }
  static I add_shifted(I sum, I acc, int shift) {
    return _mm512_add_epi32(sum, _mm512_slli_epi32(acc, static_cast<unsigned>(shift)));
  }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }

  static float half(uint16_t h) { return _cvtsh_ss(h); }
  static F set1_half(const uint8_t* p) {
    int16_t h;
    std::memcpy(&h, p, 2);
    return _mm512_cvtph_ps(_mm256_set1_epi16(h));
  }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + i, from_half(p + i));
    for (; i < count; i++) out[i] = half(p[i]);
  }
  static F from_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  // (base ± first) ± second, as docs/format.md orders the scales and the codes 4·salient + 2·second + sign
  static T table(const float* scales) {
    const __m512 s = _mm512_castps256_ps512(_mm256_loadu_ps(scales));
    const __m512i bases = _mm512_setr_epi32(0, 0, 2, 2, 4, 4, 4, 4, 0, 0, 2, 2, 4, 4, 4, 4);
    const __m512i firsts = _mm512_setr_epi32(1, 1, 3, 3, 5, 5, 5, 5, 1, 1, 3, 3, 5, 5, 5, 5);
    const __m512 base = _mm512_permutexvar_ps(bases, s), first = _mm512_permutexvar_ps(firsts, s);
    const __m512 second = _mm512_permutexvar_ps(_mm512_set1_epi32(6), s);
    const __m512 one = _mm512_mask_sub_ps(_mm512_add_ps(base, first), 0x5555, base, first);
    const __m512 two = _mm512_mask_sub_ps(one, 0x3030, one, second);
    return _mm512_mask_add_ps(two, 0xC0C0, two, second);
  }
  // Rotated so that the lane's salient bit is bit 2. A permutation reads the lowest four bits and the table is there
  // twice, so that all other bits may be anything.
  static C columns(const uint8_t* salient) {
    const __m512i bits = word(salient);
    return {_mm512_rorv_epi32(bits, lanes(30)), _mm512_rorv_epi32(bits, lanes(46))};
  }
  static F lookup16(T t, __m512i column, __m512i second, __m512i sign, int first) {
    constexpr int kSelect = 0xCA;  // bits of the second operand where the first has ones, else of the third
    const __m512i zero = _mm512_srlv_epi32(sign, lanes(first)), one = _mm512_rorv_epi32(second, lanes(first + 31));
    const __m512i both = _mm512_ternarylogic_epi32(_mm512_set1_epi32(1), zero, one, kSelect);
    return _mm512_permutexvar_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(3), both, column, kSelect), t);
  }
  static void lookup(T t, const C& columns, const uint8_t* second, const uint8_t* signs, F (&out)[2]) {
    const __m512i one = word(signs), two = word(second);
    out[0] = lookup16(t, columns.low, two, one, 0);
    out[1] = lookup16(t, columns.high, two, one, 16);
  }
};

}  // namespace

#ifdef BELLBIT_VNNI
const Kernels avx512vnni = Body<Avx512>::kernels("avx512vnni");
#else
const Kernels avx512 = Body<Avx512>::kernels("avx512");
#endif

}  // namespace bellbit
