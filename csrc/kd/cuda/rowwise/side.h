// SPDX-License-Identifier: Apache-2.0
// How a GPU's threads hold a row: each all of it, but for the classes.
#define KD_ROW KD_DEVICE

template <class S>
struct Side {
  static constexpr bool one_block = false;
  RowReader<S> reader;
  int64_t patched = -1;  // a class that is read as `patch`
  S patch = 0;
  double mean = 0, std = 0, spread = 0;

  KD_DEVICE Side(const RowReader<S>& reader, int64_t) : reader(reader) {}
  KD_DEVICE S at(int64_t i) const { return reader.at(i); }
  KD_DEVICE S get(int64_t i) const { return i == patched ? patch : at_least(at(i), floor_of<S>); }
  // The same of a chunk that was read from `first` on.
  KD_DEVICE void amend(int64_t first, S (&z)[width<S>]) const {
    if (patched < 0 || patched < first || patched >= first + width<S>) return;
    const bool off = sizeof(S) == 4 && patch <= floor_of<S>;
    for (int j = 0; j < width<S>; j++)
      if (first + j == patched) z[j] = off ? -S(__builtin_inf()) : patch;
  }
};

struct Slots;

template <class S>
struct Workspace {
  Group& group;
  Slots& slots;   // none where rows are read from where they lie
  double& total;  // of the losses of this group's rows
  bool close = false;  // sum |exp(u_t) - exp(u_s)| is small beside the sums
  bool held = false;  // what this thread has of a narrow row is here, and so in registers
  S held_s[held_chunks][width<S>], held_t[held_chunks][width<S>];

  KD_DEVICE Workspace(Group& group, Slots& slots, double& total)
      : group(group), slots(slots), total(total) {}
};

// A row that fp32 can hold has finite terms, and times 0 they are nothing.
template <class S> constexpr bool has_nothing = sizeof(S) == 8;
