"""What is learned from: token ids with a mask of targets, cut at whole turns."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moss_jt.chat.prompt import PromptEncoder, Segment
from moss_jt.errors import MossError
from moss_jt.train.formats import Losses, Sample
from moss_jt.train.learned_turns import Conversation, Learned, Mask, PlainText, turn_segments

# How finetune_moss.py cuts, and MOSS's longest text.
DEFAULT_LENGTH = 2048


@dataclass(frozen=True)
class TokenSample:
    """
    token_ids  int32 [T]
    targets    bool [T]; token t counts in the loss, as what the model should say after the tokens before it. The first is none.
    """

    token_ids: NDArray[np.int32]
    targets: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.token_ids)


class SampleEncoder:
    """Samples of one model's vocabulary.

    encoder      the model's
    end_of_text  the id that ends a text without turns: the model's own end, ``<|endoftext|>`` for base models
    length       tokens that a sample has at most
    mask         what counts in the loss, see moss_jt.train.learned_turns.turn_segments
    """

    def __init__(self, encoder: PromptEncoder, end_of_text: int, length: int, mask: Mask) -> None:
        self._encoder, self._end, self._length, self._mask = encoder, end_of_text, length, mask

    def encode(self, source: Sample, losses: Losses) -> TokenSample:
        """Of a conversation as many whole turns as fit, as the reference cuts; of a text its beginning.

        Raises:
            MossError: not even its first turn fits, or nothing is left to learn.
        """
        ids, targets = self._text(source) if isinstance(source, PlainText) else self._turns(source, losses)
        if len(ids) > self._length:
            losses.note("texts cut at the end")
            ids, targets = ids[: self._length], targets[: self._length]
        marks = np.array(targets, bool)
        marks[:1] = False
        if not marks.any():
            raise MossError(f"nothing in it is learned within {self._length} tokens.")
        return TokenSample(np.array(ids, np.int32), marks)

    def _turns(self, source: Conversation, losses: Losses) -> tuple[list[int], list[bool]]:
        ids, targets = self._encoded(Learned(segment, False) for segment in source.instruction)
        start = len(ids)
        for number, turn in enumerate(source.turns):
            more, learned = self._encoded(turn_segments(turn, self._mask))
            if len(ids) + len(more) > self._length:
                if len(ids) == start:
                    raise MossError(
                        f"its first turn ends at {len(ids) + len(more)} tokens, and a sample has {self._length} at most. "
                        "A larger --length takes it, where the memory allows."
                    )
                losses.counts["turns beyond the length"] += len(source.turns) - number
                break
            ids += more
            targets += learned
        return ids, targets

    def _text(self, source: PlainText) -> tuple[list[int], list[bool]]:
        ids, targets = self._encoded(
            [Learned(Segment(source.prompt, True), False), Learned(Segment(source.completion, True), True)]
        )
        return [*ids, self._end], [*targets, True]

    def _encoded(self, segments: Iterable[Learned]) -> tuple[list[int], list[bool]]:
        ids: list[int] = []
        targets: list[bool] = []
        for segment, target in segments:
            more = self._encoder.encode([segment])
            ids += more
            targets += [target] * len(more)
        return ids, targets
