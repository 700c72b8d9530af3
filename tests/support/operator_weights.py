"""An oracle's arrays as the Vars that operators take. Imports Jittor."""

from typing import Any

import numpy as np

from moss_jt.backend import jt
from moss_jt.kernels.interface import BlockWeights, DenseMatrix
from tests.support.block_oracle import BlockArrays


def var(array: np.ndarray) -> Any:
    return jt.reuse_np_array(np.ascontiguousarray(array))


def dense_block(weights: BlockArrays) -> BlockWeights:
    matrices = ("qkv", "out", "fc_in", "fc_out")
    return BlockWeights(
        **{name: DenseMatrix(var(a)) if name in matrices else var(a) for name, a in weights.arrays.items()}
    )
