# SPDX-License-Identifier: Apache-2.0
"""Every loss in plain torch: the specification, the oracle and the fallback.

Differentiable to any order, and under ``torch.func``. One module per family.
"""

from kdkernels.reference import maps, relation
from kdkernels.reference.attention import learning_simplifier
from kdkernels.reference.batchwise import dist, mlkd
from kdkernels.reference.contrast import crd, negatives
from kdkernels.reference.embeddings import attended, embedding
from kdkernels.reference.ensemble import ensemble
from kdkernels.reference.listwise import pld
from kdkernels.reference.rowwise import rowwise
from kdkernels.reference.sparse import sparse

__all__ = [
    "attended",
    "crd",
    "dist",
    "embedding",
    "ensemble",
    "learning_simplifier",
    "maps",
    "mlkd",
    "negatives",
    "pld",
    "relation",
    "rowwise",
    "sparse",
]
