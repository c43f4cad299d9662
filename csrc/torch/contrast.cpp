// SPDX-License-Identifier: Apache-2.0
// kdkernels::crd on CPU tensors. The schema is defined in kdkernels/ops/contrast.py.
#include "tensors.h"

#include <tuple>

namespace {

using namespace kd::torch_binding;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> crd(
    Tensor student, Tensor teacher, Tensor student_bank, Tensor teacher_bank, Tensor normalizer,
    Tensor index, Tensor negatives, double factor, std::vector<double> numbers,
    std::vector<int64_t> choices, int64_t grads) {
  STD_TORCH_CHECK(choices.empty(), "kdkernels: crd has no choices");
  kd::CrdParams p;
  static_cast<kd::CrdNumbers&>(p) = unpack<kd::CrdNumbers>(numbers);
  p.samples = student.size(0), p.dim = student.size(1);
  p.negatives = negatives.size(1), p.bank_rows = teacher_bank.size(0);
  STD_TORCH_CHECK(p.bank_rows <= INT32_MAX, "kdkernels: a bank has at most 2^31 - 1 rows");
  const ScalarType dtype = student.scalar_type();
  p.in_double = dtype == ScalarType::Double;
  p.factor = factor;
  const Tensor anchors[] = {student, teacher}, banks[] = {teacher_bank, student_bank};
  Tensor gradients[] = {nothing(dtype), nothing(dtype)};
  for (int k = 0; k < 2; k++) {
    p.side[k].anchor = anchors[k].const_data_ptr();
    p.side[k].bank = banks[k].const_data_ptr();
    const void* z = normalizer.const_data_ptr();
    p.side[k].normalizer =
        p.in_double ? static_cast<const double*>(z)[k] : static_cast<const float*>(z)[k];
    if (!(grads & (k == 0 ? of_student : of_teacher))) continue;
    gradients[k] = contiguous({p.samples, p.dim}, dtype);
    p.side[k].grad = gradients[k].mutable_data_ptr();
  }
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.negative = negatives.const_data_ptr();
  p.narrow = negatives.scalar_type() == ScalarType::Int;
  p.negative_stride = negatives.stride(0);

  const Tensor sorted = contiguous({p.samples, p.negatives}, ScalarType::Int);
  const Tensor starts = contiguous({p.samples, kd::crd_tiles(p) + 1}, ScalarType::Int);
  const Tensor part = contiguous({p.samples, kd::crd_padded(p)}, dtype);
  const Tensor sums = contiguous({p.samples, kd::crd_sums(p)}, ScalarType::Double);
  p.sorted = static_cast<int32_t*>(sorted.mutable_data_ptr());
  p.starts = static_cast<int32_t*>(starts.mutable_data_ptr());
  p.part = part.mutable_data_ptr();
  p.sums = static_cast<double*>(sums.mutable_data_ptr());
  std::vector<double> loss(2 * p.samples);
  std::vector<const int32_t*> chosen(p.samples);
  p.loss = loss.data(), p.chosen = chosen.data();

  const auto& kernel = kd::kernels().crd;
  torch::stable::parallel_for(0, p.samples, kd::rows_per_task(p.dim * (p.negatives + 1)),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  double total = 0;
  for (int64_t i = 0; i < p.samples; i++) {
    STD_TORCH_CHECK(chosen[i], "index and negatives must be in [0, ", p.bank_rows,
                    "), those of sample ", i, " are not.");
    total += loss[i] + loss[p.samples + i];
  }
  return {stored(&total, {}, dtype, factor), gradients[0], gradients[1], nothing(dtype),
          nothing(dtype), nothing(dtype), nothing(dtype), nothing(dtype)};
}

Tensor sample_negatives(Tensor labels, Tensor index, Tensor shuffle, Tensor begin, int64_t count) {
  kd::NegativesParams p;
  p.count = count, p.rows = labels.size(0);
  STD_TORCH_CHECK(p.rows <= INT32_MAX, "kdkernels: at most 2^31 - 1 samples");
  const int64_t samples = index.size(0);
  const Tensor shuffled = contiguous({2, p.rows}, ScalarType::Long);
  const Tensor place = contiguous({p.rows}, ScalarType::Int);
  Tensor drawn = contiguous({samples, count}, ScalarType::Int);
  std::vector<uint8_t> fault(samples);
  p.labels = static_cast<const int64_t*>(labels.const_data_ptr());
  p.shuffled = static_cast<const int64_t*>(shuffled.const_data_ptr());
  p.place = static_cast<const int32_t*>(place.const_data_ptr());
  p.index = static_cast<const int64_t*>(index.const_data_ptr());
  p.begin = static_cast<const int64_t*>(begin.const_data_ptr());
  p.drawn = static_cast<int32_t*>(drawn.mutable_data_ptr());
  p.fault = fault.data();
  kd::crd_shuffle(p, static_cast<const int64_t*>(shuffle.const_data_ptr()),
                  static_cast<int64_t*>(shuffled.mutable_data_ptr()),
                  static_cast<int32_t*>(place.mutable_data_ptr()));
  const auto& kernel = kd::kernels().negatives;
  torch::stable::parallel_for(0, samples, kd::rows_per_task(p.rows),
                              [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  for (const uint8_t alone : fault)
    STD_TORCH_CHECK(!alone, "labels must be of more than one class.");
  return drawn;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("crd", TORCH_BOX(&crd));
  m.impl("sample_negatives", TORCH_BOX(&sample_negatives));
}
