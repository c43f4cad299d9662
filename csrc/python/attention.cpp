// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

// The forward, and with `upstream` the backward; teacher and its gradient (N, K), the others as in
// kd/attention.h, contiguous and of one dtype.
void attention(const py::array& teacher, const py::array& scores, const py::array& values,
               const py::object& temperature, bool residual, py::array out, py::array stats,
               const py::object& upstream, const py::object& grad_teacher,
               const py::object& grad_temperature, const py::object& grad_scores,
               const py::object& grad_values, int threads) {
  kd::ClassAttention p;
  p.rows = teacher.shape(0), p.classes = teacher.shape(1), p.heads = scores.shape(0);
  p.in_double = dtype_of(scores, "scores") == kd::DType::float64;
  p.teacher = rows_of(teacher, "teacher");
  p.temperature = scalar_of(temperature);
  p.residual = residual;
  p.scores = scores.data(), p.values = values.data();
  p.out = out.mutable_data(), p.stats = stats.mutable_data();
  const int64_t size = p.in_double ? 8 : 4;
  std::vector<double> soft(p.rows * kd::padded(p.classes));
  std::vector<uint8_t> some_off(p.rows);
  std::vector<char> partial(kd::row_blocks(p.classes) * 2 * p.heads * (p.classes + 1) * size);
  p.soft = soft.data(), p.some_off = some_off.data(), p.partial = partial.data();
  const auto data = [](const py::object& o) { return o.cast<py::array>().mutable_data(); };
  if (!upstream.is_none()) {
    p.upstream = data(upstream);
    p.grad_scores = data(grad_scores), p.grad_values = data(grad_values);
    p.grad_teacher = rows_or_none(grad_teacher, "grad_teacher");
    p.grad_temperature = static_cast<double*>(data(grad_temperature));
  }
  py::gil_scoped_release release;
  const auto run = [&](kd::AttentionStep step) {
    split_tasks(kd::tasks(p, step), threads, [&](int64_t begin, int64_t end) {
      kd::kernels().attention(p, step, begin, end);
    });
  };
  run(kd::AttentionStep::soften);
  run(kd::AttentionStep::forward);
  if (!p.upstream) return;
  run(kd::AttentionStep::backward);
  run(kd::AttentionStep::collect);
  run(kd::AttentionStep::teacher);
}

// A step of samples that attend to samples (kd/row_attention.h), whose arrays are given by the names
// of its fields; for the tests, as the products between the steps are.
void row_attention(int step, const py::dict& given, bool residual, int threads) {
  const auto array = [&](const char* name) {
    return given.contains(name) ? py::object(given[name]) : py::none();
  };
  const auto data = [&](const char* name) -> void* {
    const py::object o = array(name);
    return o.is_none() ? nullptr : o.cast<py::array>().mutable_data();
  };
  kd::RowAttention p;
  const py::array teacher = array("teacher"), soft = array("soft");
  p.rows = teacher.shape(0), p.classes = teacher.shape(1);
  p.in_double = dtype_of(soft, "soft") == kd::DType::float64;
  p.teacher = rows_of(teacher, "teacher"), p.temperature = scalar_of(array("temperature"));
  p.residual = residual;
  p.soft = data("soft"), p.out = data("out"), p.scores = data("scores");
  p.upstream = data("upstream"), p.arriving = data("arriving"), p.to_scores = data("to_scores");
  p.to_soft = data("to_soft"), p.attended = data("attended"), p.to_attended = data("to_attended");
  p.grad_teacher = rows_or_none(array("grad_teacher"), "grad_teacher");
  p.grad_temperature = static_cast<double*>(data("grad_temperature"));
  int64_t tasks = p.rows;
  if (p.scores) {
    const auto scores = array("scores").cast<py::array>();
    tasks = scores.shape(0), p.others = scores.shape(1);
  }
  if (p.attended) p.width = array("attended").cast<py::array>().shape(1);
  py::gil_scoped_release release;
  split_tasks(tasks, threads, [&](int64_t begin, int64_t end) {
    kd::kernels().row_attention(p, static_cast<kd::RowStep>(step), begin, end);
  });
}

// c = factor a b, or added to c: a of any strides, the others' rows dense; for the tests.
void product(const py::array& a, const py::array& b, py::array c, const py::object& factor,
             bool add, int threads) {
  kd::Product p;
  p.rows = a.shape(0), p.depth = a.shape(1), p.columns = b.shape(1);
  p.in_double = dtype_of(c, "c") == kd::DType::float64;
  const int64_t size = c.itemsize();
  p.a = a.data(), p.a_row = a.strides(0) / size, p.a_step = a.strides(1) / size;
  p.b = b.data(), p.b_row = b.strides(0) / size;
  p.c = c.mutable_data(), p.c_row = c.strides(0) / size;
  p.factor = scalar_of(factor), p.add = add;
  py::gil_scoped_release release;
  split_tasks(kd::tasks(p), threads,
              [&](int64_t begin, int64_t end) { kd::kernels().product(p, begin, end); });
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", &attention);
  m.def("row_attention", &row_attention);
  m.def("product", &product);
}

}  // namespace kd::python
