// Linear layers over packed or 16-bit weights: round the input, share the rows among threads.
#pragma once

#include <variant>

#include "kernels.h"

namespace bellbit {

// The input of a linear layer and how it is rounded: to codes of −limit … limit, or not at all if limit is 0.
struct Input {
  const float* x;
  int64_t tokens;
  int limit;
  bool shared;  // one step for all tokens
};

using Weight = std::variant<Planes, Codebook, Dense>;

inline int64_t rows_of(const Weight& weight) {
  return std::visit([](const auto& w) { return w.rows; }, weight);
}

inline int64_t columns_of(const Weight& weight) {
  return std::visit([](const auto& w) { return w.columns; }, weight);
}

// y (tokens, rows) = x̂·Ŵᵀ + bias; bias may be null.
void multiply(const Weight& weight, const Input& input, const float* bias, float* y, int threads);

// Rows first … last as floats, (last − first, columns). Not for Dense.
void unpack(const Weight& weight, float* out, int64_t first, int64_t last, int threads);

// x (tokens, columns) times the normalized blockwise Hadamard matrix, in place.
void rotate(float* x, int64_t tokens, int64_t columns, int threads);

// Weights in training and their derivatives, see Kernels.
void weights_of(const Latents& latents, bool bfloat, void* out, int threads);
void derivatives_of(const Latents& latents, bool bfloat, const void* weights, const void* gradient, float* to_latents,
                    float* to_scales, int threads);

// KL(teacher ‖ student) of all rows of logits and its derivative, see Kernels.
void divergences_of(float* teacher, float* student, int64_t rows, int64_t columns, bool slope, float* out, int threads);

}  // namespace bellbit
