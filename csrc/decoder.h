// One token at a time through a whole decoder of the LLaMA kind (LLaMA, Mistral, Qwen2, Qwen3): what a framework spends on
// hundreds of small operations a token is longer than the products with packed weights themselves.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#include "linear.h"

namespace bellbit {

struct Layer {
  Weight weight;
  const float* bias;  // may be null
  int limit;          // as in Input
  bool shared;
};

struct Block {
  const float *input_norm, *post_norm;  // (hidden)
  const float *q_norm, *k_norm;         // (head size), or null
  Layer q, k, v, o, gate, up, down;
};

// An array whose pages take no memory before they are written to.
using Zeros = std::unique_ptr<float[], decltype(&std::free)>;

class Decoder {
 public:
  // cosines, sines: (capacity, head size), as the model's rotary embedding gives them.
  Decoder(int64_t heads, int64_t key_heads, int64_t head_size, float epsilon, float scale, int64_t capacity,
          const float* cosines, const float* sines, Dense embedding, const float* norm, Layer head)
      : heads_(heads), key_heads_(key_heads), head_size_(head_size), capacity_(capacity), epsilon_(epsilon),
        scale_(scale), cosines_(cosines), sines_(sines), embedding_(embedding), norm_(norm), head_(head) {}

  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  void add(const Block& block);

  // Takes over what another run has computed for positions 0 … length − 1 of one block: (key heads, length, head size).
  void set_cache(int64_t block, const float* keys, const float* values, int64_t length);

  // Logits (vocabulary) for the token at `position`, which must be below the capacity.
  void step(int64_t token, int64_t position, float* logits, int threads);

 private:
  void attend(std::size_t block, int64_t position, int threads);
  void rotate(float* heads, int64_t count, const float* norm, int64_t position) const;

  int64_t heads_, key_heads_, head_size_, capacity_;
  float epsilon_, scale_;
  const float *cosines_, *sines_;
  Dense embedding_;
  const float* norm_;
  Layer head_;
  std::vector<Block> blocks_;
  std::vector<Zeros> keys_, values_;  // per block: (key heads, capacity, head size)
  std::vector<float> hidden_, normed_, q_, k_, v_, mixed_, gate_, up_, scores_;
};

}  // namespace bellbit
