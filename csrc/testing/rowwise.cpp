// SPDX-License-Identifier: Apache-2.0
// The rowwise family's CUDA kernels under the simulator, on NumPy arrays; bfloat16 is uint16.
#include "../kd/cuda/rowwise.h"

#include "../kd/cuda/device.h"
#include "../python/arrays.h"

namespace kd::python {
namespace {

kd::Rows bits_or_rows(const py::object& o, const char* name) {
  if (o.is_none()) return {};
  auto a = o.cast<py::array>();
  if (a.dtype().kind() != 'u') return rows_of(a, name);
  kd::Rows rows = rows_of(a.view("float16"), name);
  rows.dtype = kd::DType::bfloat16;
  return rows;
}

// Fills loss, the gradients and row_grads; returns how the call was laid out.
py::dict rowwise(const py::array& student, const py::array& teacher, std::vector<double> numbers,
                 std::vector<int64_t> choices, const py::object& labels, const py::object& mask,
                 const py::object& row_weight, const py::object& temperature,
                 const py::object& teacher_temperature, const py::object& targets, bool counted,
                 bool slopes, py::array loss, const py::object& grad_student,
                 const py::object& grad_teacher, const py::object& row_grads, uint64_t seed) {
  cuda::RowwiseCall p;
  static_cast<kd::RowwiseNumbers&>(p) = unpack<kd::RowwiseNumbers>(numbers);
  static_cast<kd::RowwiseChoices&>(p) = unpack<kd::RowwiseChoices>(choices);
  py::array_t<double> unused(1);
  describe_rows(p, student, labels, mask, row_weight, 1, unused, py::none());
  if (p.label_probs.data) p.label_probs = bits_or_rows(labels, "labels");
  p.row_loss = nullptr;
  p.student = bits_or_rows(student, "student"), p.teacher = bits_or_rows(teacher, "teacher");
  p.teacher_classes = teacher.shape(1);
  p.teacher_first = p.teacher_classes == p.classes ? p.first : 0;
  p.targets = targets.is_none() ? p.labels
                                : static_cast<const int64_t*>(targets.cast<py::array>().data());
  p.tau_s = scalar_of(temperature), p.tau_t = scalar_of(teacher_temperature);
  p.grad_student = bits_or_rows(grad_student, "grad_student");
  p.grad_teacher = bits_or_rows(grad_teacher, "grad_teacher");
  p.slopes = slopes;
  if (!row_grads.is_none()) {
    p.row_grads = static_cast<double*>(row_grads.cast<py::array>().mutable_data());
    p.parts = row_grads.cast<py::array>().shape(0) == 6;
  }
  p.counted = counted, p.by_row = loss.ndim() == 1, p.loss = loss.mutable_data();
  cuda::plan(p);
  std::vector<uint8_t> inexact(p.rows);
  std::vector<double> partial(p.groups + p.double_groups);
  int64_t count = 0;
  int finished = 5;
  p.inexact = inexact.data(), p.partial = partial.data(), p.count = &count, p.finished = &finished;
  cuda::simt::settings.seed = seed;
  cuda::rowwise(p, nullptr);
  py::dict plan;
  plan["cluster"] = p.cluster, plan["slots"] = p.slots, plan["one_warp"] = p.one_warp;
  plan["narrow"] = p.narrow, plan["threads"] = p.threads;
  plan["groups"] = p.groups, plan["shared_bytes"] = p.shared_bytes;
  plan["inexact"] = std::count(inexact.begin(), inexact.end(), 1);
  return plan;
}

void set_device(int capability, int multiprocessors, size_t shared_bytes, size_t shared_in_all,
                size_t shared_reserved) {
  cuda::simt::settings.properties = {capability, multiprocessors, shared_bytes,
                                     shared_in_all ? shared_in_all : shared_bytes, shared_reserved};
}
void set_limits(int64_t warp, int64_t narrow, int threads, int warps, int slot_chunks) {
  cuda::limits.warp = warp, cuda::limits.narrow = narrow, cuda::limits.threads = threads;
  cuda::limits.warps = warps, cuda::limits.slot_chunks = slot_chunks;
}

}  // namespace
}  // namespace kd::python

PYBIND11_MODULE(simulated_rowwise, m) {
  m.def("rowwise", &kd::python::rowwise);
  using pybind11::arg;
  m.def("set_device", &kd::python::set_device, arg("capability"), arg("multiprocessors"),
        arg("shared_bytes"), arg("shared_in_all") = 0, arg("shared_reserved") = 0);
  m.def("set_limits", &kd::python::set_limits);
}
