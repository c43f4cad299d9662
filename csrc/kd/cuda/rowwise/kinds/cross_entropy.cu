// SPDX-License-Identifier: Apache-2.0
#define KD_KIND cross_entropy
#include "../rowwise.h"
