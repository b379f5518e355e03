// Python bindings: addresses of tensors in, checked by the caller (kernels/native.py).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <string>
#include <vector>

#include "decoder.h"
#include "kernels.h"
#include "linear.h"

namespace nb = nanobind;

namespace bellbit {
namespace {

using Address = uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

float* floats(Address address) { return at<float>(address); }

}  // namespace
}  // namespace bellbit

NB_MODULE(_kernels, m) {
  using namespace bellbit;
  nb::set_leak_warnings(false);

  nb::class_<Planes>(m, "Planes")
      .def(
          "__init__",
          [](Planes* self, Address bits, int64_t planes, int64_t rows, int64_t columns, int64_t plane_stride,
             int64_t row_stride, int64_t block_stride, int64_t group, int grid, Address scales, Address zeros,
             float zero, double top, double step) {
            new (self) Planes{at<const uint8_t>(bits), planes, rows, columns, plane_stride, row_stride, block_stride,
                              group, static_cast<Grid>(grid), at<const void>(scales), at<const uint8_t>(zeros), zero,
                              {}};
            // kTable: the logarithms (base 2) of the largest scale and of the ratio of two neighbours
            for (int i = 0; i < 256 && self->grid == Grid::kTable; i++)
              self->table[i] = static_cast<float>(std::exp2(top - step * i));
          },
          nb::arg("bits"), nb::arg("planes"), nb::arg("rows"), nb::arg("columns"), nb::arg("plane_stride"),
          nb::arg("row_stride"), nb::arg("block_stride"), nb::arg("group"), nb::arg("grid"), nb::arg("scales"),
          nb::arg("zeros"), nb::arg("zero"), nb::arg("top"), nb::arg("step"));

  nb::class_<Codebook>(m, "Codebook")
      .def(
          "__init__",
          [](Codebook* self, Address codes, Address salient, int64_t rows, int64_t columns, int64_t block_size,
             Address scales, Address exponents) {
            new (self) Codebook{at<const uint8_t>(codes), at<const uint8_t>(salient), rows, columns, block_size,
                                at<const void>(scales), at<const uint8_t>(exponents)};
          },
          nb::arg("codes"), nb::arg("salient"), nb::arg("rows"), nb::arg("columns"), nb::arg("block_size"),
          nb::arg("scales"), nb::arg("exponents"));

  nb::class_<Dense>(m, "Dense")
      .def(
          "__init__",
          [](Dense* self, Address values, int64_t rows, int64_t columns, bool bfloat) {
            new (self) Dense{at<const uint16_t>(values), rows, columns, bfloat};
          },
          nb::arg("values"), nb::arg("rows"), nb::arg("columns"), nb::arg("bfloat"));

  m.def("multiply", [](const Weight& w, Address x, int64_t tokens, int limit, bool shared, Address bias, Address y,
                       int threads) {
    const nb::gil_scoped_release release;
    multiply(w, {floats(x), tokens, limit, shared}, floats(bias), floats(y), threads);
  });
  m.def("unpack", [](const Weight& w, Address out, int64_t first, int64_t last, int threads) {
    const nb::gil_scoped_release release;
    unpack(w, floats(out), first, last, threads);
  });

  nb::class_<Layer>(m, "Layer").def("__init__", [](Layer* self, const Weight& w, Address bias, int limit, bool shared) {
    new (self) Layer{w, floats(bias), limit, shared};
  });
  nb::class_<Block>(m, "Block").def(
      "__init__",
      [](Block* self, Address input_norm, Address post_norm, Address q_norm, Address k_norm, const Layer& q,
         const Layer& k, const Layer& v, const Layer& o, const Layer& gate, const Layer& up, const Layer& down) {
        new (self) Block{floats(input_norm), floats(post_norm), floats(q_norm), floats(k_norm), q, k, v, o, gate, up,
                         down};
      },
      nb::arg("input_norm"), nb::arg("post_norm"), nb::arg("q_norm"), nb::arg("k_norm"), nb::arg("q"), nb::arg("k"),
      nb::arg("v"), nb::arg("o"), nb::arg("gate"), nb::arg("up"), nb::arg("down"));
  nb::class_<Decoder>(m, "Decoder")
      .def(
          "__init__",
          [](Decoder* self, int64_t heads, int64_t key_heads, int64_t head_size, float epsilon, float scale,
             int64_t capacity, Address cosines, Address sines, const Dense& embedding, Address norm,
             const Layer& head) {
            new (self) Decoder(heads, key_heads, head_size, epsilon, scale, capacity, floats(cosines), floats(sines),
                               embedding, floats(norm), head);
          },
          nb::arg("heads"), nb::arg("key_heads"), nb::arg("head_size"), nb::arg("epsilon"), nb::arg("scale"),
          nb::arg("capacity"), nb::arg("cosines"), nb::arg("sines"), nb::arg("embedding"), nb::arg("norm"),
          nb::arg("head"))
      .def("add", &Decoder::add)
      .def("set_cache", [](Decoder& self, int64_t block, Address keys, Address values, int64_t length) {
        self.set_cache(block, floats(keys), floats(values), length);
      })
      .def("step", [](Decoder& self, int64_t token, int64_t position, Address logits, int threads) {
        const nb::gil_scoped_release release;
        self.step(token, position, floats(logits), threads);
      });

  m.def("hadamard", [](Address x, int64_t tokens, int64_t columns, int threads) {
    const nb::gil_scoped_release release;
    rotate(floats(x), tokens, columns, threads);
  });
  nb::class_<Latents>(m, "Latents")
      .def(
          "__init__",
          [](Latents* self, Address latents, Address scales, int64_t rows, int64_t columns, int64_t group, int width) {
            new (self) Latents{floats(latents), floats(scales), rows, columns, group, width};
          },
          nb::arg("latents"), nb::arg("scales"), nb::arg("rows"), nb::arg("columns"), nb::arg("group"),
          nb::arg("width"));
  m.def("weights_of", [](const Latents& latents, bool bfloat, Address out, int threads) {
    const nb::gil_scoped_release release;
    weights_of(latents, bfloat, at<void>(out), threads);
  });
  m.def("derivatives_of", [](const Latents& latents, bool bfloat, Address weights, Address gradient, Address to_latents,
                             Address to_scales, int threads) {
    const nb::gil_scoped_release release;
    derivatives_of(latents, bfloat, at<const void>(weights), at<const void>(gradient), floats(to_latents),
                   floats(to_scales), threads);
  });
  m.def("divergences_of", [](Address teacher, Address student, int64_t rows, int64_t columns, bool slope, Address out,
                             int threads) {
    const nb::gil_scoped_release release;
    divergences_of(floats(teacher), floats(student), rows, columns, slope, floats(out), threads);
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
