"""The memory that a training step takes beside the weights. No Jittor here: plans are made before it starts."""

from dataclasses import dataclass

from moss_jt.kernels.needs import FLOAT16, FLOAT32, training_thread_floats
from moss_jt.store.architecture import block_tensors, bytes_of
from moss_jt.store.config import MossConfig

# Rows of which logits are computed at once.
LOSS_ROWS = 256
# The writing of a checkpoint of a model, in copies of its float32 weights: all of it once more in float16.
WRITTEN = 0.5
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
        own = training_thread_floats(c, self.batch_tokens)
        floats = COPIES_OF_PARAMETERS * self.parameters + max(block, loss) + threads * own
        return floats * FLOAT32 + self.input_bytes + (self.kept_bytes if self.keeps else 0)


@dataclass(frozen=True)
class FullNeeds:
    """Of a model all of whose weights learn, on the CPU. Nothing streams.

    step_tokens, batch_tokens, keeps  as of TrainingNeeds
    parameters                        of the model
    copies                            of them that the optimizer remembers
    """

    config: MossConfig
    step_tokens: int
    batch_tokens: int
    parameters: int
    copies: int
    keeps: bool

    @property
    def frozen(self) -> TrainingNeeds:
        """What the same step takes where no weight learns."""
        return TrainingNeeds(self.config, self.step_tokens, self.batch_tokens, 0, self.keeps)

    @property
    def kept_bytes(self) -> int:
        return self.frozen.kept_bytes

    def bytes(self, threads: int) -> int:
        """All of it, weights included. Of gradients there are the largest block's, or those of the head and the embedding; an
        update makes two more of one tensor's size.
        """
        c = self.config
        block = bytes_of(block_tensors(c, 16, 0)) // FLOAT16
        gradients = max(block, 2 * c.vocab_size * c.n_embd) + 2 * max(c.vocab_size, c.n_inner) * c.n_embd
        floats = int((1 + self.copies + WRITTEN) * self.parameters) + gradients
        return floats * FLOAT32 + self.frozen.workspace_bytes(1, 1, threads)
