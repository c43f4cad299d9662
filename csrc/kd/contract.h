// SPDX-License-Identifier: Apache-2.0
// What kdkernels/contract.py looks for in a binary before it is used: raise both numbers when what
// kernels take, leave or save changes its meaning.
#pragma once

namespace kd {
[[gnu::used]] static const char contract[] = "kdkernels contract 3.";
}
