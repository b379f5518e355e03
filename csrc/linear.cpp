#include "linear.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace bellbit {
namespace {

// Rows of a piece of work: some 10 µs of it, in fours, because kernels take rows together.
int64_t grain(int64_t columns) { return std::max<int64_t>(4, (1 << 17) / std::max<int64_t>(columns, 1) / 4 * 4); }

template <class W>
auto kernel_of(const W&) {
  if constexpr (std::is_same_v<W, Planes>) return chosen().planes;
  else if constexpr (std::is_same_v<W, Codebook>) return chosen().codebook;
  else return chosen().dense;
}

bool takes_codes(const Planes&) { return true; }
bool takes_codes(const Codebook& w) { return w.block_size == kBlock; }
bool takes_codes(const Dense&) { return false; }

template <class W>
void run(const W& w, const Input& in, const float* bias, float* y, int threads) {
  const bool codes = in.limit > 0 && takes_codes(w);
  const int64_t blocks = (w.columns + kBlock - 1) / kBlock, stride = blocks * kBlock;
  const auto padded = static_cast<size_t>(in.tokens * stride), lanes = static_cast<size_t>(in.tokens * blocks * kLanes);
  thread_local std::vector<float> values, sums, steps;
  thread_local std::vector<int8_t> integers, salient;
  thread_local std::vector<int32_t> totals, salient_totals;
  Activations x{in.tokens, w.columns, stride, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (codes) {
    integers.resize(padded), totals.resize(lanes), steps.resize(static_cast<size_t>(in.tokens));
    chosen().prepare(in.x, in.tokens, w.columns, in.limit, in.shared, nullptr, nullptr, integers.data(), steps.data(),
                     totals.data());
    x.codes = integers.data(), x.totals = totals.data(), x.steps = steps.data();
    if constexpr (std::is_same_v<W, Codebook>) {
      salient.resize(padded), salient_totals.resize(lanes);
      chosen().split(w, x, integers.data(), totals.data(), salient.data(), salient_totals.data());
      x.salient = salient.data(), x.salient_totals = salient_totals.data();
    }
  } else {
    values.resize(padded), sums.resize(lanes);
    chosen().prepare(in.x, in.tokens, w.columns, in.limit, in.shared, values.data(), sums.data(), nullptr, nullptr,
                     nullptr);
    x.values = values.data(), x.sums = sums.data();
  }
  struct Call {
    decltype(kernel_of(w)) kernel;
    const W& weight;
    const Activations& input;
    const float* offset;
    float* output;
  } const call{kernel_of(w), w, x, bias, y};
  parallel_for(
      w.rows, grain(w.columns), threads,
      [](const void* context, int64_t first, int64_t last) {
        const Call& c = *static_cast<const Call*>(context);
        c.kernel(c.weight, c.input, c.offset, c.output, first, last);
      },
      &call);
}

template <class W>
void unpack_rows(void (*kernel)(const W&, float*, int64_t, int64_t), const W& w, float* out, int64_t first,
                 int64_t last, int threads) {
  struct Call {
    decltype(kernel) function;
    const W& weight;
    float* output;
    int64_t offset;
  } const call{kernel, w, out, first};
  parallel_for(
      last - first, grain(w.columns), threads,
      [](const void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.function(c.weight, c.output + begin * c.weight.columns, c.offset + begin, c.offset + end);
      },
      &call);
}

}  // namespace

void multiply(const Weight& weight, const Input& input, const float* bias, float* y, int threads) {
  std::visit([&](const auto& w) { run(w, input, bias, y, threads); }, weight);
}

void unpack(const Weight& weight, float* out, int64_t first, int64_t last, int threads) {
  if (const auto* planes = std::get_if<Planes>(&weight))
    unpack_rows(chosen().unpack_planes, *planes, out, first, last, threads);
  else if (const auto* codebook = std::get_if<Codebook>(&weight))
    unpack_rows(chosen().unpack_codebook, *codebook, out, first, last, threads);
}

}  // namespace bellbit
