// SPDX-License-Identifier: Apache-2.0
// Sweeps over the classes of a row, vector by vector and block by block. Included inside an ISA
// level's namespace, after simd.h and staging.h.

struct Whole {};
struct Finite : Whole {};  // and no class is off
struct Part { int n; };
template <class V, class W = Whole, class Body>
KD_FN void sweep(int n, const Body& body) {
  int i = 0;
  for (; i + Lanes<V>::count <= n; i += Lanes<V>::count) body(i, W{});
  if (i < n) body(i, Part{n - i});
}
// A sum over a block. Equal terms all round the same way, so that it would drift: the sweep below
// folds it after every `run` vectors.
constexpr int run = 16;
template <class V>
struct Sum {
  V recent{}, folded{};
  KD_FN void operator+=(V term) { recent += term; }
  KD_FN void fold() { folded += recent, recent = V{}; }
};
template <class V>
KD_FN typename Lanes<V>::S sum(const Sum<V>& s) { return sum(s.folded + s.recent); }

template <class V, class W = Whole, class Body, class Fold>
KD_FN void sweep(int n, const Body& body, const Fold& fold) {
  constexpr int count = Lanes<V>::count;
  int i = 0;
  while (i + count <= n) {
    const int end = n - i < run * count ? n : i + run * count;
    for (; i + count <= end; i += count) body(i, W{});
    fold();
  }
  if (i < n) body(i, Part{n - i});
}
template <class Body>
KD_FN void for_blocks(int64_t classes, const Body& body) {
  for (int64_t first = 0; first < classes; first += block)
    body(first, classes - first < block ? (int)(classes - first) : block);
}

template <class V, class S>
KD_FN V read(const S* p, Whole, S) { return load<V>(p); }
template <class V, class S>
KD_FN V read(const S* p, Part part, S fill) { return load(p, part.n, fill); }
template <class V, class S>
KD_FN void write(S* p, Whole, V v) { store(p, v); }
template <class V, class S>
KD_FN void write(S* p, Part part, V v) { store(p, part.n, v); }
template <class V, class S, class W>
KD_FN V read_logits(const S* p, W w) {
  return at_least(read<V>(p, w, floor_of<S>), all<V>(floor_of<S>));
}
template <class V, class S>
KD_FN V read_logits(const S* p, Finite) { return load<V>(p); }
// 0 where there is no class.
template <class V>
KD_FN V within(V v, Whole) { return v; }
template <class V>
KD_FN V within(V v, Part part) { return without(v, ~0u << part.n, 0); }
