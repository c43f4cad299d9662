// SPDX-License-Identifier: Apache-2.0
// How the CPU kernels hold a row; included before kd/rowwise.
#define KD_ROW

// One side's logits of the divergence's classes.
template <class S>
struct Side {
  RowReader<S> reader;
  int64_t patched = -1;      // a class that is read as `patch`
  S patch = 0;
  bool one_block;
  const S* read = nullptr;   // the row's only block, converted and patched once
  // Where the row is standardised, see standardize.h.
  double mean = 0, std = 0, spread = 0;
  alignas(64) S buffer[block];

  Side(const RowReader<S>& reader, int64_t classes)
      : reader(reader), one_block(classes <= block) {}

  const S* get(int64_t first, int n) {
    if (read) return read;
    const S* z = reader.get(first, n, buffer);
    if (patched >= first && patched < first + n) {
      if (z != buffer) __builtin_memcpy(buffer, z, n * sizeof(S));
      buffer[patched - first] = patch;
      z = buffer;
    }
    if (one_block) read = z;
    return z;
  }
  S at(int64_t i) const { return reader.at(i); }
};

template <class S>
struct Workspace {
  Workspace() {}  // left as it is, and not filled with zeros
  alignas(64) S exp_s[block], exp_t[block], ratio[block];  // exp(u_s), exp(u_t), u_t - u_s of a block
  bool ranged = false;  // both maxima are known before the row is measured
  bool finite;          // and that no class is off; or of the block that is measured
};

template <class S> constexpr bool has_nothing = true;
