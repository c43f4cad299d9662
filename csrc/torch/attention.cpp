// SPDX-License-Identifier: Apache-2.0
// kdkernels::attention on CPU tensors. The schemas are defined in kdkernels/ops/attention.py.
#include "tensors.h"

#include <tuple>

namespace {

using namespace kd::torch_binding;

enum Wanted { to_teacher = 1, to_temperature = 2, to_coefficients = 4 };  // GRAD_ of the ops

// A call on tensors, which hold its inputs and its scratch space.
struct Call : kd::ClassAttention {
  Tensor kept_teacher, softened, flags;
  const ScalarType dtype;

  Call(const Tensor& logits, const Tensor& scores, const Tensor& values, double number,
       const std::optional<Tensor>& temperatures, bool with_residual)
      : dtype(scores.scalar_type()) {
    heads = scores.size(0), classes = scores.size(1) - 1;
    rows = logits.numel() / classes;
    in_double = dtype == ScalarType::Double;
    residual = with_residual;
    teacher = rows_of(logits, kept_teacher);
    temperature = scalar_of(temperatures, number);
    this->scores = scores.const_data_ptr(), this->values = values.const_data_ptr();
    softened = contiguous({rows, kd::padded(classes)}, dtype), soft = softened.mutable_data_ptr();
    flags = contiguous({rows}, ScalarType::Byte);
    some_off = static_cast<uint8_t*>(flags.mutable_data_ptr());
    run(kd::AttentionStep::soften);
  }
  void run(kd::AttentionStep step) {
    const auto& kernel = kd::kernels().attention;
    const int64_t n = tasks(*this, step);
    const bool worth_splitting = rows * classes * classes >= kd::grain;
    torch::stable::parallel_for(0, n, worth_splitting ? 1 : n, [&](int64_t begin, int64_t end) {
      kernel(*this, step, begin, end);
    });
  }
};

std::tuple<Tensor, Tensor> attention(Tensor teacher, Tensor scores, Tensor values,
                                     double temperature, std::optional<Tensor> temperatures,
                                     bool residual, bool save) {
  Call call(teacher, scores, values, temperature, temperatures, residual);
  Tensor out = contiguous(leading(teacher, teacher.dim()), call.dtype);
  Tensor stats = save ? contiguous({4, call.heads, call.rows, call.classes}, call.dtype)
                      : nothing(call.dtype);
  call.out = out.mutable_data_ptr();
  call.stats = save ? stats.mutable_data_ptr() : nullptr;
  call.run(kd::AttentionStep::forward);
  return {out, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_backward(
    Tensor upstream, Tensor teacher, Tensor scores, Tensor values, Tensor stats,
    double temperature, std::optional<Tensor> temperatures, bool residual, int64_t grads) {
  Call call(teacher, scores, values, temperature, temperatures, residual);
  call.stats = const_cast<void*>(stats.const_data_ptr());
  const Tensor dense = torch::stable::contiguous(upstream);
  call.upstream = dense.const_data_ptr();

  Tensor grad_scores = nothing(call.dtype), grad_values = nothing(call.dtype);
  if (grads & to_coefficients) {
    const Tensor partial =
        contiguous({kd::row_blocks(call.classes), 2, call.heads, call.classes + 1}, call.dtype);
    grad_scores = contiguous(leading(scores, 3), call.dtype);
    grad_values = contiguous(leading(values, 2), call.dtype);
    call.partial = partial.mutable_data_ptr();
    call.grad_scores = grad_scores.mutable_data_ptr();
    call.grad_values = grad_values.mutable_data_ptr();
    call.run(kd::AttentionStep::backward);
    call.run(kd::AttentionStep::collect);
  }
  Tensor grad_teacher = gradient_for(teacher, grads & to_teacher, call.grad_teacher);
  std::vector<double> to_each(grads & to_temperature ? call.rows : 0);
  if (grads & (to_teacher | to_temperature)) {
    call.grad_temperature = grads & to_temperature ? to_each.data() : nullptr;
    call.run(kd::AttentionStep::teacher);
  }
  return {grad_teacher, stored(to_each.data(), {static_cast<int64_t>(to_each.size())}, call.dtype),
          grad_scores, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}
