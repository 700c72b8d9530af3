"""The memory that a training step takes beside the weights. No Jittor here: plans are made before it starts."""

from dataclasses import dataclass, replace
from typing import Literal

from moss_jt.kernels.needs import CARD_QUERIES, FLOAT16, FLOAT32, training_thread_floats
from moss_jt.store.architecture import block_tensors, bytes_of
from moss_jt.store.config import MossConfig

# Rows of which logits are computed at once.
LOSS_ROWS = 256
# The writing of a checkpoint of a model, in copies of its float32 weights: all of it once more in float16.
WRITTEN = 0.5
# Values, their gradient, two moments, and a copy while they are written.
COPIES_OF_PARAMETERS = 5


@dataclass(frozen=True)
class Keeping:
    """Where what blocks compute on the way there waits for the way back. What waits nowhere is computed again.

    in_memory       of the last so many blocks, in memory
    on_disk         of so many blocks before those, in a file
    inputs_on_disk  the blocks' inputs are in the file, too, and not in memory
    """

    in_memory: int = 0
    on_disk: int = 0
    inputs_on_disk: bool = False

    def where(self, layer: int, layers: int) -> Literal["memory", "disk", "nowhere"]:
        """Of block ``layer`` of a model of ``layers``."""
        after = layers - layer  # from the end, the last block is 1
        if after <= self.in_memory:
            return "memory"
        return "disk" if after <= self.in_memory + self.on_disk else "nowhere"

    @property
    def uses_disk(self) -> bool:
        return self.on_disk > 0 or self.inputs_on_disk


@dataclass(frozen=True)
class TrainingNeeds:
    """Of a model whose adapters are trained on the CPU.

    step_tokens   tokens of one optimizer's step
    batch_tokens  tokens that a block takes at once
    parameters    that are trained
    trained       so many of the last blocks have adapters; None for all
    """

    config: MossConfig
    step_tokens: int
    batch_tokens: int
    parameters: int
    keeping: Keeping = Keeping()
    trained: int | None = None

    @property
    def trained_blocks(self) -> int:
        return self.config.n_layer if self.trained is None else self.trained

    @property
    def input_bytes(self) -> int:
        """The trained blocks' inputs, which going backwards begins with, and the last one's result."""
        return (self.trained_blocks + 1) * self.step_tokens * self.config.n_embd * FLOAT32

    @property
    def kept_block_bytes(self) -> int:
        """What :class:`moss_jt.train.block.Kept` holds of one block."""
        return self.step_tokens * self._kept_floats * FLOAT32

    @property
    def file_bytes(self) -> int:
        """What a step writes to the disk, and reads again."""
        inputs = self.input_bytes if self.keeping.inputs_on_disk else 0
        return self.keeping.on_disk * self.kept_block_bytes + inputs

    @property
    def _kept_floats(self) -> int:
        return 3 * self.config.n_embd + self.config.n_inner

    def workspace_bytes(self, tokens: int, context: int, threads: int, parallel: int = 1) -> int:
        """All of it. What a plan asks with is a pass's, and does not matter here: training has no cache.

        Per token of a batch: going backwards through a block holds some 16 results of width C and 6 of width I, some of them
        twice, on their way between Jittor and NumPy. What goes to the disk lies beside that in memory that the disk can read.
        """
        c = self.config
        block = self.batch_tokens * (20 * c.n_embd + 7 * c.n_inner)
        loss = 4 * LOSS_ROWS * (c.vocab_size + c.n_embd)
        own = training_thread_floats(c, self.batch_tokens)
        floats = COPIES_OF_PARAMETERS * self.parameters + max(block, loss) + threads * own
        if self.keeping.uses_disk:
            floats += 2 * self.batch_tokens * self._kept_floats
        # Of a step whose inputs lie on the disk, a block's input, its result, and what came back so far are in memory.
        inputs = (
            3 * self.step_tokens * c.n_embd * FLOAT32 if self.keeping.inputs_on_disk else self.input_bytes
        )
        return floats * FLOAT32 + inputs + self.keeping.in_memory * self.kept_block_bytes


@dataclass(frozen=True)
class CardNeeds:
    """Of the same training on a card, which has what a block takes at once. Blocks' inputs, the adapter, its gradients and its
    moments are on the host, and the rest is computed again.

    training   keeps nothing but inputs
    bits       of the model's matrices
    slab_rows  of the head, the most of a slab
    """

    training: TrainingNeeds
    bits: int
    slab_rows: int

    def workspace_bytes(self, tokens: int) -> int:
        """On the card, whatever the tokens of a pass. Going backwards through a block holds some 16 results of width C and 5 of
        width I for each token, and the block's adapters with what is added to their gradients; the loss three slabs' logits.
        """
        c, needs = self.training.config, self.training
        block = needs.batch_tokens * (16 * c.n_embd + 5 * c.n_inner)
        loss = LOSS_ROWS * (3 * self.slab_rows + 4 * c.n_embd)
        adapters = 3 * needs.parameters // needs.trained_blocks
        return (max(block, loss) + adapters) * FLOAT32 + self.pool_bytes

    def short_pass_bytes(self, tokens: int, context: int) -> int:
        return 0

    @property
    def pool_bytes(self) -> int:
        """Of it, what operations need for themselves, from CuPy's pool: activations in float16; where matrices are packed, the
        largest widened, and a product in its order; queries and keys with their derivatives, scores with theirs; an eighth more.
        """
        c, tokens = self.training.config, self.training.batch_tokens
        width = max(3 * c.n_embd, c.n_inner)
        product = tokens * max(width, self.slab_rows) * FLOAT16
        if self.bits < 16:
            product += width * c.n_embd * FLOAT16 + tokens * c.n_inner * FLOAT32
        attention = (4 * tokens * c.n_embd + 2 * c.n_head * CARD_QUERIES * tokens) * FLOAT32
        return max(product, attention) * 9 // 8

    @property
    def host_bytes(self) -> int:
        """What the host holds for it beside the process: the adapter's copies, inputs, and some rows for each token of a step."""
        c, needs = self.training.config, self.training
        rows = 3 if needs.keeping.inputs_on_disk else needs.trained_blocks + 1
        tokens = (rows + 8) * needs.step_tokens + 4 * needs.batch_tokens
        return (COPIES_OF_PARAMETERS * needs.parameters + tokens * c.n_embd) * FLOAT32


@dataclass(frozen=True)
class FullNeeds:
    """Of a model all of whose weights learn, on the CPU. Nothing streams.

    step_tokens, batch_tokens, keeps  as of TrainingNeeds
    parameters                        of the model
    copies                            of them that the optimizer remembers
    gathers                           all gradients exist at once
    """

    config: MossConfig
    step_tokens: int
    batch_tokens: int
    parameters: int
    copies: int
    keeps: bool
    gathers: bool

    @property
    def frozen(self) -> TrainingNeeds:
        """What the same step takes where no weight learns."""
        kept = Keeping(in_memory=self.config.n_layer if self.keeps else 0)
        return TrainingNeeds(self.config, self.step_tokens, self.batch_tokens, 0, kept)

    def bytes(self, threads: int) -> int:
        """All of it, weights included. Of gradients there are all, or the largest block's, or those of the head and the embedding;
        an update makes two more of one tensor's size.
        """
        c = self.config
        block = bytes_of(block_tensors(c, 16, 0)) // FLOAT16
        gradients = max(block, 2 * c.vocab_size * c.n_embd) + 2 * max(c.vocab_size, c.n_inner) * c.n_embd
        floats = int((1 + self.copies + WRITTEN + self.gathers) * self.parameters) + gradients
        return floats * FLOAT32 + self.frozen.workspace_bytes(1, 1, threads)

    def within(self, budget_bytes: int, threads: int) -> "FullNeeds":
        """These where they fit; otherwise without gathered gradients; otherwise those of computing again what blocks have
        computed, too, whether they fit or not.
        """
        lean = replace(self, gathers=False)
        for needs in (self, lean):
            if needs.bytes(threads) <= budget_bytes:
                return needs
        return replace(lean, keeps=False)
