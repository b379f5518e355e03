// What the headers of kernels share. Everything in them has internal linkage and no template of the standard library is
// instantiated: the linker keeps one copy of an inline function, and it might be the one compiled for AVX-512.
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

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// An element of stored numbers, which need not be aligned: files decide where tensors lie.
template <class T>
T element(const T* numbers, int64_t i) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(numbers) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

// Asks for memory that will be read soon: kernels read several rows in turn, too many streams for the hardware to see.
void prefetch(const void* row, int64_t bytes) {
  constexpr uintptr_t kAhead = 6144, kLine = 64;
  const uintptr_t start = reinterpret_cast<uintptr_t>(row) + kAhead;
  for (uintptr_t at = start; at < start + static_cast<uintptr_t>(bytes); at += kLine)
    __builtin_prefetch(reinterpret_cast<const void*>(at));
}

// Zeros that live as long as a call, on whole cache lines.
template <class T>
struct Scratch {
  explicit Scratch(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) & ~size_t{63};
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) std::abort();  // some kilobytes: nothing would go on
    std::memset(data, 0, bytes);
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* data;
};

// take<0>() … take<N − 1>(): shifts want constants.
template <int N, class Take>
[[gnu::always_inline]] inline void unrolled(Take&& take) {
  if constexpr (N > 0) {
    unrolled<N - 1>(take);
    take.template operator()<N - 1>();
  }
}

}  // namespace
}  // namespace bellbit
