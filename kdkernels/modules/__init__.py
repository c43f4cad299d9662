# SPDX-License-Identifier: Apache-2.0
"""The losses as ``torch.nn`` modules, one file per family; each says what is public."""

from kdkernels.modules import (
    attention,
    batchwise,
    classifier,
    contrast,
    embeddings,
    ensemble,
    factors,
    listwise,
    maps,
    relation,
    review,
    rowwise,
    semckd,
    sparse,
)
from kdkernels.modules.attention import *
from kdkernels.modules.batchwise import *
from kdkernels.modules.classifier import *
from kdkernels.modules.contrast import *
from kdkernels.modules.embeddings import *
from kdkernels.modules.ensemble import *
from kdkernels.modules.factors import *
from kdkernels.modules.listwise import *
from kdkernels.modules.maps import *
from kdkernels.modules.relation import *
from kdkernels.modules.review import *
from kdkernels.modules.rowwise import *
from kdkernels.modules.semckd import *
from kdkernels.modules.sparse import *

__all__ = [
    *attention.__all__,
    *batchwise.__all__,
    *classifier.__all__,
    *contrast.__all__,
    *embeddings.__all__,
    *ensemble.__all__,
    *factors.__all__,
    *listwise.__all__,
    *maps.__all__,
    *relation.__all__,
    *review.__all__,
    *rowwise.__all__,
    *semckd.__all__,
    *sparse.__all__,
]
