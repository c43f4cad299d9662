// SPDX-License-Identifier: Apache-2.0
// kdkernels::rkd, pkt, polynomial, neighbours, gram_match and nst_grams on CPU tensors. The schemas
// are defined in kdkernels/ops/relation.py.
#include "../kd/cpu/relation/run.h"

#include <tuple>

#include "tensors.h"

namespace {

using namespace kd::torch_binding;
using Pair = std::tuple<Tensor, Tensor, Tensor>;

const auto parallel = [](int64_t tasks, int64_t work, const auto& f) {
  constexpr int64_t grain = 1 << 21;  // multiplications: steps of less are over before threads meet
  torch::stable::parallel_for(0, tasks, grain / std::max<int64_t>(work, 1) + 1, f);
};

ScalarType accumulated_in(const Tensor& a, const Tensor& b) {
  const bool wide = a.scalar_type() == ScalarType::Double || b.scalar_type() == ScalarType::Double;
  return wide ? ScalarType::Double : ScalarType::Float;
}

template <class Run>
Pair embeddings(const Tensor& student, const Tensor& teacher, double factor, int64_t grads,
                bool rkd, kd::Relation& r, const Run& run) {
  Tensor found[2], keep[2];
  for (int side = 0; side < 2; side++) {
    const Tensor& x = side ? teacher : student;
    r.side[side].x = rows_of(x, keep[side]);
    r.side[side].width = x.size(1);
    r.side[side].factor = factor;
    found[side] = gradient_for(x, grads >> side & 1, r.side[side].grad, gradient_type(x));
  }
  r.rows = student.size(0);
  r.single = !rkd && accumulated_in(student, teacher) == ScalarType::Float;
  // A tensor, for its memory to be accounted for as other temporaries' is.
  const Tensor scratch = contiguous(
      {kd::relation_scratch(r.rows, student.size(1) + teacher.size(1), rkd)},
      ScalarType::Double);
  auto at = reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr());
  kd::share(r, reinterpret_cast<double*>((at + 63) / 64 * 64), rkd);
  const double loss = r.rows ? run(kd::relation_run(r, parallel)) : 0;
  return {stored(&loss, {}, accumulated_in(student, teacher), factor), found[0], found[1]};
}

Pair rkd(Tensor student, Tensor teacher, double factor, std::vector<double> numbers,
         std::vector<int64_t> choices, int64_t grads) {
  kd::Relation r;
  r.rkd = unpack<kd::RKDNumbers>(numbers);
  r.rkd_choices = unpack<kd::RKDChoices>(choices);
  return embeddings(student, teacher, factor, grads, true, r,
                    [](const auto& run) { return run.rkd(); });
}

Pair pkt(Tensor student, Tensor teacher, double factor, std::vector<double> numbers,
         std::vector<int64_t>, int64_t grads) {
  kd::Relation r;
  r.pkt = unpack<kd::PKTNumbers>(numbers);
  return embeddings(student, teacher, factor, grads, false, r,
                    [](const auto& run) { return run.pkt(); });
}

Pair polynomial(Tensor student, Tensor teacher, double factor, std::vector<double> numbers,
                std::vector<int64_t> choices, int64_t grads) {
  kd::Relation r;
  r.polynomial = unpack<kd::PolynomialNumbers>(numbers);
  const bool norm = unpack<kd::PolynomialChoices>(choices).norm;
  return embeddings(student, teacher, factor, grads, false, r,
                    [norm](const auto& run) { return run.polynomial(norm); });
}

Pair neighbours(Tensor student, Tensor teacher, double factor, std::vector<double>,
                std::vector<int64_t>, int64_t grads) {
  kd::Neighbours p;
  Tensor keep_student, keep_teacher;
  p.rows = student.size(0), p.width = student.size(1);
  p.student = rows_of(student, keep_student), p.teacher = rows_of(teacher, keep_teacher);
  p.factor = factor;
  Tensor grad_student =
      gradient_for(student, grads & of_student, p.grad_student, gradient_type(student));
  Tensor grad_teacher =
      gradient_for(teacher, grads & of_teacher, p.grad_teacher, gradient_type(teacher));
  std::vector<double> losses((p.width + kd::neighbour_block - 1) / kd::neighbour_block);
  p.loss = losses.data();
  const auto& kernel = kd::kernels().neighbour_columns;
  parallel(losses.size(), p.rows * 4096, [&](int64_t a, int64_t b) { kernel(p, a, b); });
  double loss = 0;
  for (double one : losses) loss += one;
  return {stored(&loss, {}, accumulated_in(student, teacher), factor), grad_student, grad_teacher};
}

Tensor gradient_like(const Tensor& gram, bool wanted, void*& to) {
  if (!wanted) return nothing(gram.scalar_type());
  Tensor grad = contiguous(leading(gram, gram.dim()), gram.scalar_type());
  to = grad.mutable_data_ptr();
  return grad;
}
Tensor total(const std::vector<double>& losses, double factor, ScalarType dtype) {
  double loss = 0;
  for (double one : losses) loss += one;
  return stored(&loss, {}, dtype, factor);
}

Pair gram_match(Tensor student, Tensor teacher, double factor, std::vector<double> numbers,
                std::vector<int64_t> choices, int64_t grads) {
  student = torch::stable::contiguous(student), teacher = torch::stable::contiguous(teacher);
  kd::GramMatch p;
  p.numbers = unpack<kd::GramNumbers>(numbers);
  p.choices = unpack<kd::GramChoices>(choices);
  p.matrices = student.size(0), p.rows = student.size(1), p.columns = student.size(2);
  p.in_double = student.scalar_type() == ScalarType::Double;
  p.factor = factor;
  p.student = student.const_data_ptr(), p.teacher = teacher.const_data_ptr();
  Tensor grad_student = gradient_like(student, grads & of_student, p.grad_student);
  Tensor grad_teacher = gradient_like(teacher, grads & of_teacher, p.grad_teacher);
  std::vector<double> losses(p.matrices);
  p.loss = losses.data();
  const auto& kernel = kd::kernels().gram_match;
  parallel(p.matrices, 8 * p.rows * p.columns, [&](int64_t a, int64_t b) { kernel(p, a, b); });
  return {total(losses, factor, student.scalar_type()), grad_student, grad_teacher};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> nst_grams(Tensor student, Tensor cross, Tensor teacher,
                                                     double factor, std::vector<double> numbers,
                                                     std::vector<int64_t>, int64_t grads) {
  for (Tensor* t : {&student, &cross, &teacher}) *t = torch::stable::contiguous(*t);
  kd::NSTGrams p;
  p.numbers = unpack<kd::NSTNumbers>(numbers);
  p.matrices = cross.size(0), p.student_channels = cross.size(1);
  p.teacher_channels = cross.size(2);
  p.in_double = student.scalar_type() == ScalarType::Double;
  p.factor = factor;
  p.student = student.const_data_ptr(), p.cross = cross.const_data_ptr();
  p.teacher = teacher.const_data_ptr();
  Tensor grad_student = gradient_like(student, grads & 1, p.grad_student);
  Tensor grad_cross = gradient_like(cross, grads & 2, p.grad_cross);
  Tensor grad_teacher = gradient_like(teacher, grads & 4, p.grad_teacher);
  std::vector<double> losses(p.matrices);
  p.loss = losses.data();
  const auto& kernel = kd::kernels().nst_grams;
  parallel(p.matrices, 8 * p.student_channels * p.teacher_channels,
           [&](int64_t a, int64_t b) { kernel(p, a, b); });
  return {total(losses, factor, student.scalar_type()), grad_student, grad_cross, grad_teacher};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("rkd", TORCH_BOX(&rkd));
  m.impl("pkt", TORCH_BOX(&pkt));
  m.impl("polynomial", TORCH_BOX(&polynomial));
  m.impl("neighbours", TORCH_BOX(&neighbours));
  m.impl("gram_match", TORCH_BOX(&gram_match));
  m.impl("nst_grams", TORCH_BOX(&nst_grams));
}
