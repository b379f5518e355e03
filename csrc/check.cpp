// Checks every instruction set against plain loops on ragged shapes; scripts/check-kernels.sh builds it with
// sanitizers, and for Arm under an emulator. Buffers have their exact size, so that reading past an end is seen.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <type_traits>
#include <vector>

#include "kernels.h"

using namespace bellbit;

namespace {

std::mt19937 rng(7);
int failures = 0, checks = 0;

float uniform() { return std::uniform_real_distribution<float>(-1, 1)(rng); }
uint8_t byte() { return static_cast<uint8_t>(rng()); }
bool bit(const uint8_t* bits, int64_t i) { return bits[i / 8] >> (i % 8) & 1; }

// A float16 in 1/64 … 4, and its value.
uint16_t random_half(double* value) {
  const uint32_t exponent = 9 + rng() % 8, mantissa = rng() % 1024;
  *value = std::ldexp(1 + mantissa / 1024.0, static_cast<int>(exponent) - 15);
  return static_cast<uint16_t>(exponent << 10 | mantissa);
}

void compare(const char* isa, const char* what, int64_t rows, int64_t columns, const float* got, const double* want,
             const double* scale, int64_t count) {
  checks++;
  for (int64_t i = 0; i < count; i++)
    if (!(std::fabs(got[i] - want[i]) <= 1e-5 * scale[i] + 1e-6)) {
      std::printf("%s %s %ld x %ld: entry %ld is %g, not %g\n", isa, what, static_cast<long>(rows),
                  static_cast<long>(columns), static_cast<long>(i), static_cast<double>(got[i]), want[i]);
      failures++;
      return;
    }
}

// Multiplies with values, and with codes of each limit, and unpacks; all against `dense`. rounding: with codes, how far
// at most the weights of each row are rounded first.
template <class W>
void check(const Kernels& k, const char* what, const W& w, const std::vector<double>& dense,
           void (*multiply)(const W&, const Activations&, const float*, float*, int64_t, int64_t),
           void (*unpack)(const W&, float*, int64_t, int64_t), bool codes_too,
           const std::vector<double>& rounding = {}) {
  const int64_t blocks = (w.columns + kBlock - 1) / kBlock, stride = blocks * kBlock;
  if (unpack) {
    std::vector<float> out(static_cast<size_t>(w.rows * w.columns));
    std::vector<double> magnitude(dense.size());
    for (size_t i = 0; i < dense.size(); i++) magnitude[i] = std::fabs(dense[i]);
    unpack(w, out.data(), 0, w.rows);
    compare(k.name, what, w.rows, w.columns, out.data(), dense.data(), magnitude.data(), w.rows * w.columns);
  }
  for (const int64_t tokens : {1, 2, 5, 7})
    for (const int limit : {0, 127, 31}) {
      const bool codes = limit && codes_too;
      const auto padded = static_cast<size_t>(tokens * stride), lanes = static_cast<size_t>(tokens * blocks * kLanes);
      std::vector<float> x(static_cast<size_t>(tokens * w.columns)), y(static_cast<size_t>(tokens * w.rows));
      std::vector<float> bias(static_cast<size_t>(w.rows)), values(codes ? 0 : padded), sums(codes ? 0 : lanes),
          steps(static_cast<size_t>(tokens));
      std::vector<int8_t> integers(codes ? padded : 0), arranged_codes;
      std::vector<int32_t> totals(codes ? lanes : 0), index, start;
      std::vector<float> arranged_values;
      for (auto& v : x) v = uniform();
      for (auto& v : bias) v = uniform();
      k.prepare(x.data(), tokens, w.columns, limit, false, codes ? nullptr : values.data(),
                codes ? nullptr : sums.data(), codes ? integers.data() : nullptr, codes ? steps.data() : nullptr,
                codes ? totals.data() : nullptr);
      Activations a{tokens,          w.columns,       stride,       values.data(), sums.data(), nullptr, nullptr,
                    steps.data(),    nullptr,         nullptr};
      if (codes) {
        a.values = a.sums = nullptr;
        a.codes = integers.data(), a.totals = totals.data();
      }
      std::vector<double> want(y.size()), scale(y.size());
      for (int64_t m = 0; m < tokens; m++)
        for (int64_t r = 0; r < w.rows; r++) {
          double sum = bias[static_cast<size_t>(r)], size = std::fabs(sum);
          for (int64_t c = 0; c < w.columns; c++) {
            const auto at = static_cast<size_t>(m * stride + c);
            const double value = codes ? integers[at] * static_cast<double>(steps[static_cast<size_t>(m)]) : values[at];
            sum += value * dense[static_cast<size_t>(r * w.columns + c)];
            size += std::fabs(value * dense[static_cast<size_t>(r * w.columns + c)]);
            if (codes && !rounding.empty()) size += 1e5 * std::fabs(value) * rounding[static_cast<size_t>(r)];
          }
          want[static_cast<size_t>(m * w.rows + r)] = sum;
          scale[static_cast<size_t>(m * w.rows + r)] = size;
        }
      if constexpr (std::is_same_v<W, Codebook>)
        if (w.block_size % kBlock == 0) {
          a.stride = (w.columns + kChunk - 1) / kChunk * kChunk;
          const auto size = static_cast<size_t>(tokens * a.stride);
          (codes ? arranged_codes.resize(size) : arranged_values.resize(size));
          index.resize(static_cast<size_t>(codes ? a.stride / 4 : a.stride)), start.resize(tokens * kLanes);
          Activations plain = a;
          plain.stride = stride;
          k.arrange(w, plain, a.stride, codes ? nullptr : arranged_values.data(), codes ? arranged_codes.data() : nullptr,
                    index.data(), start.data());
          if (codes) a.codes = arranged_codes.data();
          else a.values = arranged_values.data();
          a.index = index.data(), a.start = start.data();
        }
      multiply(w, a, bias.data(), y.data(), 0, w.rows);
      compare(k.name, what, w.rows, w.columns, y.data(), want.data(), scale.data(), tokens * w.rows);
    }
}

void check_planes(const Kernels& k, int64_t rows, int64_t columns) {
  const int64_t blocks = (columns + kBlock - 1) / kBlock, width = (columns + 7) / 8;
  const auto dense_at = [&](int64_t r, int64_t c) { return static_cast<size_t>(r * columns + c); };
  std::vector<double> dense(static_cast<size_t>(rows * columns));

  std::vector<uint8_t> signs(static_cast<size_t>(rows * (2 * blocks + width)));
  for (auto& b : signs) b = byte();
  for (int64_t r = 0; r < rows; r++)
    for (int64_t b = 0; b < blocks; b++) {
      uint8_t* at = signs.data() + r * (2 * blocks + width) + b * 18;
      double d;
      const uint16_t h = random_half(&d);
      std::memcpy(at, &h, 2);
      for (int64_t c = b * kBlock; c < std::min(columns, (b + 1) * kBlock); c++)
        dense[dense_at(r, c)] = bit(at + 2, c - b * kBlock) ? d : -d;
    }
  const Planes sign128{signs.data() + 2, 1, rows, columns, 0, 2 * blocks + width, 18, 1, Grid::kSign128,
                       nullptr, nullptr, 0, {}};
  check(k, "sign128", sign128, dense, k.planes, k.unpack_planes, true);

  for (int64_t planes = 1; planes <= 8; planes++) {
    const int64_t group = 1 + planes % 3, groups = (blocks + group - 1) / group;
    const auto group_at = [&](int64_t r, int64_t c) { return static_cast<size_t>(r * groups + c / (group * kBlock)); };
    std::vector<uint8_t> codes(static_cast<size_t>(planes * rows * width)), zeros(static_cast<size_t>(rows * groups)),
        numbers(zeros.size());
    float table[256];
    std::vector<uint16_t> scales(zeros.size());
    std::vector<float> row_scales(static_cast<size_t>(rows));
    std::vector<double> scale_values(zeros.size());
    for (auto& b : codes) b = byte();
    for (auto& n : numbers) n = byte();
    for (auto& scale : table) scale = uniform();
    for (auto& z : zeros) z = static_cast<uint8_t>(byte() % (1 << planes));
    for (size_t i = 0; i < scales.size(); i++) scales[i] = random_half(&scale_values[i]);
    for (auto& s : row_scales) s = uniform();
    const auto code = [&](int64_t r, int64_t c) {
      int value = 0;
      for (int64_t p = 0; p < planes; p++) value |= bit(codes.data() + (p * rows + r) * width, c) << p;
      return value;
    };
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++) {
        const size_t g = group_at(r, c);
        dense[dense_at(r, c)] = scale_values[g] * (code(r, c) - zeros[g]);
      }
    const Planes uniform_grid{codes.data(), planes, rows, columns, rows * width, width, 16, group, Grid::kHalves,
                              scales.data(), zeros.data(), 0, {}};
    check(k, "uniform", uniform_grid, dense, k.planes, k.unpack_planes, true);
    const float middle = static_cast<float>((1 << planes) - 1) / 2;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        dense[dense_at(r, c)] = table[numbers[group_at(r, c)]] * static_cast<double>(code(r, c) - middle);
    Planes symmetric{codes.data(), planes, rows, columns, rows * width, width, 16, group, Grid::kTable,
                     numbers.data(), nullptr, middle, {}};
    std::copy(table, table + 256, symmetric.table);
    check(k, "symmetric", symmetric, dense, k.planes, k.unpack_planes, true);
    const float half = static_cast<float>(1 << (planes - 1));
    const float zero = planes <= 2 ? half - 0.5f : half;
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        dense[dense_at(r, c)] = static_cast<double>(row_scales[static_cast<size_t>(r)]) * (code(r, c) - zero);
    const Planes by_row{codes.data(), planes, rows, columns, rows * width, width, 16, blocks, Grid::kFloats,
                        row_scales.data(), nullptr, zero, {}};
    check(k, "bellbox", by_row, dense, k.planes, k.unpack_planes, true);
  }
}

void check_codebook(const Kernels& k, int64_t rows, int64_t columns, int64_t block_size, bool exponents) {
  const int64_t blocks = (columns + block_size - 1) / block_size, width = (columns + 3) / 4;
  std::vector<uint8_t> codes(static_cast<size_t>(rows * width)), salient(static_cast<size_t>((columns + 7) / 8)),
      powers(static_cast<size_t>(rows * blocks));
  for (auto* bits : {&codes, &salient})
    for (auto& b : *bits) b = byte();
  std::vector<uint16_t> halves(static_cast<size_t>(rows * blocks * 7));
  std::vector<int8_t> integers(halves.size());
  std::vector<double> scales(halves.size()), dense(static_cast<size_t>(rows * columns));
  std::vector<double> rounding(static_cast<size_t>(rows));  // half of the largest table entry / 16255
  for (auto& p : powers) p = static_cast<uint8_t>(120 + rng() % 12);
  for (size_t i = 0; i < scales.size(); i++) {
    halves[i] = random_half(&scales[i]);
    integers[i] = static_cast<int8_t>(rng() % 255 - 127);
    if (exponents) scales[i] = std::ldexp(integers[i], powers[i / 7] - 127 - 6);
  }
  for (int64_t r = 0; r < rows; r++)
    for (int64_t c = 0; c < columns; c++) {
      const double* s = scales.data() + (r * blocks + c / block_size) * 7;
      const uint8_t* row = codes.data() + r * width;
      const int one = bit(row, 2 * c) ? 1 : -1, two = bit(row, 2 * c + 1) ? 1 : -1;
      dense[static_cast<size_t>(r * columns + c)] = bit(salient.data(), c) ? s[4] + one * s[5] + two * s[6]
                                                    : two > 0              ? s[2] + one * s[3]
                                                                           : s[0] + one * s[1];
    }
  for (int64_t i = 0; i < rows * blocks; i++) {
    const double* s = scales.data() + 7 * i;
    const double largest = std::max({std::fabs(s[0]) + std::fabs(s[1]), std::fabs(s[2]) + std::fabs(s[3]),
                                     std::fabs(s[4]) + std::fabs(s[5]) + std::fabs(s[6])});
    double& row = rounding[static_cast<size_t>(i / blocks)];
    row = std::max(row, 0.5 * largest / 16255);
  }
  const Codebook w{codes.data(), salient.data(), rows, columns, block_size,
                   exponents ? static_cast<const void*>(integers.data()) : halves.data(),
                   exponents ? powers.data() : nullptr};
  check(k, "codebook2", w, dense, k.codebook, k.unpack_codebook, block_size % kBlock == 0, rounding);
}

void check_dense(const Kernels& k, int64_t rows, int64_t columns) {
  std::vector<uint16_t> values(static_cast<size_t>(rows * columns));
  std::vector<double> dense(values.size());
  for (size_t i = 0; i < values.size(); i++) values[i] = random_half(&dense[i]);
  check(k, "float16", Dense{values.data(), rows, columns, false}, dense, k.dense, {}, false);
  for (size_t i = 0; i < values.size(); i++) {
    const float value = uniform();
    uint32_t word;
    std::memcpy(&word, &value, 4);
    values[i] = static_cast<uint16_t>(word >> 16);
    word &= 0xFFFF0000;
    float kept;
    std::memcpy(&kept, &word, 4);
    dense[i] = kept;
  }
  check(k, "bfloat16", Dense{values.data(), rows, columns, true}, dense, k.dense, {}, false);
}

void check_training(const Kernels& k, int64_t rows, int64_t columns, int width, bool bfloat) {
  const size_t count = static_cast<size_t>(rows * columns);
  std::vector<float> latents(count), scales(static_cast<size_t>(rows * ((columns + kBlock - 1) / kBlock)));
  for (auto& v : latents) v = 4 * uniform();
  for (auto& v : scales) v = bfloat ? 0.25f : 1.5f + uniform();  // products of a power of two are not rounded
  const Latents w{latents.data(), scales.data(), rows, columns, kBlock, width};
  std::vector<float> floats(count), upstream(count), to_latents(count), to_scales(scales.size());
  std::vector<uint16_t> halves(count), upstream_halves(count);
  std::vector<double> want(count), want_latents(count), want_scales(scales.size()), sizes(count, 1.0);
  const double top = 1 << (width - 1);
  for (size_t i = 0; i < count; i++) {
    const size_t row = i / static_cast<size_t>(columns), column = i % static_cast<size_t>(columns);
    const size_t group = row * scales.size() / static_cast<size_t>(rows) + column / kBlock;
    const double level = std::min(std::max(std::floor(static_cast<double>(latents[i])), -top), top - 1) + 0.5;
    upstream[i] = static_cast<float>(static_cast<int>(byte()) - 128);  // exact in bfloat16
    uint32_t bits;
    std::memcpy(&bits, &upstream[i], sizeof bits);
    upstream_halves[i] = static_cast<uint16_t>(bits >> 16);
    want[i] = level * static_cast<double>(scales[group]);
    want_latents[i] = static_cast<double>(scales[group] * upstream[i]);
    want_scales[group] += level * static_cast<double>(upstream[i]);
  }
  k.weights_of(w, bfloat, bfloat ? static_cast<void*>(halves.data()) : floats.data(), 0, rows);
  for (size_t i = 0; bfloat && i < count; i++) {
    const uint32_t bits = static_cast<uint32_t>(halves[i]) << 16;
    std::memcpy(&floats[i], &bits, sizeof bits);
  }
  compare(k.name, "weights in training", rows, columns, floats.data(), want.data(), sizes.data(), rows * columns);
  sizes.assign(count, 1e4);
  if (bfloat)
    k.derivatives_of(w, true, halves.data(), upstream_halves.data(), nullptr, to_scales.data(), 0, rows);
  else
    k.derivatives_of(w, false, floats.data(), upstream.data(), to_latents.data(), to_scales.data(), 0, rows);
  compare(k.name, "scales in training", rows, columns, to_scales.data(), want_scales.data(), sizes.data(),
          static_cast<int64_t>(scales.size()));
  if (!bfloat)
    compare(k.name, "latents in training", rows, columns, to_latents.data(), want_latents.data(), sizes.data(),
            rows * columns);
}

void check_divergence(const Kernels& k, int64_t rows, int64_t columns) {
  const size_t count = static_cast<size_t>(rows * columns);
  std::vector<float> teacher(count), student(count), found(static_cast<size_t>(rows));
  std::vector<double> want(found.size()), want_slope(count), ones(count, 1.0);
  for (auto* logits : {&teacher, &student})
    for (auto& v : *logits) v = 100 * uniform();  // some so low that their share is nothing
  for (size_t row = 0; row < want.size(); row++) {
    double sums[2] = {};
    const auto at = [&](const std::vector<float>& logits, int64_t c) {
      return static_cast<double>(logits[row * static_cast<size_t>(columns) + static_cast<size_t>(c)]);
    };
    for (int64_t c = 0; c < columns; c++) sums[0] += std::exp(at(teacher, c)), sums[1] += std::exp(at(student, c));
    for (int64_t c = 0; c < columns; c++) {
      const double p = at(teacher, c) - std::log(sums[0]), q = at(student, c) - std::log(sums[1]);
      want[row] += std::exp(p) * (p - q);
      want_slope[row * static_cast<size_t>(columns) + static_cast<size_t>(c)] = std::exp(q) - std::exp(p);
    }
  }
  std::vector<double> sizes(want.size(), 100.0);
  k.divergences_of(teacher.data(), student.data(), columns, true, found.data(), 0, rows);
  compare(k.name, "divergence", rows, columns, found.data(), want.data(), sizes.data(), rows);
  compare(k.name, "slope of the divergence", rows, columns, student.data(), want_slope.data(), ones.data(), rows * columns);
}

void check_hadamard(const Kernels& k, int64_t columns) {
  std::vector<float> x(static_cast<size_t>(2 * columns)), once;
  for (auto& v : x) v = uniform();
  std::vector<double> want(x.begin(), x.end()), scale(x.size(), 1.0);
  once = x;
  k.hadamard(once.data(), 2, columns);
  double before = 0, after = 0;
  for (size_t i = 0; i < x.size(); i++) before += x[i] * x[i], after += once[i] * once[i];
  k.hadamard(once.data(), 2, columns);  // its own inverse, and keeps lengths
  compare(k.name, "hadamard", 2, columns, once.data(), want.data(), scale.data(), 2 * columns);
  if (std::fabs(before - after) > 1e-4 * before) failures++, std::printf("%s hadamard changes lengths\n", k.name);
}

void check_attention(const Kernels& k, int64_t length, int64_t size) {
  std::vector<float> q(static_cast<size_t>(size)), keys(static_cast<size_t>(length * size)), values(keys.size());
  for (auto* numbers : {&q, &keys, &values})
    for (auto& v : *numbers) v = uniform();
  std::vector<double> weights(static_cast<size_t>(length)), want(q.size()), ones(keys.size(), 1.0);
  double total = 0;
  for (int64_t t = 0; t < length; t++) {
    double sum = 0;
    for (int64_t i = 0; i < size; i++) sum += q[static_cast<size_t>(i)] * keys[static_cast<size_t>(t * size + i)];
    const float found = k.dot(q.data(), keys.data() + t * size, size);
    compare(k.name, "dot", 1, size, &found, &sum, ones.data(), 1);
    total += weights[static_cast<size_t>(t)] = std::exp(0.5 * sum);
  }
  for (int64_t t = 0; t < length; t++)
    for (int64_t i = 0; i < size; i++)
      want[static_cast<size_t>(i)] += weights[static_cast<size_t>(t)] / total * values[static_cast<size_t>(t * size + i)];
  std::vector<float> scores(weights.size()), out(q.size());
  k.attend(q.data(), keys.data(), values.data(), length, size, 0.5f, scores.data(), out.data());
  compare(k.name, "attend", length, size, out.data(), want.data(), ones.data(), size);
}

void check_widen(const Kernels& k, int64_t columns) {
  std::vector<uint16_t> values(static_cast<size_t>(columns));
  std::vector<double> want(values.size());
  std::vector<float> out(values.size());
  for (size_t i = 0; i < values.size(); i++) values[i] = random_half(&want[i]);
  k.widen(Dense{values.data(), 1, columns, false}, out.data());
  compare(k.name, "widen", 1, columns, out.data(), want.data(), want.data(), columns);
}

}  // namespace

int main() {
  const Kernels* const* list;
  const int count = available(&list);
  for (int i = 0; i < count; i++) {
    checks = 0;
    for (const int64_t columns : {1, 7, 17, 31, 33, 64, 100, 128, 129, 300, 576}) {
      for (const int64_t rows : {1, 5}) {
        check_planes(*list[i], rows, columns);
        for (const int64_t block : {32, 96, 128, 256, 384})
          for (const bool exponents : {false, true}) check_codebook(*list[i], rows, columns, block, exponents);
        check_dense(*list[i], rows, columns);
        for (const int width : {1, 2, 4})
          for (const bool bfloat : {false, true}) check_training(*list[i], rows, columns, width, bfloat);
        check_divergence(*list[i], rows, columns);
      }
      check_hadamard(*list[i], columns);
      check_widen(*list[i], columns);
      for (const int64_t length : {1, 13}) check_attention(*list[i], length, columns);
    }
    std::printf("%s: %d checks, %d failures so far\n", list[i]->name, checks, failures);
  }
  return failures != 0;
}
