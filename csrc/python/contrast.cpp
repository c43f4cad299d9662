// SPDX-License-Identifier: Apache-2.0
#include "arrays.h"

namespace kd::python {
namespace {

// The loss; gradients, None or like the embeddings (B, D), are filled. Embeddings and banks are of
// one dtype and contiguous, as are index (B,) of int64 and negatives (B, K) of it or of int32.
double crd(const py::array& student, const py::array& teacher, const py::array& student_bank,
           const py::array& teacher_bank, std::vector<double> normalizer, const py::array& index,
           const py::array& negatives, double factor, std::vector<double> numbers,
           const py::object& grad_student, const py::object& grad_teacher, int threads) {
  kd::CrdParams p;
  static_cast<kd::CrdNumbers&>(p) = unpack<kd::CrdNumbers>(numbers);
  p.samples = student.shape(0), p.dim = student.shape(1);
  p.negatives = negatives.shape(1), p.bank_rows = teacher_bank.shape(0);
  if (p.bank_rows > INT32_MAX) throw py::value_error("a bank has at most 2^31 - 1 rows");
  p.in_double = dtype_of(student, "student") == kd::DType::float64;
  p.factor = factor;
  const py::array* const anchors[] = {&student, &teacher};
  const py::array* const banks[] = {&teacher_bank, &student_bank};
  const py::object* const grads[] = {&grad_student, &grad_teacher};
  for (int k = 0; k < 2; k++) {
    p.side[k].anchor = anchors[k]->data(), p.side[k].bank = banks[k]->data();
    p.side[k].normalizer = normalizer.at(k);
    if (!grads[k]->is_none()) p.side[k].grad = grads[k]->cast<py::array>().mutable_data();
  }
  p.index = static_cast<const int64_t*>(index.data());
  p.negative = negatives.data();
  p.narrow = negatives.itemsize() == sizeof(int32_t);
  p.negative_stride = p.negatives;
  std::vector<int32_t> sorted(p.samples * p.negatives);
  std::vector<int32_t> starts(p.samples * (kd::crd_tiles(p) + 1));
  std::vector<double> part(p.samples * kd::crd_padded(p) / (p.in_double ? 1 : 2));
  std::vector<double> sums(p.samples * kd::crd_sums(p)), losses(2 * p.samples);
  std::vector<const int32_t*> chosen(p.samples);
  p.sorted = sorted.data(), p.starts = starts.data(), p.part = part.data(), p.sums = sums.data();
  p.loss = losses.data(), p.chosen = chosen.data();
  {
    py::gil_scoped_release release;
    split_tasks(p.samples, threads, [&](int64_t a, int64_t b) { kd::kernels().crd(p, a, b); });
  }
  double loss = 0;
  for (int64_t i = 0; i < p.samples; i++) {
    if (!chosen[i])
      throw py::value_error("index and negatives must be in [0, " + std::to_string(p.bank_rows) +
                            "), those of sample " + std::to_string(i) + " are not.");
    loss += losses[i] + losses[p.samples + i];
  }
  return factor * loss;
}

// Fills `drawn` (B, K) of int32. All are contiguous, the others int64: labels and a permutation
// (n,), index and places in the permutation to begin at (B,).
void sample_negatives(const py::array& labels, const py::array& index, const py::array& shuffle,
                      const py::array& begin, py::array drawn, int threads) {
  kd::NegativesParams p;
  p.count = drawn.shape(1), p.rows = labels.shape(0);
  if (p.rows > INT32_MAX) throw py::value_error("at most 2^31 - 1 samples");
  std::vector<int64_t> shuffled(2 * p.rows);
  std::vector<int32_t> place(p.rows);
  std::vector<uint8_t> fault(index.shape(0));
  p.labels = static_cast<const int64_t*>(labels.data());
  p.index = static_cast<const int64_t*>(index.data());
  p.begin = static_cast<const int64_t*>(begin.data());
  p.drawn = static_cast<int32_t*>(drawn.mutable_data());
  p.shuffled = shuffled.data(), p.place = place.data(), p.fault = fault.data();
  const int64_t* const order = static_cast<const int64_t*>(shuffle.data());
  {
    py::gil_scoped_release release;
    kd::crd_shuffle(p, order, shuffled.data(), place.data());
    split_tasks(fault.size(), threads,
                [&](int64_t a, int64_t b) { kd::kernels().negatives(p, a, b); });
  }
  if (std::count(fault.begin(), fault.end(), 1))
    throw py::value_error("labels must be of more than one class.");
}

}  // namespace

void bind_contrast(py::module_& m) {
  m.def("crd", &crd);
  m.def("sample_negatives", &sample_negatives);
}

}  // namespace kd::python
