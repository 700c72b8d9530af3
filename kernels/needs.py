"""What the operators need beside weights and cache: the limits of a pass, and the memory that it takes.

No Jittor here: plans are made before it starts. The C++ gets these numbers as definitions (kernels/cpu/source.py), and
tests/test_needs.py compiles it and counts what it takes.
"""

from dataclasses import dataclass

from moss_jt.store.config import MossConfig
from moss_jt.store.sizes import CACHE_PAGE as PAGE
from moss_jt.store.sizes import page_aligned

FLOAT32, FLOAT16 = 4, 2

# Tokens that are worked on one by one at once, and rows of logits of a pass with one sequence: a draft, and the token before.
FEW_TOKENS = 23
# Rows of logits that are computed at once, and the most of a pass with several sequences.
HEAD_ROWS = 64

# The CPU's kernels. Positions of which keys and values are widened at a time for a whole page.
TILE_POSITIONS = 512
# Products with whole pages are done in tiles of this many rows and inputs, widened to float32, by oneDNN.
TILE_ROWS, TILE_INPUTS = 128, 2048
# Bytes of a matrix that a thread takes at once, otherwise.
LEAST_TAKEN, MOST_TAKEN = 128 << 10, 4 << 20
# Floats of a workspace that aligning its start may take.
ALIGNMENT = 16
LANES = 16
# Floats between rows of what oneDNN multiplies.
GAP = 16
# Inputs of oneDNN's product that it copies at once; what else a thread holds, its stack among it.
GEMM_INPUTS = 512
THREAD_FLOATS = 64 << 10

# Training's products on the CPU: tokens of one at once, rows of a matrix that are widened for its transpose, tiles of a float32
# result, and how many there must be before they are so large. Queries of a head that are worked on at once.
TRAIN_TOKENS, BACK_ROWS = 512, 512
TRAIN_ROWS, TRAIN_COLUMNS, FEW_TILES = 256, 512, 16
QUERIES = 64
# Floats by which the matrices of adapters are aligned.
BANK_UNIT = 16

# The GPU's. The most rows of whole pages in one product of cuBLAS's; fewer may come with rows of nothing.
PRODUCT_ROWS = 512
# Queries of a sample in one product of attention, where it is trained.
CARD_QUERIES = 128
# What the partial sums of one product may have of outputs beyond its own: as many blocks as fill a card, 32 rows each,
# and no part of fewer inputs.
SPLIT_OUTPUTS, SPLIT_INPUTS = 800 * 32, 1024

DEFINITIONS = {
    "MOSS_FEW_TOKENS": FEW_TOKENS,
    "MOSS_PAGE": PAGE,
    "MOSS_TILE_POSITIONS": TILE_POSITIONS,
    "MOSS_TILE_ROWS": TILE_ROWS,
    "MOSS_TILE_INPUTS": TILE_INPUTS,
    "MOSS_GAP": GAP,
    "MOSS_LEAST_TAKEN": LEAST_TAKEN,
    "MOSS_MOST_TAKEN": MOST_TAKEN,
    "MOSS_TRAIN_TOKENS": TRAIN_TOKENS,
    "MOSS_BACK_ROWS": BACK_ROWS,
    "MOSS_TRAIN_ROWS": TRAIN_ROWS,
    "MOSS_TRAIN_COLUMNS": TRAIN_COLUMNS,
    "MOSS_FEW_TILES": FEW_TILES,
    "MOSS_QUERIES": QUERIES,
    "MOSS_BANK_UNIT": BANK_UNIT,
}


def logit_rows(parallel: int) -> int:
    """The most rows of logits of one pass, where so many sequences are planned for: answers' next tokens, and drafts."""
    return FEW_TOKENS if parallel == 1 else HEAD_ROWS


@dataclass(frozen=True)
class CpuNeeds:
    """Of the CPU's operators over a model of this geometry whose blocks have ``bits`` bits per weight.

    rank        the most of the model's adapters; 0 without any
    cache_bits  of keys and values, 16 or 8
    """

    config: MossConfig
    bits: int
    rank: int = 0
    cache_bits: int = 16

    def block_floats(self, tokens: int, positions: int, *, onednn: bool, few: int | None = None) -> int:
        """The most that Workspace in block.h takes, the same all along the cache, so that memory is reused.

        Args:
            positions: of the cache.
            few: of the tokens, so many are in no whole page; None for all, as all are without oneDNN.

        The inputs of packed matrices are there once more, in the order and the form that these are quicker with. New values wait
        to be quantised where the cache is int8; keys wait in what attention fills later.
        """
        c = self.config
        few = tokens if few is None or not onednn else few
        columns = 3 * c.n_embd + c.n_inner + 2 * self.rank
        if self.bits < 16:
            columns += 3 * _input_floats(c.n_embd) + _input_floats(c.n_inner)
        if self.cache_bits == 8:
            columns += c.n_embd
        partial = c.n_head * -(-positions // PAGE) * (c.head_dim + 2)
        return ALIGNMENT + tokens * columns + min(few, FEW_TOKENS) * partial

    def head_floats(self, rows: int) -> int:
        """What run_head takes for its normed rows."""
        return ALIGNMENT + rows * self.config.n_embd

    def thread_floats(self, tokens: int, context: int) -> int:
        """What one thread may hold of its own (see scratch() in gemm.h): it grows, and stays.

        The rows that it works on, and its scores. With oneDNN, which does the products of long passes, tiles as floats with
        their scores, and what oneDNN copies of those.
        """
        c = self.config
        rows, scores = self._taken_rows(), 4 * c.n_head * (PAGE + LANES)
        without = rows * tokens + scores
        results, widened, copied = rows * tokens, scores, 0
        if tokens >= PAGE:
            positions = min(context, TILE_POSITIONS)
            head = positions * c.head_dim + PAGE * (context + GAP)
            widened, copied = max(widened, head), (positions + PAGE) * c.head_dim
            results, widened = max(results, TILE_ROWS * tokens), max(widened, TILE_ROWS * (TILE_INPUTS + GAP))
            copied = max(copied, (TILE_ROWS + tokens) * GEMM_INPUTS)
        return max(without, results + widened + copied) + THREAD_FLOATS

    def workspace_bytes(self, tokens: int, context: int, threads: int, parallel: int = 1) -> int:
        """One pass of ``tokens`` new tokens, with what the allocator keeps between passes.

        Per token: the residual stream and its copies (6 C) and twice the operators' intermediate results. The logits of a
        pass, too, twice. Then what each of the threads has of its own.
        """
        c = self.config
        block = self.block_floats(tokens, context, onednn=False)
        few = min(tokens, logit_rows(parallel)) * 2 * c.vocab_size
        own = threads * self.thread_floats(tokens, context)
        return (block + tokens * 6 * c.n_embd + few + own) * FLOAT32

    def _taken_rows(self) -> int:
        """The most rows that a thread takes at once of any product with few tokens: RowQueue::most_rows()."""
        c = self.config
        width, inner = (k * self.bits // 8 for k in (c.n_embd, c.n_inner))
        products = (
            (3 * c.n_embd, width),
            (c.n_inner, width),
            (c.n_embd, width + inner),
            (c.vocab_size, c.n_embd * FLOAT16),
        )
        return max(_most_rows(rows, row_bytes) for rows, row_bytes in products)


def _input_floats(inputs: int) -> int:
    """Of one token, as input_floats() in packed_few.h counts them."""
    return inputs + -(-inputs // 1024) * 16


def _most_rows(rows: int, row_bytes: int) -> int:
    least, most, half = (_eights(n) for n in (LEAST_TAKEN // row_bytes, MOST_TAKEN // row_bytes, rows // 2))
    return min(-(-rows // 8) * 8, max(least, min(most, half)))


def _eights(rows: int) -> int:
    return max(1, rows // 8) * 8


def training_thread_floats(config: MossConfig, longest: int) -> int:
    """What one thread may hold of its own in training.h: scores and their slopes over a sample of ``longest`` tokens, a widened
    tile, and what oneDNN copies of the largest product: rows, columns and inputs of either, and of one head over that sample.
    """
    tiles = max(TRAIN_TOKENS + TILE_ROWS, TRAIN_ROWS + TRAIN_COLUMNS) * GEMM_INPUTS
    head = (longest + config.head_dim) * max(QUERIES, config.head_dim)
    return 2 * QUERIES * longest + TILE_ROWS * (TILE_INPUTS + GAP) + max(tiles, head) + THREAD_FLOATS


@dataclass(frozen=True)
class CudaNeeds:
    """Of the GPU's operators: memory on the card.

    rank  the most of the model's adapters; 0 without any
    """

    config: MossConfig
    bits: int
    rank: int = 0

    def workspace_bytes(self, tokens: int) -> int:
        """Results within one pass of ``tokens`` new tokens, where passes of many tokens widen packed weights.

        Per token: twelve results of width C and four of width I (before and after GELU, for act-order, as float16 for
        cuBLAS), in float32. A pass's logits, twice, for HEAD_ROWS rows. The largest matrix in float16 if it is packed.
        """
        c = self.config
        if tokens >= PAGE:
            tokens = max(tokens, PRODUCT_ROWS)
        per_token = 12 * c.n_embd + 4 * c.n_inner + 2 * self.rank
        widened = 0 if self.bits == 16 else max(c.n_inner, 3 * c.n_embd) * c.n_embd * FLOAT16
        logits = 2 * HEAD_ROWS * c.vocab_size
        return (tokens * per_token + logits) * FLOAT32 + widened

    def short_pass_bytes(self, tokens: int, context: int) -> int:
        """Results within one of the passes that go without cuBLAS, which are another allocator's.

        Per token: eight results of width C and two of width I; the inputs of packed matrices in digits, by full chunks; what
        K's splitting adds to four products (see SPLIT_OUTPUTS); attention's partial results, one per head and
        PAGE positions; what adapters make of four inputs. And a page of memory for the gaps between them.
        """
        c = self.config
        partial = c.n_head * -(-context // PAGE) * (c.head_dim + 4)
        shapes = (3 * c.n_embd, c.n_embd), (c.n_embd, c.n_embd), (c.n_inner, c.n_embd), (c.n_embd, c.n_inner)
        split = sum(min(SPLIT_OUTPUTS, n * ((k - 1) // SPLIT_INPUTS)) for n, k in shapes)
        spans = 3 * -(-c.n_embd // SPLIT_INPUTS) + -(-c.n_inner // SPLIT_INPUTS)
        digits = 0 if self.bits == 16 else spans * SPLIT_INPUTS
        per_token = 8 * c.n_embd + 2 * c.n_inner + digits + split + partial + 4 * self.rank
        return min(tokens, FEW_TOKENS) * per_token * FLOAT32 + page_aligned(1)
