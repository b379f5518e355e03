// The kernels, written once over an instruction set S:
//   F: kLanes floats   W: 32 signs   I: kLanes integer sums   X: 64 int8   B: 64 bits   Digits: tables of 16 int8, twice
// `bits` arguments point to one bit per column, least significant first.
#pragma once

#include "codebook.h"
#include "divergence.h"
#include "planes.h"
#include "training.h"

namespace bellbit {
namespace {

// max |x|; infinite or NaN where any x is
float largest_of(const float* x, int64_t count) {
  float lanes[kLanes] = {}, bad[kLanes] = {};  // apart by lane, so that the loop becomes vector instructions
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) {
      const float size = std::fabs(x[i + lane]);
      lanes[lane] = lanes[lane] < size ? size : lanes[lane];
      bad[lane] += size * 0;
    }
  for (; i < count; i++) {
    lanes[0] = larger(lanes[0], std::fabs(x[i]));
    bad[0] += x[i] * 0;
  }
  for (int64_t lane = 1; lane < kLanes; lane++) {
    lanes[0] = larger(lanes[0], lanes[lane]);
    bad[0] += bad[lane];
  }
  return lanes[0] + bad[0];
}

template <class S>
struct Body {
  using F = typename S::F;
  using I = typename S::I;

  // ---- dense matrices in 16 bits ------------------------------------------------------------------------------

  template <bool Bfloat>
  static F widen(const uint16_t* values) {
    if constexpr (Bfloat) return S::from_bfloat(values);
    else return S::from_half(values);
  }

  template <bool Bfloat>
  static void dense_rows(const Dense& w, const Activations& x, const float* bias, float* y, int64_t first,
                         int64_t last) {
    const int64_t whole = w.columns & ~(kLanes - 1);
    uint16_t end[kLanes] = {};
    for (int64_t row = first; row < last; row++) {
      const uint16_t* values = w.values + row * w.columns;
      std::memcpy(end, values + whole, static_cast<size_t>(w.columns - whole) * sizeof(uint16_t));
      for (int64_t m = 0; m < x.tokens; m++) {
        const float* xs = x.values + m * x.stride;
        F a = S::zero(), b = S::zero();
        int64_t c = 0;
        for (; c + 2 * kLanes <= whole; c += 2 * kLanes) {
          a = S::fma(widen<Bfloat>(values + c), S::load(xs + c), a);
          b = S::fma(widen<Bfloat>(values + c + kLanes), S::load(xs + c + kLanes), b);
        }
        if (c < whole) a = S::fma(widen<Bfloat>(values + c), S::load(xs + c), a);
        if (whole < w.columns) b = S::fma(widen<Bfloat>(end), S::load(xs + whole), b);
        y[m * w.rows + row] = S::reduce(S::add(a, b)) + (bias ? bias[row] : 0.0f);
      }
    }
  }

  static void dense(const Dense& w, const Activations& x, const float* bias, float* y, int64_t first, int64_t last) {
    (w.bfloat ? dense_rows<true> : dense_rows<false>)(w, x, bias, y, first, last);
  }

  static void widen_row(const Dense& w, float* out) {
    const int64_t whole = w.columns & ~(kLanes - 1);
    uint16_t end[kLanes] = {};
    float values[kLanes];
    std::memcpy(end, w.values + whole, static_cast<size_t>(w.columns - whole) * sizeof(uint16_t));
    for (int64_t c = 0; c < whole; c += kLanes)
      S::store(out + c, w.bfloat ? widen<true>(w.values + c) : widen<false>(w.values + c));
    S::store(values, w.bfloat ? widen<true>(end) : widen<false>(end));
    std::memcpy(out + whole, values, static_cast<size_t>(w.columns - whole) * sizeof(float));
  }

  // ---- attention ----------------------------------------------------------------------------------------------

  static float dot(const float* a, const float* b, int64_t count) {
    F sum = S::zero();
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) sum = S::fma(S::load(a + i), S::load(b + i), sum);
    float rest = 0;
    for (; i < count; i++) rest += a[i] * b[i];
    return S::reduce(sum) + rest;
  }

  static void attend(const float* q, const float* keys, const float* values, int64_t length, int64_t size, float scale,
                     float* scores, float* out) {
    float largest = -INFINITY, total = 0;
    for (int64_t t = 0; t < length; t++) {
      scores[t] = scale * dot(q, keys + t * size, size);
      largest = larger(largest, scores[t]);
    }
    for (int64_t t = 0; t < length; t++) {
      scores[t] = std::exp(scores[t] - largest);
      total += scores[t];
    }
    const int64_t whole = size & ~(kLanes - 1);
    for (int64_t i = 0; i < whole; i += kLanes) {
      F sum = S::zero();
      for (int64_t t = 0; t < length; t++) sum = S::fma(S::set1(scores[t]), S::load(values + t * size + i), sum);
      S::store(out + i, S::fma(S::set1(1 / total), sum, S::zero()));
    }
    for (int64_t i = whole; i < size; i++) {
      float sum = 0;
      for (int64_t t = 0; t < length; t++) sum += scores[t] * values[t * size + i];
      out[i] = sum / total;
    }
  }

  // ---- activations --------------------------------------------------------------------------------------------

  // Blocks of 128, then of the powers of two that the rest is made of.
  static void hadamard(float* x, int64_t tokens, int64_t columns) {
    for (int64_t m = 0; m < tokens; m++, x += columns) {
      int64_t size = kBlock;
      for (int64_t start = 0; start < columns; start += size) {
        while (size > columns - start) size /= 2;
        transform(x + start, size);
      }
    }
  }

  static void transform(float* x, int64_t size) {
    if (size == 8 * kLanes) return transform_lanes<8>(x);
    if (size == 4 * kLanes) return transform_lanes<4>(x);
    if (size == 2 * kLanes) return transform_lanes<2>(x);
    if (size == kLanes) return transform_lanes<1>(x);
    for (int64_t half = 1; half < size; half *= 2)
      for (int64_t i = 0; i < size; i += 2 * half)
        for (int64_t j = i; j < i + half; j++) {
          const float a = x[j], b = x[j + half];
          x[j] = a + b;
          x[j + half] = a - b;
        }
    const float norm = 1 / std::sqrt(static_cast<float>(size));
    for (int64_t i = 0; i < size; i++) x[i] *= norm;
  }

  // N registers: first the neighbours inside each, (a, b) to (a + b, a − b), then register against register.
  template <int N>
  static void transform_lanes(float* x) {
    F parts[N];
    for (int i = 0; i < N; i++) {
      parts[i] = S::load(x + i * kLanes);
      parts[i] = S::template butterfly<1>(parts[i]);
      parts[i] = S::template butterfly<2>(parts[i]);
      parts[i] = S::template butterfly<4>(parts[i]);
      parts[i] = S::template butterfly<8>(parts[i]);
    }
    const F minus = S::set1(-1);
    for (int half = 1; half < N; half *= 2)
      for (int i = 0; i < N; i++)
        if (!(i & half)) {
          const F a = parts[i], b = parts[i + half];
          parts[i] = S::add(a, b);
          parts[i + half] = S::fma(minus, b, a);
        }
    const F norm = S::set1(1 / std::sqrt(static_cast<float>(N * kLanes)));
    for (int i = 0; i < N; i++) S::store(x + i * kLanes, S::fma(parts[i], norm, S::zero()));
  }

  static void prepare(const float* x, int64_t tokens, int64_t columns, int limit, bool shared, float* values,
                      float* sums, int8_t* codes, float* steps, int32_t* totals) {
    constexpr float kSmallest = 1e-5f;
    const int64_t blocks = blocks_of(columns, kBlock);
    const float overall = limit && shared ? largest_of(x, tokens * columns) : 0;
    for (int64_t m = 0; m < tokens; m++) {
      const float* row = x + m * columns;
      const float largest = !limit || shared ? overall : largest_of(row, columns);
      const bool finite = std::isfinite(largest);
      const float step = finite ? larger(largest, kSmallest) / static_cast<float>(limit ? limit : 1) : NAN;
      if (codes) steps[m] = step;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t count = smaller(kBlock, columns - b * kBlock);
        const float* source = row + b * kBlock;
        if (codes) {
          int8_t* target = codes + (m * blocks + b) * kBlock;
          int32_t *lanes = totals + (m * blocks + b) * kLanes, sum = 0;
          std::memset(target, 0, kBlock);
          std::memset(lanes, 0, kLanes * sizeof(int32_t));
          for (int64_t c = 0; finite && c < count; c++) {
            target[c] = static_cast<int8_t>(std::nearbyint(source[c] / step));
            sum += target[c];
          }
          lanes[0] = sum;
        } else {
          float *target = values + (m * blocks + b) * kBlock, *lanes = sums + (m * blocks + b) * kLanes;
          std::memset(target, 0, kBlock * sizeof(float));
          std::memset(lanes, 0, kLanes * sizeof(float));
          for (int64_t c = 0; c < count; c++) target[c] = limit ? std::nearbyint(source[c] / step) * step : source[c];
          for (int64_t c = 0; c < kBlock; c += kLanes)
            for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] += target[c + lane];
        }
      }
    }
  }

  static constexpr Kernels kernels(const char* name) {
    return {name, PlanesBody<S>::multiply, CodebookBody<S>::multiply, dense, PlanesBody<S>::unpack,
            CodebookBody<S>::unpack, CodebookBody<S>::arrange, widen_row,
            dot, attend, hadamard, prepare, weights_of, derivatives_of, divergences_of};
  }
};

}  // namespace
}  // namespace bellbit
