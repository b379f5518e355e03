// The kernels, written once over an instruction set S:
//   F: kLanes floats   W: 32 signs   I: integer sums   X: 64 int8   B: 64 bits
//   T: a codebook of 8 floats   C: its index bit of 32 columns
// `bits` arguments point to one bit per column, least significant first.
//
// Everything here has internal linkage and no template of the standard library is instantiated: the linker keeps
// one copy of an inline function, and it might be the one that was compiled for AVX-512.
#pragma once

#include <cmath>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace bellbit {
namespace {

int64_t blocks_of(int64_t columns, int64_t size) { return (columns + size - 1) / size; }
int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
float larger(float a, float b) { return a < b ? b : a; }

// Asks for memory that will be read soon: kernels read several rows in turn, too many streams for the hardware to see.
void prefetch(const void* row, int64_t bytes) {
  constexpr uintptr_t kAhead = 6144, kLine = 64;
  const uintptr_t start = reinterpret_cast<uintptr_t>(row) + kAhead;
  for (uintptr_t at = start; at < start + static_cast<uintptr_t>(bytes); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at));
}

// Floats that live as long as a call.
struct Scratch {
  explicit Scratch(int64_t count) : data(static_cast<float*>(std::calloc(static_cast<size_t>(count), 4))) {
    if (!data) std::abort();  // some kilobytes: nothing would go on
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* const data;
};

template <class S>
struct Body {
  using F = typename S::F;
  using I = typename S::I;

  // ---- planes -------------------------------------------------------------------------------------------------
  //
  // With s = ±1 for each bit, Σ 2ᵖ·bit = (Σ 2ᵖ·s + 2ᴾ − 1) / 2, so that w = scale/2 · (Σ 2ᵖ·s − (2·zero − 2ᴾ + 1)):
  // a sum of ±x per plane, and for sign128 and bellbox up to 2 bits nothing to subtract.

  static bool has_zeros(const Planes& w) {
    return w.grid != Grid::kRows || w.planes > 2 || 2 * w.zero != static_cast<float>((1 << w.planes) - 1);
  }

  static F inline_scale(const Planes& w, int64_t row, int64_t block) {
    return S::set1_half(w.bits + row * w.row_stride + block * w.block_stride - 2);
  }

  // The halved scales and such zero points of one row, one per group: a block, or the whole row.
  static void grid_of(const Planes& w, int64_t row, int64_t groups, float* scales, float* zeros) {
    const float all = static_cast<float>((1 << w.planes) - 1);
    if (w.grid == Grid::kGroups) {
      S::halves(static_cast<const uint16_t*>(w.scales) + row * groups, scales, groups);
      for (int64_t g = 0; g < groups; g++) {
        scales[g] *= 0.5f;
        zeros[g] = 2 * static_cast<float>(w.zeros[row * groups + g]) - all;
      }
    } else if (w.grid == Grid::kRows) {
      scales[0] = 0.5f * static_cast<const float*>(w.scales)[row];
      zeros[0] = 2 * w.zero - all;
    }
  }

  // Where the bits of R rows lie.
  template <int P, int R>
  struct Bits {
    const uint8_t* at[R][P];
    uint8_t copies[R][P][kBlock / 8];

    Bits(const Planes& w, int64_t row) {
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) at[r][p] = w.bits + (row + r) * w.row_stride + p * w.plane_stride;
    }
    // Of a last, short block only, which is copied: rows end where their bytes do.
    Bits(const Planes& w, int64_t row, int64_t block) : Bits(w, row) {
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
          std::memset(copies[r][p], 0, kBlock / 8);
          std::memcpy(copies[r][p], at[r][p] + block * w.block_stride,
                      static_cast<size_t>((w.columns - block * kBlock + 7) / 8));
          at[r][p] = copies[r][p];
        }
    }
    Bits(const Bits&) = delete;  // pointers into itself
  };

  template <int P, int R>
  static void add(const Bits<P, R>& bits, int64_t offset, const int8_t* x, I (&acc)[R][P]) {
    for (int64_t c = 0; c < kBlock; c += 64) {
      const typename S::X values = S::load8(x + c);
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++)
          acc[r][p] = S::template add_bytes<2>(acc[r][p], S::keep(S::bits8(bits.at[r][p] + offset + c / 8), values));
    }
  }

  template <int P, int R>
  static void add(const Bits<P, R>& bits, int64_t offset, const float* x, F (&acc)[R][P]) {
    for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
      const F low = S::load(x + c), high = S::load(x + c + kLanes);
      for (int r = 0; r < R; r++)
        for (int p = 0; p < P; p++) {
          const typename S::W signs = S::signs(bits.at[r][p] + offset + c / 8);
          acc[r][p] = S::add(S::add(acc[r][p], S::template flip<0>(signs, low)), S::template flip<1>(signs, high));
        }
    }
  }

  // Adds blocks first … last; x is the token's row of codes or values.
  template <int P, int R, class Value, class Sum>
  static void add_blocks(const Planes& w, const Bits<P, R>& bits, int64_t row, int64_t first, int64_t last,
                         const Value* x, Sum (&acc)[R][P]) {
    const int64_t whole = w.columns / kBlock;
    for (int64_t b = first; b < smaller(last, whole); b++) add<P, R>(bits, b * w.block_stride, x + b * kBlock, acc);
    if (last > whole) add<P, R>(Bits<P, R>(w, row, whole), 0, x + whole * kBlock, acc);
  }

  template <int P, int R, bool Zeros>
  static void planes_rows(const Planes& w, const Activations& x, const float* bias, float* y, int64_t row,
                          float* scales, float* zeros) {
    const int64_t blocks = blocks_of(w.columns, kBlock);
    const int64_t groups = w.grid == Grid::kRows ? 1 : blocks, per_group = w.grid == Grid::kRows ? blocks : 1;
    for (int p = 0; p < P; p++) prefetch(w.bits + p * w.plane_stride + row * w.row_stride, R * w.row_stride);
    for (int r = 0; r < R; r++) grid_of(w, row + r, groups, scales + r * groups, zeros + r * groups);
    const Bits<P, R> bits(w, row);
    for (int64_t m = 0; m < x.tokens; m++) {
      F total[R];
      for (int r = 0; r < R; r++) total[r] = S::zero();
      for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * per_group, last = first + per_group;
        F sums[R], whole = S::zero();
        if (x.codes) {
          I start = S::izero();  // 2·Σ bit·x − Σ x = Σ ±x
          for (int64_t b = first; b < last; b++) start = S::sub(start, S::iload(x.totals + (m * blocks + b) * kLanes));
          if constexpr (Zeros) whole = S::to_float(S::sub(S::izero(), start));
          I acc[R][P];
          for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) acc[r][p] = start;
          add_blocks<P, R>(w, bits, row, first, last, x.codes + m * x.stride, acc);
          for (int r = 0; r < R; r++) {
            for (int p = 1; p < P; p++) acc[r][0] = S::add_shifted(acc[r][0], acc[r][p], p);
            sums[r] = S::to_float(acc[r][0]);
          }
        } else {
          if constexpr (Zeros)
            for (int64_t b = first; b < last; b++) whole = S::add(whole, S::load(x.sums + (m * blocks + b) * kLanes));
          F acc[R][P];
          for (int r = 0; r < R; r++)
            for (int p = 0; p < P; p++) acc[r][p] = S::zero();
          add_blocks<P, R>(w, bits, row, first, last, x.values + m * x.stride, acc);
          for (int r = 0; r < R; r++) {
            sums[r] = acc[r][0];
            for (int p = 1; p < P; p++) sums[r] = S::fma(S::set1(static_cast<float>(1 << p)), acc[r][p], sums[r]);
          }
        }
        for (int r = 0; r < R; r++) {
          if constexpr (Zeros) sums[r] = S::fma(S::set1(-zeros[r * groups + g]), whole, sums[r]);
          total[r] = S::fma(S::set1(scales[r * groups + g]), sums[r], total[r]);
        }
      }
      for (int r = 0; r < R; r++) {
        const float value = S::reduce(total[r]) * (x.codes ? x.steps[m] : 1.0f);
        y[m * w.rows + row + r] = value + (bias ? bias[row + r] : 0.0f);
      }
    }
  }

  template <int P, bool Zeros>
  static void planes_range(const Planes& w, const Activations& x, const float* bias, float* y, int64_t first,
                           int64_t last) {
    constexpr int R = P == 1 ? 4 : P <= 4 ? 2 : 1;  // rows that share a load of x; more would not fit the registers
    const int64_t groups = blocks_of(w.columns, kBlock);
    const Scratch grid(2 * R * groups);
    float *scales = grid.data, *zeros = scales + R * groups;
    int64_t row = first;
    for (; row + R <= last; row += R) planes_rows<P, R, Zeros>(w, x, bias, y, row, scales, zeros);
    for (; row < last; row++) planes_rows<P, 1, Zeros>(w, x, bias, y, row, scales, zeros);
  }

  // sign128: one plane, the scale in front of each block's bits.
  template <int R, bool Codes>
  static void sign_rows(const Planes& w, const Activations& x, const float* bias, float* y, int64_t row) {
    constexpr int64_t kBytes = kBlock / 8;
    const int64_t whole = w.columns / kBlock, blocks = blocks_of(w.columns, kBlock);
    const uint8_t* bits = w.bits + row * w.row_stride;
    prefetch(bits, R * w.row_stride);
    for (int64_t m = 0; m < x.tokens; m++) {
      F total[R];
      for (int r = 0; r < R; r++) total[r] = S::zero();
      const auto block = [&](int64_t b, const uint8_t* at, int64_t stride) {
        F sums[R];
        if constexpr (Codes) {
          const int8_t* codes = x.codes + m * x.stride + b * kBlock;
          I acc[R];
          for (int r = 0; r < R; r++) acc[r] = S::sub(S::izero(), S::iload(x.totals + (m * blocks + b) * kLanes));
          for (int64_t c = 0; c < kBlock; c += 64) {
            const typename S::X xs = S::load8(codes + c);
            for (int r = 0; r < R; r++)
              acc[r] = S::template add_bytes<2>(acc[r], S::keep(S::bits8(at + r * stride + c / 8), xs));
          }
          for (int r = 0; r < R; r++) sums[r] = S::to_float(acc[r]);
        } else {
          const float* values = x.values + m * x.stride + b * kBlock;
          for (int r = 0; r < R; r++) sums[r] = S::zero();
          for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
            const F low = S::load(values + c), high = S::load(values + c + kLanes);
            for (int r = 0; r < R; r++) {
              const typename S::W signs = S::signs(at + r * stride + c / 8);
              sums[r] = S::add(S::add(sums[r], S::template flip<0>(signs, low)), S::template flip<1>(signs, high));
            }
          }
        }
        for (int r = 0; r < R; r++) total[r] = S::fma(inline_scale(w, row + r, b), sums[r], total[r]);
      };
      for (int64_t b = 0; b < whole; b++) block(b, bits + b * w.block_stride, w.row_stride);
      if (whole < blocks) {
        uint8_t ends[R][kBytes] = {};  // rows end where their bytes do
        for (int r = 0; r < R; r++)
          std::memcpy(ends[r], bits + r * w.row_stride + whole * w.block_stride,
                      static_cast<size_t>((w.columns - whole * kBlock + 7) / 8));
        block(whole, ends[0], kBytes);
      }
      for (int r = 0; r < R; r++) {
        const float value = S::reduce(total[r]) * (Codes ? x.steps[m] : 1.0f);
        y[m * w.rows + row + r] = value + (bias ? bias[row + r] : 0.0f);
      }
    }
  }

  template <bool Codes>
  static void signs_range(const Planes& w, const Activations& x, const float* bias, float* y, int64_t first,
                          int64_t last) {
    int64_t row = first;
    for (; row + 4 <= last; row += 4) sign_rows<4, Codes>(w, x, bias, y, row);
    for (; row < last; row++) sign_rows<1, Codes>(w, x, bias, y, row);
  }

  static void planes(const Planes& w, const Activations& x, const float* bias, float* y, int64_t first, int64_t last) {
    using Range = void (*)(const Planes&, const Activations&, const float*, float*, int64_t, int64_t);
    static constexpr Range ranges[] = {planes_range<1, true>, planes_range<2, true>, planes_range<3, true>,
                                       planes_range<4, true>, planes_range<5, true>, planes_range<6, true>,
                                       planes_range<7, true>, planes_range<8, true>};
    if (w.grid == Grid::kSign128)
      (x.codes ? signs_range<true> : signs_range<false>)(w, x, bias, y, first, last);
    else if (has_zeros(w))
      ranges[w.planes - 1](w, x, bias, y, first, last);
    else  // at most two planes: more have levels at integers
      (w.planes == 1 ? planes_range<1, false> : planes_range<2, false>)(w, x, bias, y, first, last);
  }

  static void unpack_planes(const Planes& w, float* out, int64_t first, int64_t last) {
    const int64_t blocks = blocks_of(w.columns, kBlock), groups = w.grid == Grid::kRows ? 1 : blocks;
    const Scratch grid(2 * groups);
    float *scales = grid.data, *zeros = scales + groups, values[kBlock];
    for (int64_t row = first; row < last; row++, out += w.columns) {
      grid_of(w, row, groups, scales, zeros);
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t g = w.grid == Grid::kRows ? 0 : b, columns = smaller(kBlock, w.columns - b * kBlock);
        const F scale = w.grid == Grid::kSign128 ? inline_scale(w, row, b) : S::set1(scales[g]);
        const F zero = S::set1(-zeros[g]);
        float* target = columns == kBlock ? out + b * kBlock : values;
        for (int64_t c = 0; c < kBlock; c += kLanes) S::store(target + c, zero);
        for (int64_t p = 0; p < w.planes; p++) {
          uint8_t copy[kBlock / 8] = {};
          const uint8_t* at = w.bits + p * w.plane_stride + row * w.row_stride + b * w.block_stride;
          if (columns < kBlock) at = static_cast<uint8_t*>(std::memcpy(copy, at, static_cast<size_t>((columns + 7) / 8)));
          const F unit = S::set1(static_cast<float>(1 << p));
          for (int64_t c = 0; c < kBlock; c += 2 * kLanes) {
            const typename S::W signs = S::signs(at + c / 8);
            S::store(target + c, S::add(S::load(target + c), S::template flip<0>(signs, unit)));
            S::store(target + c + kLanes, S::add(S::load(target + c + kLanes), S::template flip<1>(signs, unit)));
          }
        }
        for (int64_t c = 0; c < kBlock; c += kLanes)
          S::store(target + c, S::fma(scale, S::load(target + c), S::zero()));
        if (target == values) std::memcpy(out + b * kBlock, values, static_cast<size_t>(columns) * sizeof(float));
      }
    }
  }

  // ---- codebook2 ----------------------------------------------------------------------------------------------

  static constexpr int kScales = 7;  // per row and block: μ_c, α_c, μ_s, α_s, μ, α₁, α₂

  // The scales of one row as floats; one more is readable behind them.
  static void row_scales(const Codebook& w, int64_t row, int64_t blocks, float* out) {
    const int64_t count = blocks * kScales;
    if (!w.exponents) {
      S::halves(static_cast<const uint16_t*>(w.scales) + row * count, out, count);
      return;
    }
    const auto* integers = static_cast<const int8_t*>(w.scales) + row * count;
    for (int64_t b = 0; b < blocks; b++) {
      const float step = std::ldexp(1.0f, w.exponents[row * blocks + b] - 127 - 6);
      for (int i = 0; i < kScales; i++) out[b * kScales + i] = static_cast<float>(integers[b * kScales + i]) * step;
    }
  }

  // Calls take(column, weights) for 32 columns of R rows at a time; weights beyond the end are undefined.
  template <int R, class Take>
  static void walk(const Codebook& w, int64_t row, const float* scales, int64_t row_stride, Take&& take) {
    constexpr int64_t kStep = 2 * kLanes;
    const int64_t width = (w.columns + 7) / 8, whole = w.columns & ~(kStep - 1);
    const uint8_t *second = w.second + row * width, *signs = w.signs + row * width;
    typename S::T tables[R];
    const auto step = [&](int64_t c, const uint8_t* salient, const uint8_t* twos, const uint8_t* ones, int64_t stride) {
      const typename S::C columns = S::columns(salient);
      F weights[R][2];
      for (int r = 0; r < R; r++) S::lookup(tables[r], columns, twos + r * stride, ones + r * stride, weights[r]);
      take(c, weights);
    };
    int64_t c = 0;
    for (int64_t start = 0; start < w.columns; start += w.block_size, scales += kScales) {
      for (int r = 0; r < R; r++) tables[r] = S::table(scales + r * row_stride);
      for (const int64_t stop = smaller(start + w.block_size, whole); c < stop; c += kStep)
        step(c, w.salient + c / 8, second + c / 8, signs + c / 8, width);
    }
    if (whole == w.columns) return;
    uint8_t ends[1 + 2 * R][kStep / 8] = {};  // rows end where their bytes do
    const size_t bytes = static_cast<size_t>(width - whole / 8);
    std::memcpy(ends[0], w.salient + whole / 8, bytes);
    for (int r = 0; r < R; r++) {
      std::memcpy(ends[1 + r], second + r * width + whole / 8, bytes);
      std::memcpy(ends[1 + R + r], signs + r * width + whole / 8, bytes);
    }
    step(whole, ends[0], ends[1], ends[1 + R], kStep / 8);
  }

  template <int R, int M>
  static void codebook_values(const Codebook& w, const Activations& x, int64_t token, int64_t row, const float* scales,
                              int64_t row_stride, const float* bias, float* y) {
    F acc[R][M][2];  // two sums each: an addition takes four cycles
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) acc[r][m][0] = acc[r][m][1] = S::zero();
    const float* values = x.values + token * x.stride;
    walk<R>(w, row, scales, row_stride, [&](int64_t c, const F(&weights)[R][2]) {
      for (int m = 0; m < M; m++)
        for (int half = 0; half < 2; half++) {
          const F value = S::load(values + m * x.stride + c + half * kLanes);
          for (int r = 0; r < R; r++) acc[r][m][half] = S::fma(weights[r][half], value, acc[r][m][half]);
        }
    });
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        y[(token + m) * w.rows + row + r] =
            S::reduce(S::add(acc[r][m][0], acc[r][m][1])) + (bias ? bias[row + r] : 0.0f);
  }

  // Integer sums over the columns of a block by sign s₁ = ±1 and second bit, ordinary and salient columns apart; the
  // block's product is then
  //   μ_c·Σ₀x + α_c·Σ₀s₁x + μ_s·Σ₁x + α_s·Σ₁s₁x + μ·Σx + α₁·Σs₁x + α₂·Σs₂x
  template <int R>
  static void codebook_codes(const Codebook& w, const Activations& x, int64_t m, int64_t row, const float* scales,
                             int64_t row_stride, const float* bias, float* y) {
    constexpr int64_t kBytes = kBlock / 8;
    const int64_t width = (w.columns + 7) / 8, blocks = blocks_of(w.columns, kBlock), whole = w.columns / kBlock;
    const uint8_t *signs = w.signs + row * width, *second = w.second + row * width;
    F total[R][2];
    for (int r = 0; r < R; r++) total[r][0] = total[r][1] = S::zero();
    const auto block = [&](int64_t b, const uint8_t* ones, const uint8_t* twos, int64_t stride) {
      const int8_t *ordinary = x.codes + m * x.stride + b * kBlock, *salient = x.salient + m * x.stride + b * kBlock;
      const I all = S::iload(x.totals + (m * blocks + b) * kLanes);
      const I all_salient = S::iload(x.salient_totals + (m * blocks + b) * kLanes);
      const F sum_salient = S::to_float(all_salient);
      for (int r = 0; r < R; r++) {
        I signed_sum = S::sub(S::izero(), all), sparse = S::izero(), sparse_positive = S::izero();
        I first = S::sub(S::izero(), all_salient), second_sum = first;
        for (int64_t c = 0; c < kBlock; c += 64) {
          const typename S::B s = S::bits8(ones + r * stride + c / 8), t = S::bits8(twos + r * stride + c / 8);
          const typename S::X xs = S::load8(ordinary + c), salient_xs = S::load8(salient + c);
          const typename S::X positive = S::keep(s, xs);
          signed_sum = S::template add_bytes<2>(signed_sum, positive);
          sparse = S::template add_bytes<1>(sparse, S::keep(t, xs));
          sparse_positive = S::template add_bytes<2>(sparse_positive, S::keep(t, positive));
          first = S::template add_bytes<2>(first, S::keep(s, salient_xs));
          second_sum = S::template add_bytes<2>(second_sum, S::keep(t, salient_xs));
        }
        const I sparse_signed = S::sub(sparse_positive, sparse);
        const float* a = scales + r * row_stride + b * kScales;
        total[r][0] = S::fma(S::to_float(S::sub(all, sparse)), S::set1(a[0]), total[r][0]);
        total[r][1] = S::fma(S::to_float(S::sub(signed_sum, sparse_signed)), S::set1(a[1]), total[r][1]);
        total[r][0] = S::fma(S::to_float(sparse), S::set1(a[2]), total[r][0]);
        total[r][1] = S::fma(S::to_float(sparse_signed), S::set1(a[3]), total[r][1]);
        total[r][0] = S::fma(sum_salient, S::set1(a[4]), total[r][0]);
        total[r][1] = S::fma(S::to_float(first), S::set1(a[5]), total[r][1]);
        total[r][0] = S::fma(S::to_float(second_sum), S::set1(a[6]), total[r][0]);
      }
    };
    for (int64_t b = 0; b < whole; b++) block(b, signs + b * kBytes, second + b * kBytes, width);
    if (whole < blocks) {
      uint8_t ends[2 * R][kBytes] = {};  // rows end where their bytes do
      const size_t bytes = static_cast<size_t>(width - whole * kBytes);
      for (int r = 0; r < R; r++) {
        std::memcpy(ends[r], signs + r * width + whole * kBytes, bytes);
        std::memcpy(ends[R + r], second + r * width + whole * kBytes, bytes);
      }
      block(whole, ends[0], ends[R], kBytes);
    }
    for (int r = 0; r < R; r++)
      y[m * w.rows + row + r] =
          S::reduce(S::add(total[r][0], total[r][1])) * x.steps[m] + (bias ? bias[row + r] : 0.0f);
  }

  template <int R>
  static void codebook_rows(const Codebook& w, const Activations& x, const float* bias, float* y, int64_t row,
                            float* scales) {
    const int64_t blocks = blocks_of(w.columns, w.block_size), stride = blocks * kScales;
    const int64_t width = (w.columns + 7) / 8, scale_bytes = stride * (w.exponents ? 1 : 2);
    prefetch(w.signs + row * width, R * width);
    prefetch(w.second + row * width, R * width);
    prefetch(static_cast<const uint8_t*>(w.scales) + row * scale_bytes, R * scale_bytes);
    for (int r = 0; r < R; r++) row_scales(w, row + r, blocks, scales + r * stride);
    int64_t m = 0;
    if (x.codes) {
      for (; m < x.tokens; m++) codebook_codes<R>(w, x, m, row, scales, stride, bias, y);
      return;
    }
    for (; m + 4 <= x.tokens; m += 4) codebook_values<R, 4>(w, x, m, row, scales, stride, bias, y);
    for (; m + 2 <= x.tokens; m += 2) codebook_values<R, 2>(w, x, m, row, scales, stride, bias, y);
    if (m < x.tokens) codebook_values<R, 1>(w, x, m, row, scales, stride, bias, y);
  }

  static void codebook(const Codebook& w, const Activations& x, const float* bias, float* y, int64_t first,
                       int64_t last) {
    const Scratch scales(2 * blocks_of(w.columns, w.block_size) * kScales + 1);
    int64_t row = first;
    for (; row + 2 <= last; row += 2) codebook_rows<2>(w, x, bias, y, row, scales.data);
    if (row < last) codebook_rows<1>(w, x, bias, y, row, scales.data);
  }

  static void unpack_codebook(const Codebook& w, float* out, int64_t first, int64_t last) {
    const int64_t blocks = blocks_of(w.columns, w.block_size);
    const Scratch scales(blocks * kScales + 1);
    float end[2 * kLanes];
    for (int64_t row = first; row < last; row++, out += w.columns) {
      row_scales(w, row, blocks, scales.data);
      walk<1>(w, row, scales.data, 0, [&](int64_t c, const F(&weights)[1][2]) {
        float* target = c + 2 * kLanes <= w.columns ? out + c : end;
        S::store(target, weights[0][0]);
        S::store(target + kLanes, weights[0][1]);
        if (target == end) std::memcpy(out + c, end, static_cast<size_t>(w.columns - c) * sizeof(float));
      });
    }
  }

  // Moves the codes of salient columns from codes to salient, and their sums likewise.
  static void split(const Codebook& w, const Activations& x, int8_t* codes, int32_t* totals, int8_t* salient,
                    int32_t* salient_totals) {
    const int64_t blocks = x.stride / kBlock;
    for (int64_t m = 0; m < x.tokens; m++)
      for (int64_t b = 0; b < blocks; b++) {
        int32_t sum = 0;
        for (int64_t c = b * kBlock; c < (b + 1) * kBlock; c++) {
          const int64_t at = m * x.stride + c;
          const bool moves = c < w.columns && (w.salient[c / 8] >> (c % 8) & 1);
          salient[at] = moves ? codes[at] : int8_t{0};
          codes[at] = moves ? int8_t{0} : codes[at];
          sum += salient[at];
        }
        int32_t* lanes = salient_totals + (m * blocks + b) * kLanes;
        std::memset(lanes, 0, kLanes * sizeof(int32_t));
        lanes[0] = sum;
        totals[(m * blocks + b) * kLanes] -= sum;
      }
  }

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

  // max |x|; infinite or NaN where any x is
  static float largest_of(const float* x, int64_t count) {
    float lanes[kLanes] = {}, bad = 0;  // kept apart by lane, so that the loop becomes vector instructions
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int64_t lane = 0; lane < kLanes; lane++) {
        const float size = std::fabs(x[i + lane]);
        lanes[lane] = lanes[lane] < size ? size : lanes[lane];
        bad += size * 0;
      }
    for (; i < count; i++) {
      lanes[0] = larger(lanes[0], std::fabs(x[i]));
      bad += x[i] * 0;
    }
    for (float lane : lanes) lanes[0] = larger(lanes[0], lane);
    return lanes[0] + bad;
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
    return {name, planes, codebook, dense, unpack_planes, unpack_codebook, split, widen_row,
            dot, attend, hadamard, prepare};
  }
};

}  // namespace
}  // namespace bellbit
