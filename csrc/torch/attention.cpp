// SPDX-License-Identifier: Apache-2.0
// kdkernels::attention on CPU tensors. The schemas are defined in kdkernels/ops/attention.py.
#include "products.h"

#include <cmath>
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

// The weights of class tokens, and what they come to: the products of tokens, which are the classes'
// embeddings and, as the last, the logit, by pairs.
struct Weights {
  const Matrix query, key, value, output, embedding;
  const int64_t heads, pairs, classes, dim;
  const ScalarType dtype;
  const kd::RowScalar scale;
  const Matrix tokens, queries, keys;
  const Matrix values;  // (H, D + 1), of the columns of tokens

  Weights(const Tensor& query_weight, const Tensor& key_weight, const Tensor& value_weight,
          const Tensor& output_weight, const Tensor& class_embedding, int64_t heads)
      : query(query_weight), key(key_weight), value(value_weight), output(output_weight),
        embedding(class_embedding), heads(heads), pairs(query.columns), classes(embedding.rows),
        dim(embedding.columns), dtype(query_weight.scalar_type()),
        scale(number(1 / std::sqrt(double(pairs / heads)))), tokens(classes + 1, dim + 1, dtype),
        queries(classes + 1, pairs, dtype), keys(classes + 1, pairs, dtype),
        values(heads, dim + 1, dtype) {
    std::memset(tokens.data, 0, tokens.rows * tokens.row * tokens.size);
    copy(embedding, tokens.block(0, classes, 0, dim));
    if (dtype == ScalarType::Double) *(double*)tokens.at(classes, dim) = 1;
    else *(float*)tokens.at(classes, dim) = 1;
    multiply(tokens, query, queries);
    multiply(tokens, key, keys);
    for (int64_t h = 0; h < heads; h++)
      multiply(value.head(h, heads), output.slab(h, heads), values.slab(h, heads).transposed());
  }
};

std::tuple<Tensor, Tensor> coefficients(Tensor query, Tensor key, Tensor value, Tensor output,
                                        Tensor embedding, int64_t heads) {
  const Weights w(query, key, value, output, embedding, heads);
  const int64_t n = w.tokens.rows;
  Tensor scores = contiguous({heads, n, n}, w.dtype), values = contiguous({heads, n}, w.dtype);
  const Matrix all(scores, heads * n, n);
  for (int64_t h = 0; h < heads; h++)
    multiply(w.queries.head(h, heads), w.keys.head(h, heads).transposed(), all.slab(h, heads),
             w.scale);
  multiply(w.values, w.tokens.transposed(), Matrix(values));
  return {scores, values};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> coefficients_backward(
    Tensor grad_scores, Tensor grad_values, Tensor query, Tensor key, Tensor value, Tensor output,
    Tensor embedding, int64_t heads) {
  const Weights w(query, key, value, output, embedding, heads);
  const int64_t n = w.tokens.rows, classes = w.classes, dim = w.dim;
  const Matrix to_scores(grad_scores, heads * n, n), to_values(grad_values);
  const auto like = [&](const Matrix& x) { return Matrix(x.rows, x.columns, w.dtype); };
  const Matrix to_queries = like(w.queries), to_keys = like(w.keys), by_value = like(w.values);
  for (int64_t h = 0; h < heads; h++) {
    const Matrix g = to_scores.slab(h, heads);
    multiply(g, w.keys.head(h, heads), to_queries.head(h, heads), w.scale);
    multiply(g.transposed(), w.queries.head(h, heads), to_keys.head(h, heads), w.scale);
  }
  multiply(to_values, w.tokens, by_value);

  const Matrix to_query = like(w.query), to_key = like(w.key), to_value = like(w.value);
  const Matrix to_output = like(w.output), to_embedding = like(w.embedding);
  multiply(w.tokens.transposed(), to_queries, to_query);
  multiply(w.tokens.transposed(), to_keys, to_key);
  for (int64_t h = 0; h < heads; h++) {
    const Matrix by = by_value.slab(h, heads).transposed();  // (D + 1, 1)
    multiply(by, w.output.slab(h, heads).transposed(), to_value.head(h, heads));
    multiply(w.value.head(h, heads).transposed(), by, to_output.slab(h, heads));
  }
  const auto of_classes = [&](const Matrix& x) { return x.first_rows(classes); };
  const auto of_dim = [&](const Matrix& x) { return x.first_rows(dim).transposed(); };
  multiply(of_classes(to_queries), of_dim(w.query), to_embedding);
  multiply(of_classes(to_keys), of_dim(w.key), to_embedding, {}, true);
  multiply(of_classes(to_values.transposed()), w.values.block(0, heads, 0, dim), to_embedding, {},
           true);
  return {to_query.keep, to_key.keep, to_value.keep, to_output.keep, to_embedding.keep};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(kdkernels, CPU, m) {
  m.impl("attention", TORCH_BOX(&attention));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
  m.impl("attention_coefficients", TORCH_BOX(&coefficients));
  m.impl("attention_coefficients_backward", TORCH_BOX(&coefficients_backward));
}
