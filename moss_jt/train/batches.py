"""The samples of a step, dealt to batches: what a block takes at once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from moss_jt.kernels.training import Spans
from moss_jt.train.block import Kept
from moss_jt.train.masked_samples import TokenSample


@dataclass
class Batch:
    """Samples that a block takes at once.

    rows   where their tokens stand among those of the step
    spans  (S, 2) int32: of each sample its first row within the batch, and its rows
    kept   by block
    """

    rows: slice
    spans: Spans
    kept: dict[int, Kept] = field(default_factory=dict)


def batches_of(samples: Sequence[TokenSample], batch_tokens: int) -> list[Batch]:
    """Whole samples, so many of them one after another as have about ``batch_tokens`` tokens."""
    batches: list[Batch] = []
    lengths: list[int] = []
    begin = 0
    for number, sample in enumerate(samples):
        lengths.append(len(sample))
        following = len(samples[number + 1]) if number + 1 < len(samples) else batch_tokens
        if sum(lengths) + following > batch_tokens:
            firsts = np.cumsum([0, *lengths[:-1]])
            spans = np.stack([firsts, lengths], axis=1).astype(np.int32)
            batches.append(Batch(slice(begin, begin + sum(lengths)), spans))
            begin += sum(lengths)
            lengths = []
    return batches
