// SPDX-License-Identifier: Apache-2.0
// An axis of maps under levels of adaptive bins, for either binding.
#pragma once
#include <algorithm>
#include <vector>

#include "../../maps.h"

namespace kd {

// Of n elements; it holds what `axis` points to.
struct Axis {
  std::vector<int64_t> edge, first, last;
  Axis(int64_t n, const std::vector<int64_t>& levels, PyramidAxis& axis) : edge{0, n} {
    for (int64_t bins : levels)
      for (int64_t i = 0; i < bins; i++) {
        first.push_back(i * n / bins), last.push_back(((i + 1) * n + bins - 1) / bins);
      }
    for (const auto* ends : {&first, &last}) edge.insert(edge.end(), ends->begin(), ends->end());
    std::sort(edge.begin(), edge.end());
    edge.erase(std::unique(edge.begin(), edge.end()), edge.end());
    for (auto* ends : {&first, &last})
      for (int64_t& x : *ends) x = std::lower_bound(edge.begin(), edge.end(), x) - edge.begin();
    axis.size = n, axis.segments = edge.size() - 1;
    axis.edge = edge.data(), axis.first = first.data(), axis.last = last.data();
  }
};

}  // namespace kd
