"""The memory that a training step takes beside the weights. No Jittor here: plans are made before it starts."""

from dataclasses import dataclass

from moss_jt.kernels.needs import FLOAT32, GEMM_INPUTS, THREAD_FLOATS, TILE_INPUTS, TILE_ROWS
from moss_jt.store.config import MossConfig

# Rows of which logits are computed at once.
LOSS_ROWS = 256
# As training.h: queries of a head at once, and rows of an sgemm's.
QUERIES, PRODUCT_TOKENS = 64, 512
# Values, their gradient, two moments, and a copy while they are written.
COPIES_OF_PARAMETERS = 5


@dataclass(frozen=True)
class TrainingNeeds:
    """Of a model whose adapters are trained on the CPU.

    step_tokens   tokens of one optimizer's step
    batch_tokens  tokens that a block takes at once
    parameters    that are trained
    keeps         what a block computed is kept until the step comes back to it, instead of being computed twice
    """

    config: MossConfig
    step_tokens: int
    batch_tokens: int
    parameters: int
    keeps: bool

    @property
    def input_bytes(self) -> int:
        """The blocks' inputs, which going backwards begins with."""
        return (self.config.n_layer + 1) * self.step_tokens * self.config.n_embd * FLOAT32

    @property
    def kept_bytes(self) -> int:
        """What :class:`moss_jt.train.block.Kept` holds of all blocks."""
        c = self.config
        return c.n_layer * self.step_tokens * (3 * c.n_embd + c.n_inner) * FLOAT32

    def workspace_bytes(self, tokens: int, context: int, threads: int, parallel: int = 1) -> int:
        """All of it. What a plan asks with is a pass's, and does not matter here: training has no cache.

        Per token of a batch: going backwards through a block holds some 16 results of width C and 6 of width I, some of them
        twice, on their way between Jittor and NumPy.
        """
        c = self.config
        block = self.batch_tokens * (20 * c.n_embd + 7 * c.n_inner)
        loss = 4 * LOSS_ROWS * (c.vocab_size + c.n_embd)
        own = TILE_ROWS * TILE_INPUTS + (PRODUCT_TOKENS + TILE_ROWS) * GEMM_INPUTS + THREAD_FLOATS
        own += 2 * QUERIES * self.batch_tokens
        floats = COPIES_OF_PARAMETERS * self.parameters + max(block, loss) + threads * own
        return floats * FLOAT32 + self.input_bytes + (self.kept_bytes if self.keeps else 0)
