// SPDX-License-Identifier: Apache-2.0
#define KD_KIND jeffreys
#include "../rowwise.h"
