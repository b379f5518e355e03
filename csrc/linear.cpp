#include "linear.h"

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace bellbit {
namespace {

// A vector on whole cache lines: kernels read 64 bytes at a time, and a load from two lines takes twice as long.
template <class T>
struct LineAllocator {
  using value_type = T;
  LineAllocator() = default;
  template <class U>
  LineAllocator(const LineAllocator<U>&) {}
  T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), kLine)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kLine); }
  bool operator==(const LineAllocator&) const = default;
  static constexpr std::align_val_t kLine{64};
};
template <class T>
using Lines = std::vector<T, LineAllocator<T>>;

// Rows of a piece of work: some 10 µs of it, in fours, because kernels take rows together.
int64_t grain(int64_t columns) { return std::max<int64_t>(4, (1 << 17) / std::max<int64_t>(columns, 1) / 4 * 4); }

template <class W>
auto kernel_of(const W&) {
  if constexpr (std::is_same_v<W, Planes>) return chosen().planes;
  else if constexpr (std::is_same_v<W, Codebook>) return chosen().codebook;
  else return chosen().dense;
}

bool takes_codes(const Planes&) { return true; }
bool takes_codes(const Codebook& w) { return w.block_size % kBlock == 0; }
bool takes_codes(const Dense&) { return false; }

void arrange(const Codebook& w, Activations& x) {
  thread_local Lines<float> values;
  thread_local Lines<int8_t> codes;
  thread_local Lines<int32_t> index, start;
  const int64_t stride = (w.columns + kChunk - 1) / kChunk * kChunk;
  const auto padded = static_cast<size_t>(x.tokens * stride);
  index.resize(static_cast<size_t>(stride)), start.resize(static_cast<size_t>(x.tokens * kLanes));
  if (x.codes) codes.resize(padded);
  else values.resize(padded);
  chosen().arrange(w, x, stride, x.codes ? nullptr : values.data(), x.codes ? codes.data() : nullptr, index.data(),
                   start.data());
  if (x.codes) x.codes = codes.data();
  else x.values = values.data();
  x.stride = stride, x.index = index.data(), x.start = start.data();
}

template <class W>
void run(const W& w, const Input& in, const float* bias, float* y, int threads) {
  const bool codes = in.limit > 0 && takes_codes(w);
  const int64_t blocks = (w.columns + kBlock - 1) / kBlock, stride = blocks * kBlock;
  const auto tokens = static_cast<size_t>(in.tokens), padded = tokens * static_cast<size_t>(stride);
  const size_t lanes = tokens * static_cast<size_t>(blocks * kLanes);
  thread_local Lines<float> values, sums, steps;
  thread_local Lines<int8_t> integers;
  thread_local Lines<int32_t> totals;
  Activations x{in.tokens, w.columns, stride, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (codes) {
    integers.resize(padded), totals.resize(lanes), steps.resize(tokens);
    chosen().prepare(in.x, in.tokens, w.columns, in.limit, in.shared, nullptr, nullptr, integers.data(), steps.data(),
                     totals.data());
    x.codes = integers.data(), x.totals = totals.data(), x.steps = steps.data();
  } else {
    values.resize(padded), sums.resize(lanes);
    chosen().prepare(in.x, in.tokens, w.columns, in.limit, in.shared, values.data(), sums.data(), nullptr, nullptr,
                     nullptr);
    x.values = values.data(), x.sums = sums.data();
  }
  if constexpr (std::is_same_v<W, Codebook>)
    if (w.block_size % kBlock == 0) arrange(w, x);
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

void rotate(float* x, int64_t tokens, int64_t columns, int threads) {
  struct Call {
    float* x;
    int64_t columns;
  } const call{x, columns};
  parallel_for(
      tokens, grain(columns), threads,
      [](const void* context, int64_t first, int64_t last) {
        const Call& c = *static_cast<const Call*>(context);
        chosen().hadamard(c.x + first * c.columns, last - first, c.columns);
      },
      &call);
}

void weights_of(const Latents& latents, bool bfloat, void* out, int threads) {
  struct Call {
    const Latents& latents;
    bool bfloat;
    void* out;
  } const call{latents, bfloat, out};
  parallel_for(
      latents.rows, grain(latents.columns), threads,
      [](const void* context, int64_t first, int64_t last) {
        const Call& c = *static_cast<const Call*>(context);
        chosen().weights_of(c.latents, c.bfloat, c.out, first, last);
      },
      &call);
}

void derivatives_of(const Latents& latents, bool bfloat, const void* weights, const void* gradient, float* to_latents,
                    float* to_scales, int threads) {
  struct Call {
    const Latents& latents;
    bool bfloat;
    const void *weights, *gradient;
    float *to_latents, *to_scales;
  } const call{latents, bfloat, weights, gradient, to_latents, to_scales};
  parallel_for(
      latents.rows, grain(latents.columns), threads,
      [](const void* context, int64_t first, int64_t last) {
        const Call& c = *static_cast<const Call*>(context);
        chosen().derivatives_of(c.latents, c.bfloat, c.weights, c.gradient, c.to_latents, c.to_scales, first, last);
      },
      &call);
}

}  // namespace bellbit
