// Weights in training: scale · ℓ(latent) and the derivatives of both, one pass over memory each. Plain loops that
// become vector instructions of whatever set they are compiled for; core/grid.py says the same in torch.
#pragma once

#include "common.h"

namespace bellbit {
namespace {

// To the nearest, ties to even, as torch does it.
uint16_t bfloat_from(float value) {
  const uint32_t bits = bits_of(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

template <bool Bfloat>
struct Number;
template <>
struct Number<true> {
  using Type = uint16_t;
  static float get(uint16_t x) { return float_of(static_cast<uint32_t>(x) << 16); }
  static uint16_t put(float x) { return bfloat_from(x); }
};
template <>
struct Number<false> {
  using Type = float;
  static float get(float x) { return x; }
  static float put(float x) { return x; }
};

template <bool Bfloat>
struct Straight {
  using N = Number<Bfloat>;
  using T = typename N::Type;

  static void weights(const Latents& w, void* out, int64_t first, int64_t last) {
    const float top = static_cast<float>(1 << (w.width - 1));
    for (int64_t row = first; row < last; row++)
      for (int64_t start = 0, group = 0; start < w.columns; start += w.group, group++) {
        const int64_t count = smaller(w.group, w.columns - start);
        const float* latent = w.latents + row * w.columns + start;
        T* target = static_cast<T*>(out) + row * w.columns + start;
        const float scale = w.scales[row * w.groups() + group];
        if (w.width == 1) {
          const uint32_t size = bits_of(N::get(N::put(scale / 2)));
          for (int64_t c = 0; c < count; c++) target[c] = N::put(float_of(size | (bits_of(latent[c]) & 0x80000000u)));
        } else {
          const float step = N::get(N::put(scale));
          for (int64_t c = 0; c < count; c++) {
            const float low = std::floor(latent[c]), inside = low < -top ? -top : low > top - 1 ? top - 1 : low;
            target[c] = N::put(step * (inside + 0.5f));
          }
        }
      }
  }

  static void derivatives(const Latents& w, const void* weight, const void* gradient, float* latents, float* scales,
                          int64_t first, int64_t last) {
    for (int64_t row = first; row < last; row++)
      for (int64_t start = 0, group = 0; start < w.columns; start += w.group, group++) {
        const int64_t count = smaller(w.group, w.columns - start), at = row * w.columns + start;
        const T *values = static_cast<const T*>(weight) + at, *upstream = static_cast<const T*>(gradient) + at;
        const float scale = w.scales[row * w.groups() + group];
        float lanes[kLanes] = {};  // apart, so that the order of the sum does not depend on the instruction set
        int64_t c = 0;
        for (; c + kLanes <= count; c += kLanes)
          for (int64_t lane = 0; lane < kLanes; lane++)
            lanes[lane] += N::get(upstream[c + lane]) * N::get(values[c + lane]);
        for (; c < count; c++) lanes[0] += N::get(upstream[c]) * N::get(values[c]);
        for (int64_t width = kLanes / 2; width; width /= 2)
          for (int64_t lane = 0; lane < width; lane++) lanes[lane] += lanes[lane + width];
        scales[row * w.groups() + group] = lanes[0] / scale;
        if (latents)
          for (c = 0; c < count; c++) latents[at + c] = scale * N::get(upstream[c]);
      }
  }
};

void weights_of(const Latents& w, bool bfloat, void* out, int64_t first, int64_t last) {
  (bfloat ? Straight<true>::weights : Straight<false>::weights)(w, out, first, last);
}

void derivatives_of(const Latents& w, bool bfloat, const void* weight, const void* gradient, float* latents,
                    float* scales, int64_t first, int64_t last) {
  (bfloat ? Straight<true>::derivatives : Straight<false>::derivatives)(w, weight, gradient, latents, scales, first,
                                                                        last);
}

}  // namespace
}  // namespace bellbit
