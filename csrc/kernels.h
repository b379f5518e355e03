// Kernels for packed weights: raw pointers in, raw pointers out. docs/format.md gives the layouts byte for byte.
#pragma once

#include <cstdint>

namespace bellbit {

constexpr int64_t kBlock = 128;  // columns that activations are padded to, and that scales of `Planes` cover multiples of
constexpr int64_t kChunk = 256;  // columns that arranged activations are padded to
constexpr int64_t kLanes = 16;   // floats that the kernels handle together

// Where a grid's scale and zero point come from.
enum class Grid : int {
  kSign128,  // ±d: a float16 d in front of the 16 bytes of each block
  kHalves,   // float16 scales and, unless there is one for all, uint8 zero points, (rows, groups)
  kTable,    // uint8 numbers of scales in a table, (rows, groups), one zero point for all
  kFloats,   // float32 scales, (rows, groups), one zero point for all
};

// Codes as bit planes on a grid per row and group of blocks: w = scale · (code − zero).
struct Planes {
  const uint8_t* bits;  // first byte of plane 0, row 0, block 0
  int64_t planes, rows, columns;
  int64_t plane_stride, row_stride, block_stride;  // bytes; a block is 16 bytes of bits, the last may be shorter
  int64_t group;         // blocks that share a scale; of kSign128 1
  Grid grid;
  const void* scales;    // kSign128: unused
  const uint8_t* zeros;  // kHalves; null where `zero` serves
  float zero;            // all but kSign128
  float table[256];      // kTable

  int64_t groups() const { return (columns + group * kBlock - 1) / (group * kBlock); }
};

// Two bits into one of two 4-entry tables per row and block (layout codebook2).
struct Codebook {
  const uint8_t *codes, *salient;     // (rows, columns / 4), (columns / 8), both rounded up
  int64_t rows, columns, block_size;  // block_size: a multiple of 16
  const void* scales;                 // float16, or int8 where `exponents` is given; (rows, blocks, 7)
  const uint8_t* exponents;
};

// A dense matrix in 16 bits.
struct Dense {
  const uint16_t* values;
  int64_t rows, columns;
  bool bfloat;  // else float16
};

// Weights in training on the symmetric grid: scale · ℓ, ℓ the level nearest to a latent (see core/grid.py).
struct Latents {
  const float *latents, *scales;  // (rows, columns), (rows, groups())
  int64_t rows, columns, group;   // group: columns that a scale covers
  int width;                      // bits

  int64_t groups() const { return (columns + group - 1) / group; }
};

// Activations made ready for a kernel, in rows padded with zeros to a multiple of kBlock: values, or codes.
// Sums are kLanes numbers per token and block that add up to the sum of the block.
struct Activations {
  int64_t tokens, columns, stride;  // stride: padded columns
  const float *values, *sums;       // (tokens, stride), (tokens, blocks, kLanes); null if codes are used
  const int8_t* codes;              // (tokens, stride); null if values are used
  const int32_t* totals;            // (tokens, blocks, kLanes): sums of codes
  const float* steps;               // (tokens): x = code · step
  // For `codebook`, if its blocks are multiples of kBlock, values and codes are in the order that csrc/codebook.h tells,
  // in rows padded to a multiple of kChunk, and come with
  const void* index;     // (stride), int32 for values, int8 for codes: what table entries depend on besides codes
  const int32_t* start;  // (tokens, kLanes): what sums of codes start with
};

// One instruction set's kernels. Rows first … last of the weight; y is (tokens, rows of the weight).
struct Kernels {
  const char* name;
  void (*planes)(const Planes&, const Activations&, const float* bias, float* y, int64_t first, int64_t last);
  // Codes can only be used if blocks are multiples of kBlock columns.
  void (*codebook)(const Codebook&, const Activations&, const float* bias, float* y, int64_t first, int64_t last);
  void (*dense)(const Dense&, const Activations&, const float* bias, float* y, int64_t first, int64_t last);
  // Float weights of rows first … last into out (last − first, columns).
  void (*unpack_planes)(const Planes&, float* out, int64_t first, int64_t last);
  void (*unpack_codebook)(const Codebook&, float* out, int64_t first, int64_t last);
  // Arranges values or codes, whichever is not null, for `codebook`, and gives what comes with them.
  void (*arrange)(const Codebook&, const Activations&, int64_t stride, float* values, int8_t* codes, void* index,
                  int32_t* start);
  // The floats of a 16-bit matrix of one row.
  void (*widen)(const Dense&, float* out);
  float (*dot)(const float* a, const float* b, int64_t count);
  // One query (size) over keys and values (length, size): softmax(scale·q·Kᵀ)·V. scores: (length), scratch.
  void (*attend)(const float* q, const float* keys, const float* values, int64_t length, int64_t size, float scale,
                 float* scores, float* out);
  // x (tokens, columns) times the normalized blockwise Hadamard matrix, in place.
  void (*hadamard)(float* x, int64_t tokens, int64_t columns);
  // x (tokens, columns) to values or codes as in Activations, whichever is not null. limit: largest code, 127 or 31;
  // 0 keeps x as it is. shared: one step for all tokens.
  void (*prepare)(const float* x, int64_t tokens, int64_t columns, int limit, bool shared, float* values, float* sums,
                  int8_t* codes, float* steps, int32_t* totals);
  // Weights of rows first … last into out (rows, columns), bfloat16 or float32.
  void (*weights_of)(const Latents&, bool bfloat, void* out, int64_t first, int64_t last);
  // From ∂/∂weight, and the weights, in the type of both: ∂/∂latents = scale · ∂/∂weight (not if null), and
  // ∂/∂scales = Σ ∂/∂weight · weight / scale.
  void (*derivatives_of)(const Latents&, bool bfloat, const void* weights, const void* gradient, float* latents,
                         float* scales, int64_t first, int64_t last);
  // KL(teacher ‖ student) in nats of rows first … last of logits (rows, columns) into out (rows). The teacher's are
  // scratch; the student's become softmax(student) − softmax(teacher) with `slope`, else scratch.
  void (*divergences_of)(float* teacher, float* student, int64_t columns, bool slope, float* out, int64_t first,
                         int64_t last);
};

// The kernels of this build that this machine can run, best first, and the chosen ones.
int available(const Kernels* const** list);
const Kernels& chosen();
bool choose(const char* name);  // false if there is no such instruction set here

extern const Kernels portable, avx2, avx512, avx512vnni, neon, neondot;

}  // namespace bellbit
