// One token against 1-bit weights by AND and population count, plane by plane of the activations' codes: what
// benchmarks/kernels.py sets beside the integer path of the package. One thread.
#include <cstdint>

// signs (rows, words), planes (width, words): two's complement codes of x, bit by bit; total: their sum.
// y (rows) = Σ ±code.
extern "C" void multiply(const uint64_t* signs, const uint64_t* planes, int64_t rows, int64_t words, int64_t width,
                         int64_t total, int32_t* y) {
  for (int64_t row = 0; row < rows; row++, signs += words) {
    int64_t positive = 0;
    for (int64_t p = 0; p < width; p++) {
      const uint64_t* plane = planes + p * words;
      int64_t count = 0;
      for (int64_t i = 0; i < words; i++) count += __builtin_popcountll(signs[i] & plane[i]);
      positive += (p + 1 == width ? -count : count) << p;
    }
    y[row] = static_cast<int32_t>(2 * positive - total);
  }
}
