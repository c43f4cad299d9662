// SPDX-License-Identifier: Apache-2.0
#define KD_KIND forward_kl
#include "../rowwise.h"
