# SPDX-License-Identifier: Apache-2.0
"""The losses as functions, one module per family."""

from kdkernels.functional import (
    attention,
    batchwise,
    contrast,
    embeddings,
    ensemble,
    listwise,
    maps,
    relation,
    rowwise,
    sparse,
)
from kdkernels.functional.attention import *
from kdkernels.functional.batchwise import *
from kdkernels.functional.contrast import *
from kdkernels.functional.embeddings import *
from kdkernels.functional.ensemble import *
from kdkernels.functional.listwise import *
from kdkernels.functional.maps import *
from kdkernels.functional.relation import *
from kdkernels.functional.rowwise import *
from kdkernels.functional.sparse import *

__all__ = [
    *attention.__all__,
    *batchwise.__all__,
    *contrast.__all__,
    *embeddings.__all__,
    *ensemble.__all__,
    *listwise.__all__,
    *maps.__all__,
    *relation.__all__,
    *rowwise.__all__,
    *sparse.__all__,
]
