// AVX2, FMA and F16C: two registers make one F.
#include <immintrin.h>

#include "body.h"

namespace bellbit {
namespace {

struct Avx2 {
  struct F { __m256 low, high; };
  struct I { __m256i low, high; };
  struct X { __m256i low, high; };
  using W = __m256i;  // the 32 bits in every lane
  using B = X;        // all ones in the bytes whose bit is set
  using T = __m256;
  struct C { __m256i part[4]; };

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set1(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
  }
  static F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static F fma(F a, F b, F c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static float reduce(F a) {
    const __m256 both = _mm256_add_ps(a.low, a.high);
    __m128 sum = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps(both, 1));
    sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
    return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
  }

  static __m256i word(const uint8_t* bits) {
    int32_t word;
    std::memcpy(&word, bits, 4);
    return _mm256_set1_epi32(word);
  }
  // Bit 31 of each lane is the bit of column first + lane; those below it are of columns before.
  static __m256i lane_bits(__m256i word, int first) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_sllv_epi32(word, _mm256_sub_epi32(_mm256_set1_epi32(31 - first), lane));
  }
  static W signs(const uint8_t* bits) { return word(bits); }
  static __m256 flip8(W signs, int first, __m256 x) {
    const __m256 turned = _mm256_castsi256_ps(lane_bits(signs, first));
    return _mm256_xor_ps(x, _mm256_andnot_ps(turned, _mm256_set1_ps(-0.f)));
  }
  template <int Half>
  static F flip(W signs, F x) {
    return {flip8(signs, 16 * Half, x.low), flip8(signs, 16 * Half + 8, x.high)};
  }

  static I izero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static X load8(const int8_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
  }
  static I iload(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
  }
  static I sub(I a, I b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
  static __m256i mask32(const uint8_t* bits) {
    const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
    const __m256i lane = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
    const __m256i bytes = _mm256_shuffle_epi8(word(bits), spread);
    return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, lane), lane);
  }
  static B bits8(const uint8_t* bits) { return {mask32(bits), mask32(bits + 4)}; }
  static X keep(B bits, X x) { return {_mm256_and_si256(bits.low, x.low), _mm256_and_si256(bits.high, x.high)}; }
  template <int Factor>
  static __m256i add32(__m256i acc, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(Factor)));
  }
  template <int Factor>
  static I add_bytes(I acc, X x) {
    return {add32<Factor>(acc.low, x.low), add32<Factor>(acc.high, x.high)};
  }
  static I add_shifted(I sum, I acc, int shift) {
    return {_mm256_add_epi32(sum.low, _mm256_slli_epi32(acc.low, shift)),
            _mm256_add_epi32(sum.high, _mm256_slli_epi32(acc.high, shift))};
  }
  static F to_float(I a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }

  static float half(uint16_t h) { return _cvtsh_ss(h); }
  static F set1_half(const uint8_t* p) {
    int16_t h;
    std::memcpy(&h, p, 2);
    const __m256 all = _mm256_cvtph_ps(_mm_set1_epi16(h));
    return {all, all};
  }
  static __m256 eight_halves(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, eight_halves(p + i));
    for (; i < count; i++) out[i] = half(p[i]);
  }
  static F from_half(const uint16_t* p) { return {eight_halves(p), eight_halves(p + 8)}; }
  static __m256 eight_bfloats(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F from_bfloat(const uint16_t* p) { return {eight_bfloats(p), eight_bfloats(p + 8)}; }

  // (base ± first) ± second, as docs/format.md orders the scales and the codes 4·salient + 2·second + sign
  static T table(const float* scales) {
    const __m256 s = _mm256_loadu_ps(scales);
    const __m256 base = _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 4, 4));
    const __m256 first = _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(1, 1, 3, 3, 5, 5, 5, 5));
    const __m256 second = _mm256_permutevar8x32_ps(s, _mm256_set1_epi32(6));
    const __m256 one = _mm256_add_ps(base, _mm256_xor_ps(first, _mm256_setr_ps(-0.f, 0, -0.f, 0, -0.f, 0, -0.f, 0)));
    const __m256 two = _mm256_add_ps(one, _mm256_xor_ps(second, _mm256_setr_ps(0, 0, 0, 0, -0.f, -0.f, 0, 0)));
    return _mm256_blend_ps(one, two, 0xF0);
  }
  // A permutation reads the lowest three bits of an index: salient, second, sign.
  static C columns(const uint8_t* salient) {
    C out;
    for (int i = 0; i < 4; i++)
      out.part[i] = _mm256_slli_epi32(_mm256_srli_epi32(lane_bits(word(salient), 8 * i), 31), 2);
    return out;
  }
  static __m256 lookup8(T t, __m256i column, __m256i second, __m256i sign, int first) {
    const __m256i two = _mm256_and_si256(_mm256_srli_epi32(lane_bits(second, first), 30), _mm256_set1_epi32(2));
    const __m256i one = _mm256_srli_epi32(lane_bits(sign, first), 31);
    return _mm256_permutevar8x32_ps(t, _mm256_or_si256(_mm256_or_si256(column, two), one));
  }
  static void lookup(T t, const C& columns, const uint8_t* second, const uint8_t* signs, F (&out)[2]) {
    const __m256i two = word(second), one = word(signs);
    out[0] = {lookup8(t, columns.part[0], two, one, 0), lookup8(t, columns.part[1], two, one, 8)};
    out[1] = {lookup8(t, columns.part[2], two, one, 16), lookup8(t, columns.part[3], two, one, 24)};
  }
};

}  // namespace

const Kernels avx2 = Body<Avx2>::kernels("avx2");

}  // namespace bellbit
