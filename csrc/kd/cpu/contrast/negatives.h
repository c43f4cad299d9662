// SPDX-License-Identifier: Apache-2.0
// Negatives of samples: windows of one shuffle of the data set, without the sample's own class.
// Included inside an ISA level's namespace. They come in ascending order, in which the bank is read
// tile by tile without being sorted for it, from a scan of each sample's place in the shuffle: 12 n
// bytes in L2, and the 4 K written.
#pragma once

// How many places from `begin` on hold `count` samples that are not of class `own`, all n if there
// are fewer; `found` says how many it has seen.
KD_FN int64_t window(const NegativesParams& p, int64_t own, int64_t begin, int64_t count,
                     int64_t* found) {
  constexpr int step = 64;
  const int64_t* const classes = p.shuffled + begin;
  int64_t length = 0, others = 0;
  for (; length + step <= p.rows && others + step <= count; length += step)
    for (int j = 0; j < step; j++) others += classes[length + j] != own;
  for (; length < p.rows && others < count; length++) others += classes[length] != own;
  *found = others;
  return length;
}

// Writes first + k for every k < n, of at most `block`, that is taken; returns where the next goes.
KD_FN int32_t* pick(const uint8_t* taken, int n, int32_t first, int32_t* to,
                    [[maybe_unused]] const int32_t* end) {
#if KD_BYTES == 64
  constexpr int step = 16;
  vi number;
  for (int k = 0; k < step; k++) number[k] = first + k;
  const auto first_of = [](int lanes) { return (__mmask16)((1u << lanes) - 1); };
  for (int k = 0; k < n; k += step) {
    const __m128i flags = _mm_maskz_loadu_epi8(first_of(n - k < step ? n - k : step), taken + k);
    const __mmask16 some = _mm_test_epi8_mask(flags, flags);
    const int count = __builtin_popcount(some);
    const __m512i found = _mm512_maskz_compress_epi32(some, (__m512i)number);
    _mm512_mask_storeu_epi32(to, first_of(count), found);
    to += count;
    number += step;
  }
#else
  for (int k = 0; k < n && to < end; k++) {  // without a branch that could not be foretold
    *to = first + k;
    to += taken[k];
  }
#endif
  return to;
}

void negatives(const NegativesParams& p, int64_t first, int64_t last) {
  for (int64_t i = first; i < last; i++) {
    const int64_t own = p.labels[p.index[i]], begin = p.begin[i];
    int32_t* to = p.drawn + i * p.count;
    int64_t others, repeats = 0, length = window(p, own, begin, p.count, &others);
    p.fault[i] = others == 0;
    if (p.fault[i]) continue;
    if (others < p.count) {  // all of them so often, and some once more
      repeats = p.count / others;
      length = window(p, own, begin, p.count % others, &others);
    }
    const int32_t* const end = to + p.count;
    for (int64_t j = 0; to < end; j += block) {
      const int n = p.rows - j < block ? (int)(p.rows - j) : block;
      const int64_t* const labels = p.labels + j;
      const int32_t *const place = p.place + j, start = (int32_t)begin, rows = (int32_t)p.rows;
      uint8_t other[block], taken[block];
      for (int k = 0; k < n; k++) other[k] = labels[k] != own;
      for (int k = 0; k < n; k++) {
        const int32_t passed = place[k] - start;
        taken[k] = other[k] & (passed + (passed < 0 ? rows : 0) < (int32_t)length);
      }
      if (repeats)
        for (int k = 0; k < n; k++)
          for (int64_t left = other[k] ? repeats + taken[k] : 0; left > 0; left--)
            *to++ = (int32_t)(j + k);
      else
        to = pick(taken, n, (int32_t)j, to, end);
    }
  }
}
