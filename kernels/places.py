"""Where the tokens of a pass belong: which sequence's each is, at which position, and in which pages that one's past lies.

A page is PAGE positions of one sequence in all layers of the cache. Tokens take one of two ways through the operators, and it
is theirs whoever shares the pass: *whole* pages, of a prompt, by products of matrices; *few* tokens (answers, drafts, what
fills no page) by kernels that give each token the same bits among any number of others.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from moss_jt.backend.jittor import jt
from moss_jt.kernels.interface import PAGE, Places

PAGES_AT_ONCE = 8  # by which tables of pages grow


def places_of(
    slots: Sequence[int] | np.ndarray,
    positions: Sequence[int] | np.ndarray,
    pages: Sequence[Sequence[int]],
    whole: int = 0,
    adapters: Sequence[int | None] = (),
) -> Places:
    """Places of tokens of several sequences.

    Args:
        slots, positions: one number for each token; whole pages first, each with its tokens in order.
        pages: each slot's pages in the order of its positions.
        adapters: each slot's adapter, by its number, or None; without any, no slot has one.

    Raises:
        ValueError: there are no tokens, a token has no page, or what should be whole pages is not.
    """
    slot, position = (np.asarray(numbers, np.int32) for numbers in (slots, positions))
    lengths = [len(numbers) for numbers in pages]
    # Rows and columns for more slots and pages: launches are recorded for each shape of the table, and are to be few.
    rows, most = 1 << (len(pages) - 1).bit_length(), max(lengths, default=0)
    padded = np.zeros((rows, -(-most // PAGES_AT_ONCE) * PAGES_AT_ONCE), np.int32)
    for row, numbers in zip(padded, pages, strict=False):
        row[: len(numbers)] = numbers
    table = padded[: len(pages), :most]
    if not len(slot) or len(slot) != len(position) or not _within(slot, len(pages)):
        raise ValueError(f"{len(slot)} tokens at {len(position)} positions of {len(pages)} sequences")
    ends = PAGE * np.array(lengths)[slot] if len(pages) > 1 else PAGE * most
    if not _within(position, ends):
        raise ValueError(f"a token's position is beyond the pages of its sequence, {most} at most")
    if table.size and table.min() < 0:
        raise ValueError("a page has a number below 0")
    _check_whole(slot, position, whole)
    tokens = np.empty((len(slot), 2), np.int32)
    tokens[:, 0], tokens[:, 1] = slot, position
    places = Places(slot, position, table, whole, jt.array(tokens), jt.array(padded))
    if all(adapter is None for adapter in adapters):
        return places
    of_slot = np.array([-1 if adapter is None else adapter for adapter in adapters], np.int32)
    of_token = of_slot[slot]
    return replace(places, adapters=of_token, adapter_tokens=jt.array(of_token[:, None]))


def _within(numbers: np.ndarray, ends: np.ndarray | int) -> bool:
    """Whether all are from 0 on and below ``ends``; a single one, as each pass of an answer has, takes no pass over arrays."""
    if len(numbers) == 1 and isinstance(ends, int):
        return 0 <= int(numbers[0]) < ends
    return bool((numbers >= 0).all() and (numbers < ends).all())


def _check_whole(slots: np.ndarray, positions: np.ndarray, whole: int) -> None:
    if whole == 0:
        return
    if whole % PAGE or not 0 <= whole <= len(slots):
        raise ValueError(f"{whole} of {len(slots)} tokens are no whole pages of {PAGE}")
    by_page = positions[:whole].reshape(-1, PAGE) - np.arange(PAGE)
    same_slot = slots[:whole].reshape(-1, PAGE)
    if (
        (by_page % PAGE != 0).any()
        or (by_page != by_page[:, :1]).any()
        or (same_slot != same_slot[:, :1]).any()
    ):
        raise ValueError("whole pages are not of one sequence, from their first position to their last")


def one_sequence(start: int, tokens: int, whole: int = 0) -> Places:
    """Places of ``tokens`` tokens from ``start`` on, of the one sequence whose pages are 0, 1, 2, ..."""
    end = start + tokens
    return places_of([0] * tokens, range(start, end), [range(-(-end // PAGE))], whole)
