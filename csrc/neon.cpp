// 64-bit Arm; compiled a second time with BELLBIT_DOT for machines with the dot product instructions.
#include <arm_neon.h>

#include "body.h"

namespace bellbit {
namespace {

struct Neon {
  struct F { float32x4_t part[4]; };
  struct I { int32x4_t part[4]; };
  struct X { int8x16_t part[4]; };
  using W = const uint8_t*;
  struct B { uint8x16_t part[4]; };  // all ones in the bytes whose bit is set
  struct Digits { int8x16_t low, high; };

  template <class Make>
  static F each(Make&& make) {
    return {{make(0), make(1), make(2), make(3)}};
  }
  static F zero() { return set1(0); }
  static F set1(float value) { return each([&](int) { return vdupq_n_f32(value); }); }
  static F load(const float* p) { return each([&](int i) { return vld1q_f32(p + 4 * i); }); }
  static void store(float* p, F a) {
    for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.part[i]);
  }
  static F add(F a, F b) { return each([&](int i) { return vaddq_f32(a.part[i], b.part[i]); }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return vfmaq_f32(c.part[i], a.part[i], b.part[i]); }); }
  static float reduce(F a) {
    return vaddvq_f32(vaddq_f32(vaddq_f32(a.part[0], a.part[1]), vaddq_f32(a.part[2], a.part[3])));
  }
  // a + b and a − b in place of a and b, H lanes apart.
  template <int H>
  static F butterfly(const F& x) {
    return each([&](int i) {
      if constexpr (H >= 4) {
        const int other = i ^ (H / 4);
        return i < other ? vaddq_f32(x.part[i], x.part[other]) : vsubq_f32(x.part[other], x.part[i]);
      } else {
        const float32x4_t a = x.part[i], b = H == 1 ? vrev64q_f32(a) : vextq_f32(a, a, 2);
        static constexpr uint32_t kSecond[2][4] = {{0, ~0u, 0, ~0u}, {0, 0, ~0u, ~0u}};
        return vbslq_f32(vld1q_u32(kSecond[H - 1]), vsubq_f32(b, a), vaddq_f32(a, b));
      }
    });
  }
  static F max_abs(F a, F b) { return each([&](int i) { return vmaxq_f32(a.part[i], vabsq_f32(b.part[i])); }); }
  static float reduce_max(F a) {
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.part[0], a.part[1]), vmaxq_f32(a.part[2], a.part[3])));
  }

  // All ones in the lanes whose bit is set: columns 4·part … 4·part + 3.
  static uint32x4_t mask(const uint8_t* bits, int part) {
    static constexpr uint32_t kLow[4] = {1, 2, 4, 8}, kHigh[4] = {16, 32, 64, 128};
    return vtstq_u32(vdupq_n_u32(bits[part / 2]), vld1q_u32(part % 2 ? kHigh : kLow));
  }
  static W signs(const uint8_t* bits) { return bits; }
  template <int Half>
  static F flip(W signs, F x) {
    return each([&](int i) {
      const uint32x4_t sign = vbicq_u32(vdupq_n_u32(0x80000000), mask(signs, 4 * Half + i));
      return vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_f32(x.part[i]), sign));
    });
  }

  static I izero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static X load8(const int8_t* p) { return {{vld1q_s8(p), vld1q_s8(p + 16), vld1q_s8(p + 32), vld1q_s8(p + 48)}}; }
  static I iload(const int32_t* p) {
    return {{vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}};
  }
  static I sub(I a, I b) {
    for (int i = 0; i < 4; i++) a.part[i] = vsubq_s32(a.part[i], b.part[i]);
    return a;
  }
  static B bits8(const uint8_t* bits) {
    static constexpr uint8_t kLane[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    B out;
    for (int i = 0; i < 4; i++) {
      const uint8x16_t bytes = vcombine_u8(vdup_n_u8(bits[2 * i]), vdup_n_u8(bits[2 * i + 1]));
      out.part[i] = vtstq_u8(bytes, vld1q_u8(kLane));
    }
    return out;
  }
  static X keep(B bits, X x) {
    for (int i = 0; i < 4; i++) x.part[i] = vandq_s8(vreinterpretq_s8_u8(bits.part[i]), x.part[i]);
    return x;
  }
  static I add_twice(I acc, X x) {
    for (int i = 0; i < 4; i++) {
#ifdef BELLBIT_DOT
      acc.part[i] = vdotq_s32(acc.part[i], x.part[i], vdupq_n_s8(2));
#else
      acc.part[i] = vpadalq_s16(acc.part[i], vmulq_n_s16(vpaddlq_s8(x.part[i]), 2));
#endif
    }
    return acc;
  }
  static I add_shifted(I sum, I acc, int shift) {
    for (int i = 0; i < 4; i++)
      sum.part[i] = vaddq_s32(sum.part[i], vshlq_s32(acc.part[i], vdupq_n_s32(shift)));
    return sum;
  }
  static F to_float(I a) { return each([&](int i) { return vcvtq_f32_s32(a.part[i]); }); }

  static float32x4_t four_halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
  static float32x4_t half(uint16_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))); }
  static F set1_half(const uint8_t* p) {
    const float32x4_t all = half(static_cast<uint16_t>(p[0] | p[1] << 8));
    return {{all, all, all, all}};
  }
  static void halves(const uint16_t* p, float* out, int64_t count) {
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) vst1q_f32(out + i, four_halves(p + i));
    for (; i < count; i++) out[i] = vgetq_lane_f32(half(element(p, i)), 0);
  }
  static void eight_halves(const uint16_t* p, float* out) {
    vst1q_f32(out, four_halves(p));
    vst1q_f32(out + 4, four_halves(p + 4));
  }
  static F from_half(const uint16_t* p) { return each([&](int i) { return four_halves(p + 4 * i); }); }
  static F from_bfloat(const uint16_t* p) {
    return each([&](int i) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); });
  }

  // As docs/format.md orders the scales and the entries 4·salient + code.
  static void table8(const float* s, float32x4_t* out) {
    const float entries[8] = {s[0] - s[1],        s[0] + s[1],        s[2] - s[3],        s[2] + s[3],
                              s[4] - s[5] - s[6], s[4] + s[5] - s[6], s[4] - s[5] + s[6], s[4] + s[5] + s[6]};
    out[0] = vld1q_f32(entries);
    out[1] = vld1q_f32(entries + 4);
  }
  static F table(const float* a, const float* b) {
    F out;
    table8(a, out.part);
    table8(b, out.part + 2);
    return out;
  }
  // Of seven scales and the seven behind them; reads 16.
  static F pair_table(const uint16_t* p) {
    float scales[16];
    store(scales, from_half(p));
    return table(scales, scales + 7);
  }
  // part: of the 16 lanes; its codes are the lowest two bits.
  static float32x4_t pick_part(const F& table, int part, uint32x4_t codes, const int32_t* index) {
    const uint32x4_t bits = vreinterpretq_u32_s32(vld1q_s32(index + 4 * part));
    const uint32x4_t at = vorrq_u32(vandq_u32(codes, vdupq_n_u32(3)), vandq_u32(bits, vdupq_n_u32(4)));
    // four byte positions per entry: 4·at + 0 … 3
    const uint32x4_t bytes = vaddq_u32(vmulq_n_u32(at, 0x04040404), vdupq_n_u32(0x03020100));
    const int half = part / 2 * 2;
    const uint8x16x2_t entries = {
        {vreinterpretq_u8_f32(table.part[half]), vreinterpretq_u8_f32(table.part[half + 1])}};
    return vreinterpretq_f32_u8(vqtbl2q_u8(entries, vreinterpretq_u8_u32(bytes)));
  }
  template <int J>
  static F pick(const F& table, const X& codes, const int32_t* index) {
    return each([&](int i) {
      const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_s8(codes.part[i]), vdupq_n_s32(-2 * J));
      return pick_part(table, i, shifted, index);
    });
  }
  static F pick16(const F& table, uint32_t codes, const int32_t* index) {
    static constexpr int32_t kShifts[4] = {0, -2, -4, -6};
    return each([&](int i) {
      return pick_part(table, i, vshlq_u32(vdupq_n_u32(codes >> (8 * i)), vld1q_s32(kShifts)), index);
    });
  }
  static constexpr int kLowBits = 7, kBias = 0, kLargest = 127 * 128 - 1;
  static I dot_low(I acc, const X& low, const X& x) {
    for (int i = 0; i < 4; i++) {
#ifdef BELLBIT_DOT
      acc.part[i] = vdotq_s32(acc.part[i], low.part[i], x.part[i]);
#else
      const int16x8_t some = vmull_s8(vget_low_s8(low.part[i]), vget_low_s8(x.part[i]));
      const int16x8_t others = vmull_s8(vget_high_s8(low.part[i]), vget_high_s8(x.part[i]));
      acc.part[i] = vpadalq_s16(vpadalq_s16(acc.part[i], some), others);
#endif
    }
    return acc;
  }
  static I dot_high(I acc, const X& high, const X& x) { return dot_low(acc, high, x); }
  static Digits digits(const F& table, const F& scale) {
    int16x4_t whole[4];
    for (int i = 0; i < 4; i++) whole[i] = vmovn_s32(vcvtnq_s32_f32(vmulq_f32(table.part[i], scale.part[i])));
    const int16x8_t a = vcombine_s16(whole[0], whole[1]), b = vcombine_s16(whole[2], whole[3]);
    const int16x8_t lowest = vdupq_n_s16((1 << kLowBits) - 1);
    return {vcombine_s8(vmovn_s16(vandq_s16(a, lowest)), vmovn_s16(vandq_s16(b, lowest))),
            vcombine_s8(vshrn_n_s16(a, kLowBits), vshrn_n_s16(b, kLowBits))};
  }
  template <int K>
  static X digit_index(const X& codes, const int8_t* index) {
    X out;
    for (int i = 0; i < 4; i++) {
      const uint8x16_t shifted = vshlq_u8(vreinterpretq_u8_s8(codes.part[i]), vdupq_n_s8(-2 * K));
      out.part[i] = vorrq_s8(vreinterpretq_s8_u8(vandq_u8(shifted, vdupq_n_u8(3))), vld1q_s8(index + 16 * i));
    }
    return out;
  }
  static X digit(int8x16_t digits, X index) {
    for (int i = 0; i < 4; i++) index.part[i] = vqtbl1q_s8(digits, vreinterpretq_u8_s8(index.part[i]));
    return index;
  }
};

}  // namespace

#ifdef BELLBIT_DOT
const Kernels neondot = Body<Neon>::kernels("neondot");
#else
const Kernels neon = Body<Neon>::kernels("neon");
#endif

}  // namespace bellbit
