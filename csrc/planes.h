// Products with codes in bit planes (layouts sign128, symmetric, bellbox, uniform) over an instruction set S, see body.h.
//
// With s = ±1 for each bit, Σ 2ᵖ·bit = (Σ 2ᵖ·s + 2ᴾ − 1) / 2, so that w = scale/2 · (Σ 2ᵖ·s − (2·zero − 2ᴾ + 1)):
// a sum of ±x per plane, and for grids that lie symmetrically around 0 nothing to subtract.
#pragma once

#include "common.h"

namespace bellbit {
namespace {

template <class S>
struct PlanesBody {
  using F = typename S::F;
  using I = typename S::I;

  static constexpr int64_t kSymmetric = 4;  // planes up to which there is a product without zero points

  static bool has_zeros(const Planes& w) {
    return w.zeros || w.planes > kSymmetric || 2 * w.zero != static_cast<float>((1 << w.planes) - 1);
  }

  static F inline_scale(const Planes& w, int64_t row, int64_t block) {
    return S::set1_half(w.bits + row * w.row_stride + block * w.block_stride - 2);
  }

  // The halved scales and such zero points of one row, one per group.
  static void grid_of(const Planes& w, int64_t row, float* scales, float* zeros) {
    const int64_t groups = w.groups();
    const float all = static_cast<float>((1 << w.planes) - 1);
    if (w.grid == Grid::kHalves) {
      S::halves(static_cast<const uint16_t*>(w.scales) + row * groups, scales, groups);
      for (int64_t g = 0; g < groups; g++) {
        scales[g] *= 0.5f;
        zeros[g] = 2 * (w.zeros ? static_cast<float>(w.zeros[row * groups + g]) : w.zero) - all;
      }
    } else if (w.grid == Grid::kTable) {
      const uint8_t* number = static_cast<const uint8_t*>(w.scales) + row * groups;
      for (int64_t g = 0; g < groups; g++) {
        scales[g] = 0.5f * w.table[number[g]];
        zeros[g] = 2 * w.zero - all;
      }
    } else if (w.grid == Grid::kFloats) {
      for (int64_t g = 0; g < groups; g++) {
        scales[g] = 0.5f * element(static_cast<const float*>(w.scales), row * groups + g);
        zeros[g] = 2 * w.zero - all;
      }
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
          acc[r][p] = S::add_twice(acc[r][p], S::keep(S::bits8(bits.at[r][p] + offset + c / 8), values));
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
    const int64_t blocks = blocks_of(w.columns, kBlock), groups = w.groups();
    for (int p = 0; p < P; p++) prefetch(w.bits + p * w.plane_stride + row * w.row_stride, R * w.row_stride);
    for (int r = 0; r < R; r++) grid_of(w, row + r, scales + r * groups, zeros + r * groups);
    const Bits<P, R> bits(w, row);
    for (int64_t m = 0; m < x.tokens; m++) {
      F total[R];
      for (int r = 0; r < R; r++) total[r] = S::zero();
      for (int64_t g = 0; g < groups; g++) {
        const int64_t first = g * w.group, last = smaller(first + w.group, blocks);
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
    const int64_t groups = w.groups();
    const Scratch<float> grid(2 * R * groups);
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
    uint8_t ends[R][kBytes] = {};  // rows end where their bytes do
    for (int r = 0; r < R; r++)
      std::memcpy(ends[r], bits + r * w.row_stride + whole * w.block_stride,
                  static_cast<size_t>((w.columns - whole * kBlock + 7) / 8));
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
              acc[r] = S::add_twice(acc[r], S::keep(S::bits8(at + r * stride + c / 8), xs));
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
      // one call, so that it is inlined and sums stay in registers
      for (int64_t b = 0; b < blocks; b++)
        block(b, b == whole ? ends[0] : bits + b * w.block_stride, b == whole ? kBytes : w.row_stride);
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

  static void multiply(const Planes& w, const Activations& x, const float* bias, float* y, int64_t first, int64_t last) {
    using Range = void (*)(const Planes&, const Activations&, const float*, float*, int64_t, int64_t);
    static constexpr Range ranges[] = {planes_range<1, true>, planes_range<2, true>, planes_range<3, true>,
                                       planes_range<4, true>, planes_range<5, true>, planes_range<6, true>,
                                       planes_range<7, true>, planes_range<8, true>};
    static constexpr Range symmetric[kSymmetric] = {planes_range<1, false>, planes_range<2, false>,
                                                    planes_range<3, false>, planes_range<4, false>};
    if (w.grid == Grid::kSign128)
      (x.codes ? signs_range<true> : signs_range<false>)(w, x, bias, y, first, last);
    else
      (has_zeros(w) ? ranges : symmetric)[w.planes - 1](w, x, bias, y, first, last);
  }

  static void unpack(const Planes& w, float* out, int64_t first, int64_t last) {
    const int64_t blocks = blocks_of(w.columns, kBlock), groups = w.groups();
    const Scratch<float> grid(2 * groups);
    float *scales = grid.data, *zeros = scales + groups, values[kBlock];
    for (int64_t row = first; row < last; row++, out += w.columns) {
      grid_of(w, row, scales, zeros);
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t g = b / w.group, columns = smaller(kBlock, w.columns - b * kBlock);
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
};

}  // namespace
}  // namespace bellbit
