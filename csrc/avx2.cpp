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
  struct Digits { __m256i low, high; };  // 16 entries, in each half

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
  // a + b and a − b in place of a and b, H lanes apart.
  template <int H>
  static __m256 butterfly8(__m256 x) {
    const __m256 other = H == 1   ? _mm256_permute_ps(x, 0xB1)
                         : H == 2 ? _mm256_permute_ps(x, 0x4E)
                                  : _mm256_permute2f128_ps(x, x, 1);
    constexpr int kSecond = H == 1 ? 0xAA : H == 2 ? 0xCC : 0xF0;
    return _mm256_blend_ps(_mm256_add_ps(x, other), _mm256_sub_ps(other, x), kSecond);
  }
  template <int H>
  static F butterfly(F x) {
    if constexpr (H == 8) return {_mm256_add_ps(x.low, x.high), _mm256_sub_ps(x.low, x.high)};
    else return {butterfly8<H>(x.low), butterfly8<H>(x.high)};
  }
  // By their bits: those of a NaN are larger than all others.
  static __m256 max_bits(__m256 a, __m256 b) {
    return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_castps_si256(a), _mm256_castps_si256(b)));
  }
  static __m256 size8(__m256 a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), a); }
  static F max_abs(F a, F b) { return {max_bits(a.low, size8(b.low)), max_bits(a.high, size8(b.high))}; }
  static float reduce_max(F a) {
    __m256 most = max_bits(a.low, a.high);
    most = max_bits(most, _mm256_permute2f128_ps(most, most, 1));
    most = max_bits(most, _mm256_permute_ps(most, 0x4E));
    return _mm256_cvtss_f32(max_bits(most, _mm256_permute_ps(most, 0xB1)));
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
  static __m256i add32_twice(__m256i acc, __m256i x) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(2), x);
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static I add_twice(I acc, X x) { return {add32_twice(acc.low, x.low), add32_twice(acc.high, x.high)}; }
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
  static __m256 eight(const uint16_t* halves) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)));
  }
  static void eight_halves(const uint16_t* p, float* out) { _mm256_storeu_ps(out, eight(p)); }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, eight(p + i));
    for (; i < count; i++) out[i] = half(element(p, i));
  }
  static F from_half(const uint16_t* p) { return {eight(p), eight(p + 8)}; }
  static __m256 eight_bfloats(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static F from_bfloat(const uint16_t* p) { return {eight_bfloats(p), eight_bfloats(p + 8)}; }

  // (base ± first) ± second, as docs/format.md orders the scales and the entries 4·salient + code
  static __m256 table8(__m256 s) {
    const __m256 base = _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(0, 0, 2, 2, 4, 4, 4, 4));
    const __m256 first = _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(1, 1, 3, 3, 5, 5, 5, 5));
    const __m256 second = _mm256_permutevar8x32_ps(s, _mm256_set1_epi32(6));
    const __m256 ones = _mm256_setr_ps(-1, 1, -1, 1, -1, 1, -1, 1), twos = _mm256_setr_ps(0, 0, 0, 0, -1, -1, 1, 1);
    return _mm256_fmadd_ps(second, twos, _mm256_fmadd_ps(first, ones, base));
  }
  static F table(const float* a, const float* b) { return {table8(_mm256_loadu_ps(a)), table8(_mm256_loadu_ps(b))}; }
  // Of seven scales and the seven behind them; reads 16.
  static F pair_table(const uint16_t* halves) { return {table8(eight(halves)), table8(eight(halves + 7))}; }
  // The two lowest bits of a, the others of b, which has none there.
  static __m256i join(__m256i a, const void* b, __m256i lowest) {
    return _mm256_or_si256(_mm256_and_si256(a, lowest), _mm256_loadu_si256(static_cast<const __m256i*>(b)));
  }
  // A permutation reads three bits; the fourth is which half of a table.
  static F pick_words(F table, __m256i low, __m256i high, const int32_t* index) {
    const __m256i lowest = _mm256_set1_epi32(3);
    return {_mm256_permutevar8x32_ps(table.low, join(low, index, lowest)),
            _mm256_permutevar8x32_ps(table.high, join(high, index + 8, lowest))};
  }
  template <int J>
  static F pick(F table, X codes, const int32_t* index) {
    return pick_words(table, _mm256_srli_epi32(codes.low, 2 * J), _mm256_srli_epi32(codes.high, 2 * J), index);
  }
  static F pick16(F table, uint32_t codes, const int32_t* index) {
    const __m256i all = _mm256_set1_epi32(static_cast<int32_t>(codes));
    const __m256i low = _mm256_srlv_epi32(all, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
    return pick_words(table, low, _mm256_srli_epi32(low, 16), index);
  }
  // Pairs of products are added in 16 bits: factors of ±127 at most.
  static constexpr int kLowBits = 7, kBias = 0, kLargest = 127 * 128 - 1;
  static __m256i dot32(__m256i acc, __m256i unsigned_bytes, __m256i bytes) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(unsigned_bytes, bytes), _mm256_set1_epi16(1)));
  }
  static I dot_low(I acc, X low, X x) { return {dot32(acc.low, low.low, x.low), dot32(acc.high, low.high, x.high)}; }
  static I dot_high(I acc, X high, X x) {
    return {dot32(acc.low, _mm256_abs_epi8(x.low), _mm256_sign_epi8(high.low, x.low)),
            dot32(acc.high, _mm256_abs_epi8(x.high), _mm256_sign_epi8(high.high, x.high))};
  }
  // The lowest byte of each of 16 numbers, in both halves.
  static __m256i low_bytes(__m256i a, __m256i b) {
    const __m256i lowest = _mm256_set1_epi32(255);
    const __m256i words = _mm256_packus_epi32(_mm256_and_si256(a, lowest), _mm256_and_si256(b, lowest));
    // a0-3 b0-3 a4-7 b4-7, by fours
    const __m256i bytes = _mm256_packus_epi16(words, words);
    return _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5));
  }
  static Digits digits(F table, F scale) {
    const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(table.low, scale.low));
    const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(table.high, scale.high));
    const __m256i lowest = _mm256_set1_epi32((1 << kLowBits) - 1);
    return {low_bytes(_mm256_and_si256(a, lowest), _mm256_and_si256(b, lowest)),
            low_bytes(_mm256_srai_epi32(a, kLowBits), _mm256_srai_epi32(b, kLowBits))};
  }
  template <int K>
  static X digit_index(X codes, const int8_t* index) {
    const __m256i lowest = _mm256_set1_epi8(3);
    return {join(_mm256_srli_epi32(codes.low, 2 * K), index, lowest),
            join(_mm256_srli_epi32(codes.high, 2 * K), index + 32, lowest)};
  }
  static X digit(__m256i digits, X index) {
    return {_mm256_shuffle_epi8(digits, index.low), _mm256_shuffle_epi8(digits, index.high)};
  }
};

}  // namespace

const Kernels avx2 = Body<Avx2>::kernels("avx2");

}  // namespace bellbit
