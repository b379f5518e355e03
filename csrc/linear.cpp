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
  const auto kernel = kernel_of(w);
  parallel_for(w.rows, grain(w.columns), threads,
               [&](int64_t first, int64_t last) { kernel(w, x, bias, y, first, last); });
}

template <class W>
void unpack_rows(void (*kernel)(const W&, float*, int64_t, int64_t), const W& w, float* out, int64_t first,
                 int64_t last, int threads) {
  parallel_for(last - first, grain(w.columns), threads, [&](int64_t begin, int64_t end) {
    kernel(w, out + begin * w.columns, first + begin, first + end);
  });
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
  parallel_for(tokens, grain(columns), threads, [&](int64_t first, int64_t last) {
    chosen().hadamard(x + first * columns, last - first, columns);
  });
}

void weights_of(const Latents& latents, bool bfloat, void* out, int threads) {
  parallel_for(latents.rows, grain(latents.columns), threads,
               [&](int64_t first, int64_t last) { chosen().weights_of(latents, bfloat, out, first, last); });
}

void derivatives_of(const Latents& latents, bool bfloat, const void* weights, const void* gradient, float* to_latents,
                    float* to_scales, int threads) {
  parallel_for(latents.rows, grain(latents.columns), threads, [&](int64_t first, int64_t last) {
    chosen().derivatives_of(latents, bfloat, weights, gradient, to_latents, to_scales, first, last);
  });
}

void divergences_of(float* teacher, float* student, int64_t rows, int64_t columns, bool slope, float* out,
                    int threads) {
  parallel_for(rows, grain(columns), threads, [&](int64_t first, int64_t last) {
    chosen().divergences_of(teacher, student, columns, slope, out, first, last);
  });
}

}  // namespace bellbit
