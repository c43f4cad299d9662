// SPDX-License-Identifier: Apache-2.0
// A row of the sparse family while it is being worked on, and its first step, `collect`.

// Memory of one task, for a row at a time.
template <class S>
struct Scratch {
  double *z, *v;          // (k + 1,) the student's logits and the teacher's values
  double *log_s, *log_t;  // log-probabilities; the tail's stand last
  double *to_s, *to_t;    // gradients per du of either side
  double *p_s, *p_t;
  int64_t *id, *slot;     // (k,) class, and place among the row's k values
  S* top;                 // by block: what its exponentials are relative to
  S* kept;                // (C,) the exponentials, where the gradient's row cannot hold them
  uint8_t* stored;        // (C / 8,) a bit for every class: whether the row has stored it
  char* memory;

  explicit Scratch(const TopKParams& p) {
    const size_t k = p.k + 1, blocks = p.classes / block + 1, bytes = p.classes / 8 + 4;
    const bool apart = p.grad_student.data && !RowWriter<S>(p.grad_student, 0, false).direct;
    const size_t kept_size = apart ? (p.classes * sizeof(S) + 63) / 64 * 64 : 0;
    memory = (char*)operator new(64 + kept_size + 8 * (10 * k + blocks) + bytes);
    char* at = memory + (-(uintptr_t)memory & 63);
    kept = (S*)at, at += kept_size;
    double** const arrays[] = {&z, &v, &log_s, &log_t, &to_s, &to_t, &p_s, &p_t};
    for (double** array : arrays) *array = (double*)at, at += 8 * k;
    id = (int64_t*)at, at += 8 * k;
    slot = (int64_t*)at, at += 8 * k;
    top = (S*)at, at += 8 * blocks;
    stored = (uint8_t*)at;
    __builtin_memset(stored, 0, bytes);
  }
  ~Scratch() { operator delete(memory); }
  Scratch(const Scratch&) = delete;
};

template <class S>
struct Row {
  const TopKParams& p;
  Scratch<S>& w;
  int64_t index;
  RowReader<S> student;
  RowWriter<S> to_student;     // its gradient
  S* kept;                     // (C,) the tail's exponentials, that gradient but for a factor; or null
  double tau_s, tau_t;
  // collected
  int n = 0;                   // stored classes
  bool sound = true;           // no NaN, +inf
  Fault fault = Fault::none;
  // measured, of the tail
  S top = floor_of<S>;         // not far below the largest logit; floor_of: no class has one
  double sum = 0;              // of exp((z - top) / tau_s)
  double slope = 0;            // of exp(...) (z - top)
  // compared
  int terms = 0;               // n, or n + 1
  double log_tail = -infinity; // log of the mass that the teacher's values leave
  double whole = 0;            // the teacher's logsumexp, where known
  double value = 0;

  Row(const TopKParams& p, Scratch<S>& w, int64_t i)
      : p(p), w(w), index(i), student{p.student, row_offset(p.student, i)},
        to_student(p.grad_student, i, false),
        kept(to_student.wanted() ? to_student.at(0, w.kept) : nullptr), tau_s(get(p.tau_s, i)),
        tau_t(get(p.tau_t, i)) {}
  bool student_has_tail() const { return top > floor_of<S> || top != top; }
  bool has_tail() const { return terms > n; }
};

template <class S>
void collect(Row<S>& r) {
  const TopKParams& p = r.p;
  Scratch<S>& w = r.w;
  const RowReader<double> values{p.values, row_offset(p.values, r.index)};
  const int64_t* ids = p.indices + r.index * p.k;
  double buffer[block];
  for_blocks(p.k, [&](int64_t first, int n) {
    const double* v = values.get(first, n, buffer);
    for (int j = 0; j < n; j++) {
      if (v[j] == -infinity) continue;
      const int64_t id = ids[first + j];
      const uint8_t bit = 1 << (id & 7);
      if (id < 0 || id >= p.classes) r.fault = Fault::index;
      else if (w.stored[id / 8] & bit) r.fault = Fault::duplicate;
      if (r.fault != Fault::none) return;
      w.stored[id / 8] |= bit;
      w.v[r.n] = v[j], w.id[r.n] = id, w.slot[r.n++] = first + j;
      r.sound &= v[j] < infinity;
    }
  });
}
// Forgets the row's stored classes.
template <class S>
void release(Row<S>& r) {
  for (int i = 0; i < r.n; i++) r.w.stored[r.w.id[i] / 8] = 0;
}
