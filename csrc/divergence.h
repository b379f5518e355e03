// KL(teacher ‖ student) of rows of logits, and its derivative. Plain loops that become vector instructions of whatever
// set they are compiled for; core/divergence.py says the same in torch.
#pragma once

#include "common.h"

namespace bellbit {
namespace {

// e^x for x ≤ 0; e^-87 below −87, where floats end. x = n·ln 2 + r with |r| ≤ ln 2 / 2, e^r by its power series.
inline float exponential(float x) {
  const float within = x < -87.0f ? -87.0f : x;
  const auto n = static_cast<int32_t>(within * 1.44269504f - 0.5f);  // to the nearest, as it is rounded towards 0
  const float whole = static_cast<float>(n);
  const float r = within - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts, the first exact times n
  float sum = 1.0f / 5040;
  sum = sum * r + 1.0f / 720;
  sum = sum * r + 1.0f / 120;
  sum = sum * r + 1.0f / 24;
  sum = sum * r + 1.0f / 6;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  return sum * float_of(static_cast<uint32_t>(n + 127) << 23);
}

float greatest_of(const float* x, int64_t count) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = x[0];
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] = larger(lanes[lane], x[i + lane]);
  for (; i < count; i++) lanes[0] = larger(lanes[0], x[i]);
  for (int64_t lane = 1; lane < kLanes; lane++) lanes[0] = larger(lanes[0], lanes[lane]);
  return lanes[0];
}

// Sums over a row: of e^a, of e^b, and of e^a·(a − b), a and b being logits below the greatest.
struct Sums {
  double teacher = 0, student = 0, both = 0;
};

// Adds `count` logits to the sums, and puts e^a and e^b in their places.
void add_logits(float* teacher, float* student, int64_t count, float top_teacher, float top_student, Sums& sums) {
  float p[kLanes] = {}, q[kLanes] = {}, both[kLanes] = {};
  const auto add = [&](int64_t i, int64_t lane) {
    const float a = teacher[i] - top_teacher, b = student[i] - top_student, of_a = exponential(a), of_b = exponential(b);
    p[lane] += of_a, q[lane] += of_b, both[lane] += of_a * (a - b);
    teacher[i] = of_a, student[i] = of_b;
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) add(i + lane, lane);
  for (; i < count; i++) add(i, 0);
  for (int64_t lane = 0; lane < kLanes; lane++) {
    sums.teacher += static_cast<double>(p[lane]);
    sums.student += static_cast<double>(q[lane]);
    sums.both += static_cast<double>(both[lane]);
  }
}

void divergences_of(float* teacher, float* student, int64_t columns, bool slope, float* out, int64_t first,
                    int64_t last) {
  constexpr int64_t kPiece = 4096;  // logits that are summed in float before the sums go on in double
  for (int64_t row = first; row < last; row++) {
    float *p = teacher + row * columns, *q = student + row * columns;
    const float top_p = greatest_of(p, columns), top_q = greatest_of(q, columns);
    Sums sums;
    for (int64_t start = 0; start < columns; start += kPiece)
      add_logits(p + start, q + start, smaller(kPiece, columns - start), top_p, top_q, sums);
    out[row] = static_cast<float>(sums.both / sums.teacher - std::log(sums.teacher) + std::log(sums.student));
    const auto of_p = static_cast<float>(1 / sums.teacher), of_q = static_cast<float>(1 / sums.student);
    for (int64_t c = 0; slope && c < columns; c++) q[c] = q[c] * of_q - p[c] * of_p;
  }
}

}  // namespace
}  // namespace bellbit
