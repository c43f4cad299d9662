# SPDX-License-Identifier: Apache-2.0
"""What a computation costs the dispatcher."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Operators that touch data, and the largest tensor they make."""

    def __init__(self):
        super().__init__()
        self.operators, self.largest = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        self.operators += not operator.is_view
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.nbytes)
        return result
