"""How long a user waits for the first word of the first answer: an expectation, computed from a plan and its speeds."""

from dataclasses import dataclass

from moss_jt.plan.report import Speed
from moss_jt.plan.residency import ResidencyPlan
from moss_jt.plan.summary import duration

# MOSS's meta instruction with its switches has 284 tokens; a short question comes after it.
PROMPT_TOKENS = 300
GFLOP = 10**9
# On the CPU, int8 and int4 read prompts through the integer units, about twice as fast as a float32 product would.
INTEGER_GAIN = 2


@dataclass(frozen=True)
class FirstWord:
    """Seconds that it takes to load the weights that stay, and to read the prompt; and until both are done."""

    tokens: int
    load_s: float
    read_s: float
    seconds: float
    products: Speed

    def __str__(self) -> str:
        speed = f"{self.products.bytes_per_s / GFLOP:.0f} GFLOP/s {self.products.source}"
        meanwhile = "meanwhile " if self.seconds < self.load_s + self.read_s else ""
        return (
            f"The first word is expected after about {duration(self.seconds)}: {duration(self.load_s)} to load the weights, "
            f"{meanwhile}{duration(self.read_s)} to read {self.tokens} tokens of instruction and question ({speed})."
        )


def first_word(plan: ResidencyPlan, disk_bytes_per_s: float, products: Speed) -> FirstWord:
    """What to expect on a machine that multiplies matrices at that speed (``products``, in FLOP per second).

    Resident weights are loaded from the disk, and the prompt is read in passes, each of which streams the other weights while it
    computes: at once on the CPU, one after the other on a GPU.
    """
    tokens = min(PROMPT_TOKENS, plan.context)
    passes = -(-tokens // plan.pass_tokens)
    streamed = passes * plan.disk_bytes_per_pass / disk_bytes_per_s
    resident = plan.weight_bytes_per_pass - plan.disk_bytes_per_pass
    loaded = (resident + plan.copy_bytes) / disk_bytes_per_s
    on_cpu = plan.host_budget_bytes is None
    gain = INTEGER_GAIN if plan.sizes.bits < 16 and on_cpu else 1
    computed = floating_point_operations(plan, tokens) / products.bytes_per_s / gain
    read = max(streamed, computed)
    together = max(streamed + resident / disk_bytes_per_s, computed) if on_cpu else loaded + read
    return FirstWord(tokens, loaded, read, together, products)


def floating_point_operations(plan: ResidencyPlan, tokens: int) -> int:
    """Of the matrix products that read so many tokens: a block has 12 matrices of n_embd * n_embd; the head has one row to do."""
    config = plan.sizes.config
    blocks = config.n_layer * 12 * config.n_embd**2
    return 2 * (tokens * blocks + config.n_embd * config.vocab_size)
