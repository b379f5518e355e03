// Products with codebook2 weights over an instruction set S, see body.h.
//
// The codes of kChunk columns, 64 bytes, are loaded once. Shifting them by 2·j bits then brings one code to the bottom of
// each of the 16 words: those of columns 16·lane + j, next to each other in arranged values. Or of each of the 64
// bytes: columns 4·lane + k, next to each other in arranged codes. Either way the lower half of the lanes holds one
// piece of kBlock columns and the upper half another, so that one table of 16 entries serves both.
#pragma once

#include "common.h"

namespace bellbit {
namespace {

template <class S>
struct CodebookBody {
  using F = typename S::F;
  using I = typename S::I;
  using X = typename S::X;

  static constexpr int64_t kScales = 7, kPadded = 8;  // per row and block: μ_c, α_c, μ_s, α_s, μ, α₁, α₂
  static constexpr int64_t kCodeBytes = kChunk / 4;

  static int64_t width(const Codebook& w) { return (w.columns + 3) / 4; }
  static int32_t salient(const Codebook& w, int64_t c) { return w.salient[c / 8] >> (c % 8) & 1; }

  // Calls take(place, column, lane) for the columns of arranged rows of `stride`.
  template <int64_t Lanes, class Take>
  static void each_place(int64_t stride, Take&& take) {
    constexpr int64_t kUnits = kChunk / Lanes;
    for (int64_t base = 0; base < stride; base += kChunk)
      for (int64_t unit = 0; unit < kUnits; unit++)
        for (int64_t lane = 0; lane < Lanes; lane++)
          take(base + unit * Lanes + lane, base + lane * kUnits + unit, lane);
  }

  template <int64_t Lanes, class Value, class Index>
  static void arrange_as(const Codebook& w, const Activations& x, int64_t stride, const Value* from, Value* to,
                         Index* index) {
    const Scratch<Index> salient(stride);
    for (int64_t c = 0; c < w.columns; c++) salient.data[c] = static_cast<Index>(4 * CodebookBody::salient(w, c));
    each_place<Lanes>(stride, [&](int64_t place, int64_t column, int64_t lane) {
      index[place] = static_cast<Index>(salient.data[column] | (lane < Lanes / 2 ? 0 : 8));
    });
    const Scratch<Value> row(stride);  // with zeros behind
    for (int64_t m = 0; m < x.tokens; m++, to += stride) {
      std::memcpy(row.data, from + m * x.stride, static_cast<size_t>(x.stride) * sizeof(Value));
      each_place<Lanes>(stride, [&](int64_t place, int64_t column, int64_t) { to[place] = row.data[column]; });
    }
  }

  static void arrange(const Codebook& w, const Activations& x, int64_t stride, float* values, int8_t* codes,
                      void* index, int32_t* start) {
    if (values) return arrange_as<kLanes>(w, x, stride, x.values, values, static_cast<int32_t*>(index));
    arrange_as<64>(w, x, stride, x.codes, codes, static_cast<int8_t*>(index));
    const int64_t blocks = x.stride / kBlock;
    std::memset(start, 0, static_cast<size_t>(x.tokens * kLanes) * sizeof(int32_t));
    for (int64_t m = 0; m < x.tokens; m++)
      for (int64_t i = 0; i < blocks * kLanes; i++)
        start[m * kLanes + i % kLanes] -= S::kBias * x.totals[m * blocks * kLanes + i];
  }

  // The scales of one row as floats, each block's at a multiple of kPadded.
  static void row_scales(const Codebook& w, int64_t row, int64_t blocks, float* out) {
    const int64_t first = row * blocks;
    if (w.exponents) {
      const auto* integers = static_cast<const int8_t*>(w.scales) + first * kScales;
      for (int64_t b = 0; b < blocks; b++, integers += kScales, out += kPadded) {
        const float step = std::ldexp(1.0f, w.exponents[first + b] - 127 - 6);
        for (int i = 0; i < kScales; i++) out[i] = static_cast<float>(integers[i]) * step;
      }
      return;
    }
    const auto* halves = static_cast<const uint16_t*>(w.scales) + first * kScales;
    for (int64_t b = 0; b + 1 < blocks; b++, halves += kScales, out += kPadded) S::eight_halves(halves, out);
    S::halves(halves, out, kScales);  // nothing behind them may be read
  }

  // What the rows of a call share.
  struct Work {
    const int64_t blocks, chunks;
    const Scratch<float> scales, tables;    // of one row, kPadded per block; of two rows, kLanes per chunk
    const Scratch<int32_t> first, second;   // where the scales are of the first and the other kBlock columns of a chunk

    explicit Work(const Codebook& w)
        : blocks(blocks_of(w.columns, w.block_size)), chunks(blocks_of(w.columns, kChunk)), scales(blocks * kPadded),
          tables(2 * chunks * kLanes), first(chunks), second(chunks) {
      for (int64_t n = 0; n < chunks; n++) {
        const int64_t block = n * kChunk / w.block_size, next = (n * kChunk + kBlock) / w.block_size;
        first.data[n] = static_cast<int32_t>(block * kPadded);
        second.data[n] = static_cast<int32_t>(smaller(next, blocks - 1) * kPadded);
      }
    }
  };

  // The table of each chunk of R rows, eight entries for its first kBlock columns, eight for the others; and, for
  // codes, the size of each row's largest entry, not finite if any entry is not.
  template <int R, bool Codes>
  static void row_tables(const Codebook& w, const Work& work, int64_t row, float (&sizes)[R]) {
    const int64_t chunks = work.chunks;
    float* tables = work.tables.data;
    F largest[R];
    for (int r = 0; r < R; r++) largest[r] = S::zero();
    const auto take = [&](int r, int64_t n, const F& table) {
      S::store(tables + (r * chunks + n) * kLanes, table);
      if constexpr (Codes) largest[r] = S::max_abs(largest[r], table);
    };
    if (w.block_size == kBlock && !w.exponents) {  // the usual case: the scales of a chunk are neighbours
      const auto* scales = static_cast<const uint16_t*>(w.scales) + row * work.blocks * kScales;
      for (int64_t n = 0; n + 1 < chunks; n++)
        for (int r = 0; r < R; r++) take(r, n, S::pair_table(scales + (r * work.blocks + 2 * n) * kScales));
      const int64_t done = 2 * (chunks - 1);
      for (int r = 0; r < R; r++) {
        uint16_t end[16] = {};  // nothing behind them may be read
        std::memcpy(end, scales + (r * work.blocks + done) * kScales,
                    static_cast<size_t>((work.blocks - done) * kScales) * sizeof *scales);
        take(r, chunks - 1, S::pair_table(end));
      }
    } else {
      const float* scales = work.scales.data;
      for (int r = 0; r < R; r++) {
        row_scales(w, row + r, work.blocks, work.scales.data);
        for (int64_t n = 0; n < chunks; n++)
          take(r, n, S::table(scales + work.first.data[n], scales + work.second.data[n]));
      }
    }
    if constexpr (Codes)
      for (int r = 0; r < R; r++) sizes[r] = S::reduce_max(largest[r]);
  }

  // Calls take(chunk, codes, bytes between rows) for the chunks of R rows.
  template <int R, class Take>
  static void chunks(const Codebook& w, int64_t row, Take&& take) {
    const int64_t bytes = width(w), whole = bytes / kCodeBytes;
    const uint8_t* codes = w.codes + row * bytes;
    uint8_t ends[R][kCodeBytes] = {};  // rows end where their bytes do
    for (int r = 0; r < R; r++)
      std::memcpy(ends[r], codes + r * bytes + whole * kCodeBytes, static_cast<size_t>(bytes % kCodeBytes));
    // one call, so that it is inlined and sums stay in registers: twice as fast
    for (int64_t n = 0; n * kCodeBytes < bytes; n++)
      take(n, n == whole ? ends[0] : codes + n * kCodeBytes, n == whole ? kCodeBytes : bytes);
  }

  // M tokens of values; tables: those of R rows, `table_stride` floats apart.
  template <int R, int M>
  static void values(const Codebook& w, const Activations& x, int64_t token, int64_t row, const float* tables,
                     int64_t table_stride, const float* bias, float* y) {
    F acc[R][M][2];  // two sums each: an addition takes four cycles
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) acc[r][m][0] = acc[r][m][1] = S::zero();
    const float* input = x.values + token * x.stride;
    const auto* indices = static_cast<const int32_t*>(x.index);
    const int64_t input_stride = x.stride;
    chunks<R>(w, row, [&](int64_t n, const uint8_t* codes, int64_t stride) {
      F table[R];
      X bits[R];
      for (int r = 0; r < R; r++) {
        table[r] = S::load(tables + r * table_stride + n * kLanes);
        bits[r] = S::load8(reinterpret_cast<const int8_t*>(codes + r * stride));
      }
      const float* xs = input + n * kChunk;
      const int32_t* index = indices + n * kChunk;
      unrolled<kLanes>([&]<int J>() {
        F weights[R];
        for (int r = 0; r < R; r++) weights[r] = S::template pick<J>(table[r], bits[r], index + J * kLanes);
        for (int m = 0; m < M; m++) {
          const F value = S::load(xs + m * input_stride + J * kLanes);
          for (int r = 0; r < R; r++) acc[r][m][J % 2] = S::fma(weights[r], value, acc[r][m][J % 2]);
        }
      });
    });
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++)
        y[(token + m) * w.rows + row + r] =
            S::reduce(S::add(acc[r][m][0], acc[r][m][1])) + (bias ? bias[row + r] : 0.0f);
  }

  // M tokens of codes. Each weight is rounded to a whole number of units, unit = the row's largest / S::kLargest, in two
  // digits, w / unit = 2ᵇ·(high − S::kBias) + low with b = S::kLowBits: all sums are integers then.
  template <int R, int M>
  static void codes(const Codebook& w, const Activations& x, int64_t token, int64_t row, const float* tables,
                    int64_t table_stride, const float* sizes, const float* bias, float* y) {
    I low[R][M], high[R][M];
    for (int m = 0; m < M; m++) {
      const I start = S::iload(x.start + (token + m) * kLanes);
      for (int r = 0; r < R; r++) low[r][m] = S::izero(), high[r][m] = start;
    }
    F scale[R];
    for (int r = 0; r < R; r++) scale[r] = S::set1(sizes[r] > 0 ? S::kLargest / sizes[r] : 0.0f);
    const int8_t *input = x.codes + token * x.stride, *indices = static_cast<const int8_t*>(x.index);
    const int64_t input_stride = x.stride;
    chunks<R>(w, row, [&](int64_t n, const uint8_t* codes, int64_t stride) {
      typename S::Digits digits[R];
      X bits[R];
      for (int r = 0; r < R; r++) {
        digits[r] = S::digits(S::load(tables + r * table_stride + n * kLanes), scale[r]);
        bits[r] = S::load8(reinterpret_cast<const int8_t*>(codes + r * stride));
      }
      const int8_t *xs = input + n * kChunk, *index = indices + n * kChunk;
      unrolled<kChunk / 64>([&]<int K>() {
        X value[M];
        for (int m = 0; m < M; m++) value[m] = S::load8(xs + m * input_stride + 64 * K);
        for (int r = 0; r < R; r++) {
          const X at = S::template digit_index<K>(bits[r], index + 64 * K);
          const X ones = S::digit(digits[r].low, at), twos = S::digit(digits[r].high, at);
          for (int m = 0; m < M; m++) {
            low[r][m] = S::dot_low(low[r][m], ones, value[m]);
            high[r][m] = S::dot_high(high[r][m], twos, value[m]);
          }
        }
      });
    });
    const F radix = S::set1(static_cast<float>(1 << S::kLowBits));
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        const float sum = S::reduce(S::fma(radix, S::to_float(high[r][m]), S::to_float(low[r][m])));
        y[(token + m) * w.rows + row + r] = sum * (sizes[r] / S::kLargest) * x.steps[token + m] + (bias ? bias[row + r] : 0.0f);
      }
  }

  template <int R>
  static void rows(const Codebook& w, const Activations& x, const Work& work, const float* bias, float* y,
                   int64_t row) {
    const int64_t stride = work.chunks * kLanes, scale_bytes = work.blocks * kScales * (w.exponents ? 1 : 2);
    prefetch(w.codes + row * width(w), R * width(w));
    prefetch(static_cast<const uint8_t*>(w.scales) + row * scale_bytes, R * scale_bytes);
    const float* tables = work.tables.data;
    float sizes[R];
    int64_t m = 0;
    if (x.codes) {
      row_tables<R, true>(w, work, row, sizes);
      for (; m + 4 <= x.tokens; m += 4) codes<R, 4>(w, x, m, row, tables, stride, sizes, bias, y);
      for (; m < x.tokens; m++) codes<R, 1>(w, x, m, row, tables, stride, sizes, bias, y);
      return;
    }
    row_tables<R, false>(w, work, row, sizes);
    for (; m + 4 <= x.tokens; m += 4) values<R, 4>(w, x, m, row, tables, stride, bias, y);
    for (; m + 2 <= x.tokens; m += 2) values<R, 2>(w, x, m, row, tables, stride, bias, y);
    if (m < x.tokens) values<R, 1>(w, x, m, row, tables, stride, bias, y);
  }

  static void multiply(const Codebook& w, const Activations& x, const float* bias, float* y, int64_t first,
                       int64_t last) {
    if (w.block_size % kBlock) return multiply_unpacked(w, x, bias, y, first, last);
    const Work work(w);
    int64_t row = first;
    for (; row + 2 <= last; row += 2) rows<2>(w, x, work, bias, y, row);
    if (row < last) rows<1>(w, x, work, bias, y, row);
  }

  // Blocks that are no multiple of kBlock: row by row, by floats.
  static void multiply_unpacked(const Codebook& w, const Activations& x, const float* bias, float* y, int64_t first,
                                int64_t last) {
    const int64_t whole = w.columns & ~(kLanes - 1);
    const Scratch<float> dense(whole + kLanes);
    for (int64_t row = first; row < last; row++) {
      unpack(w, dense.data, row, row + 1);
      for (int64_t m = 0; m < x.tokens; m++) {
        F sum = S::zero();
        for (int64_t c = 0; c < w.columns; c += kLanes)
          sum = S::fma(S::load(dense.data + c), S::load(x.values + m * x.stride + c), sum);
        y[m * w.rows + row] = S::reduce(sum) + (bias ? bias[row] : 0.0f);
      }
    }
  }

  // In the order of columns, 16 at a time, for blocks of any multiple of 16.
  static void unpack(const Codebook& w, float* out, int64_t first, int64_t last) {
    const int64_t blocks = blocks_of(w.columns, w.block_size), padded = blocks_of(w.columns, kLanes) * kLanes;
    const Scratch<float> scales(blocks * kPadded);
    const Scratch<int32_t> index(padded);
    for (int64_t c = 0; c < w.columns; c++) index.data[c] = 4 * salient(w, c);
    for (int64_t row = first; row < last; row++, out += w.columns) {
      row_scales(w, row, blocks, scales.data);
      const uint8_t *codes = w.codes + row * width(w), *end = codes + width(w);
      for (int64_t b = 0, c = 0; b < blocks; b++) {
        const F table = S::table(scales.data + b * kPadded, scales.data + b * kPadded);
        for (const int64_t stop = smaller((b + 1) * w.block_size, w.columns); c < stop; c += kLanes) {
          uint32_t word = 0;
          if (codes + 4 <= end) std::memcpy(&word, codes, 4), codes += 4;
          else std::memcpy(&word, codes, static_cast<size_t>(end - codes));
          const F weights = S::pick16(table, word, index.data + c);
          float last_ones[kLanes];
          S::store(c + kLanes <= w.columns ? out + c : last_ones, weights);
          if (c + kLanes > w.columns)
            std::memcpy(out + c, last_ones, static_cast<size_t>(w.columns - c) * sizeof(float));
        }
      }
    }
  }
};

}  // namespace
}  // namespace bellbit
