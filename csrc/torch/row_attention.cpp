// SPDX-License-Identifier: Apache-2.0
// kdkernels::row_attention on CPU tensors. The schemas are defined in kdkernels/ops/attention.py.
#include "products.h"

#include <cmath>
#include <tuple>

namespace {

using namespace kd::torch_binding;
using kd::RowStep;

enum Wanted { to_teacher = 1, to_temperature = 2, to_weights = 4 };  // GRAD_ of the ops

// A call on tensors, which hold its inputs and its scratch space.
struct Call : kd::RowAttention {
  const ScalarType dtype;
  const int64_t heads;
  Tensor kept_teacher;
  Matrix softened, attended_to;
  kd::RowScalar scale;

  Call(const Tensor& logits, const Matrix& query, int64_t heads, double number,
       const std::optional<Tensor>& temperatures, bool with_residual,
       const std::optional<Tensor>& gathered, void* to = nullptr)
      : dtype(query.keep.scalar_type()),
        heads(heads),
        softened(logits.numel() / query.rows, query.rows, dtype),
        attended_to(gathered ? Matrix(*gathered) : softened) {
    rows = softened.rows, classes = softened.columns, others = attended_to.rows;
    in_double = dtype == ScalarType::Double;
    teacher = rows_of(logits, kept_teacher);
    temperature = scalar_of(temperatures, number);
    residual = with_residual;
    soft = softened.data, out = to;
    scale = kd::torch_binding::number(1 / std::sqrt(double(query.columns / heads)));
    run(RowStep::soften, rows, classes);
  }
  void run(RowStep step, int64_t n, int64_t size) {
    run_tasks(n, n * size, [&](int64_t begin, int64_t end) {
      kd::kernels().row_attention(*this, step, begin, end);
    });
  }
};

// What the backward needs of the forward, one after the other in a tensor.
struct Saved {
  Tensor all;
  Matrix query, key, value, attended, probabilities;

  static int64_t size(int64_t n, int64_t m, int64_t pairs, int64_t values, int64_t heads) {
    return (n + m) * (pairs + values) + heads * n * m;
  }
  Saved(const Tensor& all, int64_t n, int64_t m, int64_t pairs, int64_t values, int64_t heads)
      : all(all), query(all, n, pairs), key(all, m, pairs), value(all, m, values),
        attended(all, n, values), probabilities(all, heads * n, m) {
    key.data = query.at(n, 0);
    value.data = key.at(m, 0);
    attended.data = value.at(m, 0);
    probabilities.data = attended.at(n, 0);
  }
};

std::tuple<Tensor, Tensor> row_attention(Tensor teacher, Tensor query_weight, Tensor key_weight,
                                         Tensor value_weight, Tensor output_weight, int64_t heads,
                                         double temperature, std::optional<Tensor> temperatures,
                                         bool residual, std::optional<Tensor> gathered) {
  const Matrix query(query_weight), key(key_weight), value(value_weight), output(output_weight);
  Tensor out = contiguous(leading(teacher, teacher.dim()), query_weight.scalar_type());
  Call call(teacher, query, heads, temperature, temperatures, residual, gathered,
            out.mutable_data_ptr());
  const int64_t n = call.rows, m = call.others;
  Tensor all = contiguous({Saved::size(n, m, query.columns, value.columns, heads)}, call.dtype);
  if (n == 0) return {out, all};
  const Saved saved(all, n, m, query.columns, value.columns, heads);
  multiply(call.softened, query, saved.query);
  multiply(call.attended_to, key, saved.key);
  multiply(call.attended_to, value, saved.value);
  for (int64_t h = 0; h < heads; h++)
    multiply(saved.query.head(h, heads), saved.key.head(h, heads).transposed(),
             saved.probabilities.slab(h, heads), call.scale);
  call.scores = saved.probabilities.data;
  call.run(RowStep::softmax, heads * n, m);
  for (int64_t h = 0; h < heads; h++)
    multiply(saved.probabilities.slab(h, heads), saved.value.head(h, heads),
             saved.attended.head(h, heads));
  multiply(saved.attended, output, Matrix(out, n, call.classes), call.temperature, true);
  return {out, all};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients row_attention_backward(Tensor upstream, Tensor teacher, Tensor query_weight,
                                 Tensor key_weight, Tensor value_weight, Tensor output_weight,
                                 Tensor all, int64_t heads, double temperature,
                                 std::optional<Tensor> temperatures, bool residual,
                                 std::optional<Tensor> gathered, int64_t grads) {
  const Matrix query(query_weight), key(key_weight), value(value_weight), output(output_weight);
  Call call(teacher, query, heads, temperature, temperatures, residual, gathered);
  const int64_t n = call.rows, m = call.others, pairs = query.columns, width = value.columns;
  const Saved saved(all, n, m, pairs, width, heads);
  const auto like = [&](const Matrix& x) { return Matrix(x.rows, x.columns, call.dtype); };

  const Matrix arriving = like(call.softened);
  const Tensor dense = torch::stable::contiguous(upstream);
  call.upstream = dense.const_data_ptr(), call.arriving = arriving.data;
  call.run(RowStep::arrive, n, call.classes);
  const Matrix to_attended = like(saved.attended), to_scores = like(saved.probabilities);
  const Matrix to_query = like(saved.query), to_key = like(saved.key), to_value = like(saved.value);
  multiply(arriving, output.transposed(), to_attended);
  for (int64_t h = 0; h < heads; h++)
    multiply(to_attended.head(h, heads), saved.value.head(h, heads).transposed(),
             to_scores.slab(h, heads));
  call.scores = saved.probabilities.data, call.to_scores = to_scores.data;
  call.run(RowStep::score, heads * n, m);
  for (int64_t h = 0; h < heads; h++) {
    const Matrix p = saved.probabilities.slab(h, heads), g = to_scores.slab(h, heads);
    multiply(p.transposed(), to_attended.head(h, heads), to_value.head(h, heads));
    multiply(g, saved.key.head(h, heads), to_query.head(h, heads), call.scale);
    multiply(g.transposed(), saved.query.head(h, heads), to_key.head(h, heads), call.scale);
  }

  const auto weight = [&](const Matrix& from, const Matrix& to, const Matrix& like_this) {
    if (!(grads & to_weights)) return nothing(call.dtype);
    const Matrix grad = like(like_this);
    multiply(from.transposed(), to, grad);
    return grad.keep;
  };
  const Tensor of_query = weight(call.softened, to_query, query);
  const Tensor of_key = weight(call.attended_to, to_key, key);
  const Tensor of_value = weight(call.attended_to, to_value, value);
  const Tensor of_output = weight(saved.attended, arriving, output);

  Tensor grad_teacher = gradient_for(teacher, grads & to_teacher, call.grad_teacher);
  std::vector<double> to_each(grads & to_temperature ? n : 0);
  if (grads & (to_teacher | to_temperature)) {
    const Matrix& to_soft = arriving;  // which is done with
    multiply(to_query, query.transposed(), to_soft);
    if (!gathered) {
      multiply(to_key, key.transposed(), to_soft, {}, true);
      multiply(to_value, value.transposed(), to_soft, {}, true);
    }
    call.to_soft = to_soft.data, call.width = width;
    call.attended = saved.attended.data, call.to_attended = to_attended.data;
    call.grad_temperature = grads & to_temperature ? to_each.data() : nullptr;
    call.run(RowStep::teacher, n, call.classes);
  }
  return {grad_teacher, stored(to_each.data(), {static_cast<int64_t>(to_each.size())}, call.dtype),
          of_query, of_key, of_value, of_output};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("row_attention", TORCH_BOX(&row_attention));
  m.impl("row_attention_backward", TORCH_BOX(&row_attention_backward));
}
