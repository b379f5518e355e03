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
  struct Digits { __m512i low, high; };  // 16 entries, in each quarter

  static F zero() { return _mm512_setzero_ps(); }
  static F set1(float value) { return _mm512_set1_ps(value); }
  static F load(const float* p) { F a = _mm512_loadu_ps(p); asm("" : "+v"(a)); return a; }
  static void store(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static float reduce(F a) { return _mm512_reduce_add_ps(a); }
  // a + b and a − b in place of a and b, H lanes apart.
  template <int H>
  static F butterfly(F x) {
    __m512 other;
    if constexpr (H == 1) other = _mm512_permute_ps(x, 0xB1);
    else if constexpr (H == 2) other = _mm512_permute_ps(x, 0x4E);
    else if constexpr (H == 4) other = _mm512_shuffle_f32x4(x, x, 0xB1);
    else other = _mm512_shuffle_f32x4(x, x, 0x4E);
    constexpr __mmask16 kSecond = H == 1 ? 0xAAAA : H == 2 ? 0xCCCC : H == 4 ? 0xF0F0 : 0xFF00;
    return _mm512_mask_sub_ps(_mm512_add_ps(x, other), kSecond, other, x);
  }
  // By their bits: those of a NaN are larger than all others.
  static F max_abs(F a, F b) {
    return _mm512_castsi512_ps(_mm512_max_epi32(_mm512_castps_si512(a), _mm512_castps_si512(_mm512_abs_ps(b))));
  }
  static float reduce_max(F a) {
    const int32_t bits = _mm512_reduce_max_epi32(_mm512_castps_si512(a));
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

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
  static X load8(const int8_t* p) { X a = _mm512_loadu_si512(p); asm("" : "+v"(a)); return a; }
  static I iload(const int32_t* p) { return _mm512_loadu_si512(p); }
  static I sub(I a, I b) { return _mm512_sub_epi32(a, b); }
  static B bits8(const uint8_t* bits) {
    uint64_t word;
    std::memcpy(&word, bits, 8);
    return _cvtu64_mask64(word);
  }
  static X keep(B bits, X x) { return _mm512_maskz_mov_epi8(bits, x); }
  static I add_twice(I acc, X x) {
    const __m512i factor = _mm512_set1_epi8(2);
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
    for (; i < count; i++) out[i] = half(element(p, i));
  }
  static void eight_halves(const uint16_t* p, float* out) {
    _mm256_storeu_ps(out, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F from_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static F from_bfloat(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }

  // Of scales a and b: (base ± first) ± second, as docs/format.md orders the scales and the entries 4·salient + code.
  static F table(const float* a, const float* b) {
    return table_at<8>(_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(a)), _mm256_loadu_ps(b), 1));
  }
  // Of seven scales and the seven behind them; reads 16.
  static F pair_table(const uint16_t* halves) { return table_at<7>(from_half(halves)); }
  template <int Next>
  static F table_at(__m512 s) {
    constexpr int N = Next;
    const __m512i bases =
        _mm512_setr_epi32(0, 0, 2, 2, 4, 4, 4, 4, N, N, N + 2, N + 2, N + 4, N + 4, N + 4, N + 4);
    const __m512i firsts =
        _mm512_setr_epi32(1, 1, 3, 3, 5, 5, 5, 5, N + 1, N + 1, N + 3, N + 3, N + 5, N + 5, N + 5, N + 5);
    const __m512i seconds =
        _mm512_setr_epi32(6, 6, 6, 6, 6, 6, 6, 6, N + 6, N + 6, N + 6, N + 6, N + 6, N + 6, N + 6, N + 6);
    const __m512 base = _mm512_permutexvar_ps(bases, s), first = _mm512_permutexvar_ps(firsts, s);
    const __m512 second = _mm512_permutexvar_ps(seconds, s);
    const __m512 ones = _mm512_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1);
    const __m512 twos = _mm512_setr_ps(0, 0, 0, 0, -1, -1, 1, 1, 0, 0, 0, 0, -1, -1, 1, 1);
    return _mm512_fmadd_ps(second, twos, _mm512_fmadd_ps(first, ones, base));
  }
  // The two lowest bits of a, the others of b.
  static __m512i join(__m512i a, const void* b, __m512i lowest) {
    return _mm512_ternarylogic_epi32(a, lowest, _mm512_loadu_si512(b), 0xE2);
  }
  template <int J>
  static F pick(F table, X codes, const int32_t* index) {
    const __m512i at = join(_mm512_srli_epi32(codes, 2 * J), index, _mm512_set1_epi32(3));
    return _mm512_permutexvar_ps(at, table);
  }
  static F pick16(F table, uint32_t codes, const int32_t* index) {
    const __m512i all = _mm512_set1_epi32(static_cast<int32_t>(codes));
    const __m512i shifted = _mm512_srlv_epi32(all, _mm512_slli_epi32(lanes(0), 1));
    return _mm512_permutexvar_ps(join(shifted, index, _mm512_set1_epi32(3)), table);
  }
#ifdef BELLBIT_VNNI
  static constexpr int kLowBits = 8, kBias = 128, kLargest = 32767;
  static I dot_low(I acc, X low, X x) { return _mm512_dpbusd_epi32(acc, low, x); }
  static I dot_high(I acc, X high, X x) { return _mm512_dpbusd_epi32(acc, high, x); }
#else
  // Pairs of products are added in 16 bits: factors of ±127 at most.
  static constexpr int kLowBits = 7, kBias = 0, kLargest = 127 * 128 - 1;
  static I dot_low(I acc, X low, X x) {
    return _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_maddubs_epi16(low, x), _mm512_set1_epi16(1)));
  }
  static I dot_high(I acc, X high, X x) {
    const __m512i turned = _mm512_mask_sub_epi8(high, _mm512_movepi8_mask(x), izero(), high);
    return dot_low(acc, _mm512_abs_epi8(x), turned);
  }
#endif
  static Digits digits(F table, F scale) {
    __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(table, scale));
    whole = _mm512_add_epi32(whole, _mm512_set1_epi32(kBias << kLowBits));
    const __m512i low = _mm512_and_si512(whole, _mm512_set1_epi32((1 << kLowBits) - 1));
    const __m512i high = _mm512_srai_epi32(whole, kLowBits);
    return {_mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(low)), _mm512_broadcast_i32x4(_mm512_cvtepi32_epi8(high))};
  }
  template <int K>
  static X digit_index(X codes, const int8_t* index) {
    return join(_mm512_srli_epi32(codes, 2 * K), index, _mm512_set1_epi8(3));
  }
  static X digit(__m512i digits, X index) { return _mm512_shuffle_epi8(digits, index); }
};

}  // namespace

#ifdef BELLBIT_VNNI
const Kernels avx512vnni = Body<Avx512>::kernels("avx512vnni");
#else
const Kernels avx512 = Body<Avx512>::kernels("avx512");
#endif

}  // namespace bellbit
