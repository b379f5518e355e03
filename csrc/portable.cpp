// Plain C++: runs everywhere, and is what the other instruction sets are read against.
#include <bit>

#include "body.h"

namespace bellbit {
namespace {

float float_from_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
  if (exponent == 0) {  // zero and subnormals: mantissa · 2⁻²⁴
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

struct Portable {
  struct F { float lane[kLanes]; };
  struct I { int32_t lane[kLanes]; };
  struct X { int8_t lane[64]; };
  using W = const uint8_t*;
  using B = uint64_t;
  struct Digits { int8_t low[16], high[16]; };

  static bool bit(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }
  template <class Make>
  static F each(Make&& make) {
    F out;
    for (int i = 0; i < kLanes; i++) out.lane[i] = make(i);
    return out;
  }

  static F zero() { return {}; }
  static F set1(float value) { return each([&](int) { return value; }); }
  static F load(const float* p) { return each([&](int i) { return p[i]; }); }
  static void store(float* p, F a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static F add(F a, F b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; }); }
  static float reduce(F a) {
    for (int width = kLanes / 2; width; width /= 2)
      for (int i = 0; i < width; i++) a.lane[i] += a.lane[i + width];
    return a.lane[0];
  }
  // a + b and a − b in place of a and b, H lanes apart.
  template <int H>
  static F butterfly(const F& x) {
    return each([&](int i) { return i & H ? x.lane[i ^ H] - x.lane[i] : x.lane[i] + x.lane[i ^ H]; });
  }
  // A NaN is larger than all others.
  static float most(float a, float b) { return a > b || std::isnan(a) ? a : b; }
  static F max_abs(F a, F b) { return each([&](int i) { return most(a.lane[i], std::fabs(b.lane[i])); }); }
  static float reduce_max(const F& a) {
    float size = 0;
    for (float lane : a.lane) size = most(size, lane);
    return size;
  }
  static W signs(const uint8_t* bits) { return bits; }
  template <int Half>
  static F flip(W signs, F x) {
    return each([&](int i) { return bit(signs, i + Half * kLanes) ? x.lane[i] : -x.lane[i]; });
  }

  static I izero() { return {}; }
  static X load8(const int8_t* p) {
    X x;
    std::memcpy(x.lane, p, sizeof x.lane);
    return x;
  }
  static I iload(const int32_t* p) {
    I a;
    std::memcpy(a.lane, p, sizeof a.lane);
    return a;
  }
  static I sub(I a, const I& b) {
    for (int i = 0; i < kLanes; i++) a.lane[i] -= b.lane[i];
    return a;
  }
  static B bits8(const uint8_t* bits) {
    B word = 0;
    for (int i = 0; i < 8; i++) word |= static_cast<B>(bits[i]) << (8 * i);
    return word;
  }
  static X keep(B bits, X x) {
    for (int i = 0; i < 64; i++) x.lane[i] = bits >> i & 1 ? x.lane[i] : int8_t{0};
    return x;
  }
  static I add_twice(I acc, const X& x) {
    for (int i = 0; i < 64; i++) acc.lane[i % kLanes] += 2 * x.lane[i];
    return acc;
  }
  static I add_shifted(I sum, const I& acc, int shift) {
    for (int i = 0; i < kLanes; i++) sum.lane[i] += acc.lane[i] * (1 << shift);
    return sum;
  }
  static F to_float(const I& a) { return each([&](int i) { return static_cast<float>(a.lane[i]); }); }

  static F set1_half(const uint8_t* p) { return set1(float_from_half(static_cast<uint16_t>(p[0] | p[1] << 8))); }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = float_from_half(element(p, i));
  }
  static void eight_halves(const uint16_t* p, float* out) { halves(p, out, 8); }
  static F from_half(const uint16_t* p) { return each([&](int i) { return float_from_half(element(p, i)); }); }
  static F from_bfloat(const uint16_t* p) {
    return each([&](int i) { return std::bit_cast<float>(static_cast<uint32_t>(element(p, i)) << 16); });
  }

  // As docs/format.md orders the scales and the entries 4·salient + code.
  static F table(const float* a, const float* b) {
    return each([&](int i) {
      const float* s = i < 8 ? a : b;
      const float one = i & 1 ? 1 : -1, two = i & 2 ? 1 : -1;
      if (i & 4) return s[4] + one * s[5] + two * s[6];
      return i & 2 ? s[2] + one * s[3] : s[0] + one * s[1];
    });
  }
  // Of seven scales and the seven behind them; reads 16.
  static F pair_table(const uint16_t* p) {
    float scales[16];
    store(scales, from_half(p));
    return table(scales, scales + 7);
  }
  template <int J>
  static F pick(const F& table, const X& codes, const int32_t* index) {
    return each([&](int i) {
      uint32_t word = 0;
      for (int k = 0; k < 4; k++) word |= static_cast<uint32_t>(static_cast<uint8_t>(codes.lane[4 * i + k])) << (8 * k);
      return table.lane[(word >> (2 * J) & 3) | static_cast<uint32_t>(index[i])];
    });
  }
  static F pick16(const F& table, uint32_t codes, const int32_t* index) {
    return each([&](int i) { return table.lane[(codes >> (2 * i) & 3) | static_cast<uint32_t>(index[i])]; });
  }
  static constexpr int kLowBits = 7, kBias = 0, kLargest = 127 * 128 - 1;
  static I dot_low(I acc, const X& low, const X& x) {
    for (int i = 0; i < 64; i++) acc.lane[i % kLanes] += low.lane[i] * x.lane[i];
    return acc;
  }
  static I dot_high(const I& acc, const X& high, const X& x) { return dot_low(acc, high, x); }
  static Digits digits(const F& table, const F& scale) {
    Digits out;
    for (int i = 0; i < 16; i++) {
      const int whole = static_cast<int>(std::nearbyint(table.lane[i] * scale.lane[i]));
      out.low[i] = static_cast<int8_t>(whole & ((1 << kLowBits) - 1));
      out.high[i] = static_cast<int8_t>(whole >> kLowBits);
    }
    return out;
  }
  template <int K>
  static X digit_index(X codes, const int8_t* index) {
    for (int i = 0; i < 64; i++)
      codes.lane[i] = static_cast<int8_t>((static_cast<uint8_t>(codes.lane[i]) >> (2 * K) & 3) | index[i]);
    return codes;
  }
  static X digit(const int8_t* digits, X index) {
    for (int8_t& lane : index.lane) lane = digits[lane];
    return index;
  }
};

}  // namespace

const Kernels portable = Body<Portable>::kernels("portable");

}  // namespace bellbit
