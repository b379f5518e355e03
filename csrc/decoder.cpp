#include "decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <stdexcept>

#include "threads.h"

namespace bellbit {
namespace {

void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* out) {
  float square = chosen().dot(x, x, count);
  const float factor = 1 / std::sqrt(square / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; i++) out[i] = weight[i] * (x[i] * factor);
}

void apply(const Layer& layer, const float* x, std::vector<float>& y, int threads) {
  y.resize(static_cast<size_t>(rows_of(layer.weight)));
  multiply(layer.weight, {x, 1, layer.limit, layer.shared}, layer.bias, y.data(), threads);
}

Zeros zeros(size_t count) {
  Zeros made(static_cast<float*>(std::calloc(count, sizeof(float))), &std::free);
  if (!made) throw std::bad_alloc();
  return made;
}

}  // namespace

void Decoder::add(const Block& block) {
  blocks_.push_back(block);
  const auto count = static_cast<size_t>(key_heads_ * capacity_ * head_size_);
  keys_.push_back(zeros(count));
  values_.push_back(zeros(count));
}

void Decoder::set_cache(int64_t block, const float* keys, const float* values, int64_t length) {
  if (block < 0 || block >= static_cast<int64_t>(blocks_.size()) || length < 0 || length > capacity_)
    throw std::out_of_range("no such block, or more positions than the cache holds");
  for (int64_t h = 0; h < key_heads_; h++) {
    const auto count = static_cast<size_t>(length * head_size_) * sizeof(float);
    std::memcpy(keys_[static_cast<size_t>(block)].get() + h * capacity_ * head_size_, keys + h * length * head_size_,
                count);
    std::memcpy(values_[static_cast<size_t>(block)].get() + h * capacity_ * head_size_,
                values + h * length * head_size_, count);
  }
}

void Decoder::rotate(float* heads, int64_t count, const float* norm, int64_t position) const {
  const float *cosines = cosines_ + position * head_size_, *sines = sines_ + position * head_size_;
  const int64_t half = head_size_ / 2;
  for (int64_t h = 0; h < count; h++, heads += head_size_) {
    if (norm) rms_norm(heads, norm, epsilon_, head_size_, heads);
    for (int64_t i = 0; i < half; i++) {
      const float a = heads[i], b = heads[i + half];
      heads[i] = a * cosines[i] - b * sines[i];
      heads[i + half] = b * cosines[i + half] + a * sines[i + half];
    }
  }
}

void Decoder::attend(size_t block, int64_t position, int threads) {
  const int64_t length = position + 1, group = heads_ / key_heads_;
  scores_.resize(static_cast<size_t>(heads_ * length));
  const float *keys = keys_[block].get(), *values = values_[block].get();
  const int64_t grain = std::max<int64_t>(1, (1 << 15) / (length * head_size_));  // some 5 µs of work
  parallel_for(heads_, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t h = first; h < last; h++) {
      const int64_t offset = h / group * capacity_ * head_size_;
      chosen().attend(q_.data() + h * head_size_, keys + offset, values + offset, length, head_size_, scale_,
                      scores_.data() + h * length, mixed_.data() + h * head_size_);
    }
  });
}

void Decoder::step(int64_t token, int64_t position, float* logits, int threads) {
  const int64_t width = embedding_.columns;
  if (token < 0 || token >= embedding_.rows || position < 0 || position >= capacity_)
    throw std::out_of_range("no such token, or a position beyond the cache");
  hidden_.resize(static_cast<size_t>(width));
  normed_.resize(static_cast<size_t>(width));
  mixed_.resize(static_cast<size_t>(heads_ * head_size_));
  const Dense row{embedding_.values + token * width, 1, width, embedding_.bfloat};
  chosen().widen(row, hidden_.data());
  for (size_t i = 0; i < blocks_.size(); i++) {
    const Block& block = blocks_[i];
    rms_norm(hidden_.data(), block.input_norm, epsilon_, width, normed_.data());
    apply(block.q, normed_.data(), q_, threads);
    apply(block.k, normed_.data(), k_, threads);
    apply(block.v, normed_.data(), v_, threads);
    rotate(q_.data(), heads_, block.q_norm, position);
    rotate(k_.data(), key_heads_, block.k_norm, position);
    for (int64_t h = 0; h < key_heads_; h++) {
      const int64_t at = (h * capacity_ + position) * head_size_;
      const auto bytes = static_cast<size_t>(head_size_) * sizeof(float);
      std::memcpy(keys_[i].get() + at, k_.data() + h * head_size_, bytes);
      std::memcpy(values_[i].get() + at, v_.data() + h * head_size_, bytes);
    }
    attend(i, position, threads);
    apply(block.o, mixed_.data(), normed_, threads);
    for (size_t c = 0; c < hidden_.size(); c++) hidden_[c] += normed_[c];
    rms_norm(hidden_.data(), block.post_norm, epsilon_, width, normed_.data());
    apply(block.gate, normed_.data(), gate_, threads);
    apply(block.up, normed_.data(), up_, threads);
    for (size_t c = 0; c < gate_.size(); c++) up_[c] *= gate_[c] / (1 + std::exp(-gate_[c]));  // SiLU
    apply(block.down, up_.data(), normed_, threads);
    for (size_t c = 0; c < hidden_.size(); c++) hidden_[c] += normed_[c];
  }
  rms_norm(hidden_.data(), norm_, epsilon_, width, normed_.data());
  multiply(head_.weight, {normed_.data(), 1, head_.limit, head_.shared}, head_.bias, logits, threads);
}

}  // namespace bellbit
