// SPDX-License-Identifier: Apache-2.0
#define KD_KIND ab
#include "../rowwise.h"
