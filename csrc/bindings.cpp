// Python bindings: addresses of tensors in, checked by the caller (kernels/cpu.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace nb = nanobind;

namespace bellbit {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// The input of a linear layer and how it is rounded: to codes of −limit … limit, or not at all if limit is 0.
struct Input {
  const float* x;
  int64_t tokens, columns;
  int limit;
  bool shared;  // one step for all tokens
};

// Rows of a piece of work: some 10 µs of it, in fours, because kernels take rows together.
int64_t grain(int64_t columns) { return std::max<int64_t>(4, (1 << 17) / std::max<int64_t>(columns, 1) / 4 * 4); }

template <class Weight>
void multiply(void (*kernel)(const Weight&, const Activations&, const float*, float*, int64_t, int64_t),
              const Weight& w, const Input& in, bool codes, const float* bias, float* y, int threads) {
  const nb::gil_scoped_release release;
  const int64_t blocks = (in.columns + kBlock - 1) / kBlock, stride = blocks * kBlock;
  const auto padded = static_cast<size_t>(in.tokens * stride), lanes = static_cast<size_t>(in.tokens * blocks * kLanes);
  thread_local std::vector<float> values, sums, steps;
  thread_local std::vector<int8_t> integers, salient;
  thread_local std::vector<int32_t> totals, salient_totals;
  Activations x{in.tokens, in.columns, stride, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
  if (codes) {
    integers.resize(padded), totals.resize(lanes), steps.resize(static_cast<size_t>(in.tokens));
    chosen().prepare(in.x, in.tokens, in.columns, in.limit, in.shared, nullptr, nullptr, integers.data(),
                     steps.data(), totals.data());
    x.codes = integers.data(), x.totals = totals.data(), x.steps = steps.data();
    if constexpr (std::is_same_v<Weight, Codebook>) {
      salient.resize(padded), salient_totals.resize(lanes);
      chosen().split(w, x, integers.data(), totals.data(), salient.data(), salient_totals.data());
      x.salient = salient.data(), x.salient_totals = salient_totals.data();
    }
  } else {
    values.resize(padded), sums.resize(lanes);
    chosen().prepare(in.x, in.tokens, in.columns, in.limit, in.shared, values.data(), sums.data(), nullptr, nullptr,
                     nullptr);
    x.values = values.data(), x.sums = sums.data();
  }
  struct Call {
    decltype(kernel) function;
    const Weight& w;
    const Activations& x;
    const float* bias;
    float* y;
  } const call{kernel, w, x, bias, y};
  parallel_for(
      w.rows, grain(w.columns), threads,
      [](const void* context, int64_t first, int64_t last) {
        const Call& c = *static_cast<const Call*>(context);
        c.function(c.w, c.x, c.bias, c.y, first, last);
      },
      &call);
}

template <class Weight>
void unpack(void (*kernel)(const Weight&, float*, int64_t, int64_t), const Weight& w, float* out, int64_t first,
            int64_t last, int threads) {
  const nb::gil_scoped_release release;
  struct Call {
    decltype(kernel) function;
    const Weight& w;
    float* out;
    int64_t first;
  } const call{kernel, w, out, first};
  parallel_for(
      last - first, grain(w.columns), threads,
      [](const void* context, int64_t begin, int64_t end) {
        const Call& c = *static_cast<const Call*>(context);
        c.function(c.w, c.out + begin * c.w.columns, c.first + begin, c.first + end);
      },
      &call);
}

}  // namespace
}  // namespace bellbit

NB_MODULE(_kernels, m) {
  using namespace bellbit;
  nb::set_leak_warnings(false);

  nb::class_<Planes>(m, "Planes")
      .def(
          "__init__",
          [](Planes* self, Address bits, int64_t planes, int64_t rows, int64_t columns, int64_t plane_stride,
             int64_t row_stride, int64_t block_stride, int grid, Address scales, Address zeros, float zero) {
            new (self) Planes{at<const uint8_t>(bits), planes, rows, columns, plane_stride, row_stride, block_stride,
                              static_cast<Grid>(grid), at<const void>(scales), at<const uint8_t>(zeros), zero};
          },
          nb::arg("bits"), nb::arg("planes"), nb::arg("rows"), nb::arg("columns"), nb::arg("plane_stride"),
          nb::arg("row_stride"), nb::arg("block_stride"), nb::arg("grid"), nb::arg("scales"), nb::arg("zeros"),
          nb::arg("zero"))
      .def("multiply",
           [](const Planes& w, Address x, int64_t tokens, int limit, bool shared, Address bias, Address y,
              int threads) {
             multiply(chosen().planes, w, {at<const float>(x), tokens, w.columns, limit, shared}, limit > 0,
                      at<const float>(bias), at<float>(y), threads);
           })
      .def("unpack", [](const Planes& w, Address out, int64_t first, int64_t last, int threads) {
        unpack(chosen().unpack_planes, w, at<float>(out), first, last, threads);
      });

  nb::class_<Codebook>(m, "Codebook")
      .def(
          "__init__",
          [](Codebook* self, Address signs, Address second, Address salient, int64_t rows, int64_t columns,
             int64_t block_size, Address scales, Address exponents) {
            new (self) Codebook{at<const uint8_t>(signs), at<const uint8_t>(second), at<const uint8_t>(salient), rows,
                                columns, block_size, at<const void>(scales), at<const uint8_t>(exponents)};
          },
          nb::arg("signs"), nb::arg("second"), nb::arg("salient"), nb::arg("rows"), nb::arg("columns"),
          nb::arg("block_size"), nb::arg("scales"), nb::arg("exponents"))
      .def("multiply",
           [](const Codebook& w, Address x, int64_t tokens, int limit, bool shared, Address bias, Address y,
              int threads) {
             multiply(chosen().codebook, w, {at<const float>(x), tokens, w.columns, limit, shared},
                      limit > 0 && w.block_size == kBlock, at<const float>(bias), at<float>(y), threads);
           })
      .def("unpack", [](const Codebook& w, Address out, int64_t first, int64_t last, int threads) {
        unpack(chosen().unpack_codebook, w, at<float>(out), first, last, threads);
      });

  nb::class_<Dense>(m, "Dense")
      .def(
          "__init__",
          [](Dense* self, Address values, int64_t rows, int64_t columns, bool bfloat) {
            new (self) Dense{at<const uint16_t>(values), rows, columns, bfloat};
          },
          nb::arg("values"), nb::arg("rows"), nb::arg("columns"), nb::arg("bfloat"))
      .def("multiply", [](const Dense& w, Address x, int64_t tokens, int limit, bool shared, Address bias, Address y,
                          int threads) {
        multiply(chosen().dense, w, {at<const float>(x), tokens, w.columns, limit, shared}, false,
                 at<const float>(bias), at<float>(y), threads);
      });

  m.def("hadamard", [](Address x, int64_t tokens, int64_t columns) {
    const nb::gil_scoped_release release;
    chosen().hadamard(at<float>(x), tokens, columns);
  });
  m.def("available", [] {
    const Kernels* const* list;
    std::vector<std::string> names;
    for (int i = 0, count = available(&list); i < count; i++) names.emplace_back(list[i]->name);
    return names;
  });
  m.def("chosen", [] { return std::string(chosen().name); });
  m.def("choose", [](const std::string& name) { return choose(name.c_str()); });
}
