// SPDX-License-Identifier: Apache-2.0
#define KD_KIND reverse_kl
#include "../rowwise.h"
