// SPDX-License-Identifier: Apache-2.0
#define KD_KIND js
#include "../rowwise.h"
