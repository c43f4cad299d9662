// SPDX-License-Identifier: Apache-2.0
#define KD_KIND renyi
#include "../rowwise.h"
