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
  struct T { float entry[8]; };
  using W = const uint8_t*;
  using B = uint64_t;
  using C = const uint8_t*;

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
  template <int Factor>
  static I add_bytes(I acc, const X& x) {
    for (int i = 0; i < 64; i++) acc.lane[i % kLanes] += Factor * x.lane[i];
    return acc;
  }
  static I add_shifted(I sum, const I& acc, int shift) {
    for (int i = 0; i < kLanes; i++) sum.lane[i] += acc.lane[i] * (1 << shift);
    return sum;
  }
  static F to_float(const I& a) { return each([&](int i) { return static_cast<float>(a.lane[i]); }); }

  static F set1_half(const uint8_t* p) { return set1(float_from_half(static_cast<uint16_t>(p[0] | p[1] << 8))); }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    for (int64_t i = 0; i < count; i++) out[i] = float_from_half(p[i]);
  }
  static F from_half(const uint16_t* p) { return each([&](int i) { return float_from_half(p[i]); }); }
  static F from_bfloat(const uint16_t* p) {
    return each([&](int i) { return std::bit_cast<float>(static_cast<uint32_t>(p[i]) << 16); });
  }

  static T table(const float* s) {
    return {{s[0] - s[1], s[0] + s[1], s[2] - s[3], s[2] + s[3], s[4] - s[5] - s[6], s[4] + s[5] - s[6],
             s[4] - s[5] + s[6], s[4] + s[5] + s[6]}};
  }
  static C columns(const uint8_t* salient) { return salient; }
  static void lookup(const T& t, C salient, const uint8_t* second, const uint8_t* signs, F (&out)[2]) {
    for (int i = 0; i < 2 * kLanes; i++)
      out[i / kLanes].lane[i % kLanes] = t.entry[4 * bit(salient, i) + 2 * bit(second, i) + bit(signs, i)];
  }
};

}  // namespace

const Kernels portable = Body<Portable>::kernels("portable");

}  // namespace bellbit
