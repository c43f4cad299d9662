// SPDX-License-Identifier: Apache-2.0
#define KD_KIND skew_forward
#include "../rowwise.h"
