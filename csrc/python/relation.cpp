// SPDX-License-Identifier: Apache-2.0
#include "../kd/cpu/relation/run.h"

#include "arrays.h"

namespace kd::python {
namespace {

// Embeddings (N, D), gradients None or like them, which are filled; returns the loss.
template <class Run>
double embeddings(const py::array& student, const py::array& teacher, double factor,
                  const py::object& grad_student, const py::object& grad_teacher, bool rkd,
                  int threads, kd::Relation& r, const Run& run) {
  const py::array* const x[] = {&student, &teacher};
  const py::object* const grads[] = {&grad_student, &grad_teacher};
  bool in_double = false;
  for (int side = 0; side < 2; side++) {
    r.side[side].x = rows_of(*x[side], side ? "teacher" : "student");
    r.side[side].grad = rows_or_none(*grads[side], side ? "grad_teacher" : "grad_student");
    r.side[side].width = x[side]->shape(1);
    r.side[side].factor = factor;
    in_double |= r.side[side].x.dtype == kd::DType::float64;
  }
  r.rows = student.shape(0);
  if (!r.rows) return 0;
  r.single = !rkd && !in_double;
  const int64_t width = student.shape(1) + teacher.shape(1);
  std::vector<double> scratch(kd::relation_scratch(r.rows, width, rkd));
  const auto at = reinterpret_cast<uintptr_t>(scratch.data());
  kd::share(r, reinterpret_cast<double*>((at + 63) / 64 * 64), rkd);
  py::gil_scoped_release release;
  const auto parallel = [threads](int64_t tasks, int64_t, const auto& f) {
    split_tasks(tasks, threads, f);
  };
  return factor * run(kd::relation_run(r, parallel));
}

double rkd(const py::array& student, const py::array& teacher, double factor,
           std::vector<double> numbers, std::vector<int64_t> choices,
           const py::object& grad_student, const py::object& grad_teacher, int threads) {
  kd::Relation r;
  r.rkd = unpack<kd::RKDNumbers>(numbers);
  r.rkd_choices = unpack<kd::RKDChoices>(choices);
  return embeddings(student, teacher, factor, grad_student, grad_teacher, true, threads, r,
                    [](const auto& run) { return run.rkd(); });
}

double pkt(const py::array& student, const py::array& teacher, double factor,
           std::vector<double> numbers, const py::object& grad_student,
           const py::object& grad_teacher, int threads) {
  kd::Relation r;
  r.pkt = unpack<kd::PKTNumbers>(numbers);
  return embeddings(student, teacher, factor, grad_student, grad_teacher, false, threads, r,
                    [](const auto& run) { return run.pkt(); });
}

double polynomial(const py::array& student, const py::array& teacher, double factor,
                  std::vector<double> numbers, std::vector<int64_t> choices,
                  const py::object& grad_student, const py::object& grad_teacher, int threads) {
  kd::Relation r;
  r.polynomial = unpack<kd::PolynomialNumbers>(numbers);
  const bool norm = unpack<kd::PolynomialChoices>(choices).norm;
  return embeddings(student, teacher, factor, grad_student, grad_teacher, false, threads, r,
                    [norm](const auto& run) { return run.polynomial(norm); });
}

double sum_of(const std::vector<double>& losses) {
  double loss = 0;
  for (const double one : losses) loss += one;
  return loss;
}

double neighbours(const py::array& student, const py::array& teacher, double factor,
                  const py::object& grad_student, const py::object& grad_teacher, int threads) {
  kd::Neighbours p;
  p.rows = student.shape(0), p.width = student.shape(1), p.factor = factor;
  p.student = rows_of(student, "student"), p.teacher = rows_of(teacher, "teacher");
  p.grad_student = rows_or_none(grad_student, "grad_student");
  p.grad_teacher = rows_or_none(grad_teacher, "grad_teacher");
  std::vector<double> losses((p.width + kd::neighbour_block - 1) / kd::neighbour_block);
  p.loss = losses.data();
  py::gil_scoped_release release;
  split_tasks(losses.size(), threads,
              [&](int64_t a, int64_t b) { kd::kernels().neighbour_columns(p, a, b); });
  return factor * sum_of(losses);
}

void* data_or_null(const py::object& o) {
  return o.is_none() ? nullptr : o.cast<py::array>().mutable_data();
}

// Gram matrices (n, R, C), contiguous; gradients, None or like them, are filled.
double gram_match(const py::array& student, const py::array& teacher, double factor,
                  std::vector<double> numbers, std::vector<int64_t> choices,
                  const py::object& grad_student, const py::object& grad_teacher, int threads) {
  kd::GramMatch p;
  p.numbers = unpack<kd::GramNumbers>(numbers);
  p.choices = unpack<kd::GramChoices>(choices);
  p.matrices = student.shape(0), p.rows = student.shape(1), p.columns = student.shape(2);
  p.in_double = dtype_of(student, "student") == kd::DType::float64;
  p.factor = factor;
  p.student = student.data(), p.teacher = teacher.data();
  p.grad_student = data_or_null(grad_student), p.grad_teacher = data_or_null(grad_teacher);
  std::vector<double> losses(p.matrices);
  p.loss = losses.data();
  py::gil_scoped_release release;
  split_tasks(p.matrices, threads,
              [&](int64_t a, int64_t b) { kd::kernels().gram_match(p, a, b); });
  return factor * sum_of(losses);
}

// Likewise of S S' (n, C, C), S T' (n, C, D) and T T' (n, D, D).
double nst_grams(const py::array& student, const py::array& cross, const py::array& teacher,
                 double factor, std::vector<double> numbers, const py::object& grad_student,
                 const py::object& grad_cross, const py::object& grad_teacher, int threads) {
  kd::NSTGrams p;
  p.numbers = unpack<kd::NSTNumbers>(numbers);
  p.matrices = cross.shape(0), p.student_channels = cross.shape(1);
  p.teacher_channels = cross.shape(2);
  p.in_double = dtype_of(student, "student") == kd::DType::float64;
  p.factor = factor;
  p.student = student.data(), p.cross = cross.data(), p.teacher = teacher.data();
  p.grad_student = data_or_null(grad_student), p.grad_cross = data_or_null(grad_cross);
  p.grad_teacher = data_or_null(grad_teacher);
  std::vector<double> losses(p.matrices);
  p.loss = losses.data();
  py::gil_scoped_release release;
  split_tasks(p.matrices, threads,
              [&](int64_t a, int64_t b) { kd::kernels().nst_grams(p, a, b); });
  return factor * sum_of(losses);
}

}  // namespace

void bind_relation(py::module_& m) {
  m.def("rkd", &rkd);
  m.def("pkt", &pkt);
  m.def("polynomial", &polynomial);
  m.def("neighbours", &neighbours);
  m.def("gram_match", &gram_match);
  m.def("nst_grams", &nst_grams);
}

}  // namespace kd::python
