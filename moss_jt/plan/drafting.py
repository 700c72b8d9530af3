"""What a copy that drafts brings, from sizes and speeds alone: tokens per pass, and seconds per token.

A pass of the model costs its link's time whether it verifies one token or twenty-three; the copy, which is resident, writes the
tokens that it verifies. Where each is right with chance a, drafts of n tokens bring 1 + a + a^2 + .. + a^n tokens per pass.
"""

from dataclasses import dataclass

from moss_jt.plan.residency import ResidencyPlan, seconds_per_pass

# How often an int4 copy's token is the model's, where it has not been seen yet.
AGREEMENT = 0.93
# Tokens of a draft, at most: moss_jt.kernels.needs.FEW_TOKENS with the one before it.
LONGEST = 22
# What one more token adds to a pass over weights in memory, as a share of a pass of one. Measured on the CPU, of float16 and int4
# weights on two cores with AVX-512; int8 is taken for int4, and on cards it is a guess.
CPU_TOKEN_SHARES, GPU_TOKEN_SHARE = {16: 0.16, 8: 0.48, 4: 0.48}, 0.02
# Of the memory's speed, what the CPU's products reach with the packed weights of a copy. Measured in the same way.
CPU_COPY_SHARE = 0.9


@dataclass(frozen=True)
class Outlook:
    """With drafts of ``drafted`` tokens, the best length: tokens of a pass, seconds of writing the draft and of verifying it."""

    drafted: int
    tokens: float
    drafting_s: float
    pass_s: float

    @property
    def seconds_per_token(self) -> float:
        return (self.drafting_s + self.pass_s) / self.tokens


def tokens_per_pass(agreement: float, drafted: int) -> float:
    """Tokens that a pass brings with drafts of this length, each token of which is right with this chance."""
    return float(drafted + 1) if agreement == 1 else (1 - agreement ** (drafted + 1)) / (1 - agreement)


def token_share(plan: ResidencyPlan) -> float:
    """What one more token adds to a pass, as a share of a pass of one, where no link decides how long it takes."""
    return CPU_TOKEN_SHARES[plan.sizes.bits] if plan.host_budget_bytes is None else GPU_TOKEN_SHARE


def seconds_per_draft(plan: ResidencyPlan, memory_bytes_per_s: float, on_gpu: bool) -> float:
    """Of a token that the copy writes."""
    return plan.copy_bytes_per_pass / memory_bytes_per_s / (1.0 if on_gpu else CPU_COPY_SHARE)


def outlook(
    plan: ResidencyPlan,
    disk_bytes_per_s: float,
    memory_bytes_per_s: float,
    link_bytes_per_s: float | None = None,
    agreement: float = AGREEMENT,
) -> Outlook:
    """What the plan promises for an answer, with the length of drafts that is best for it; 0 without a copy."""
    speeds = disk_bytes_per_s, memory_bytes_per_s, link_bytes_per_s
    link_s = seconds_per_pass(plan, *speeds)
    if plan.copy is None:
        return Outlook(0, 1.0, 0.0, link_s)
    share = token_share(plan)
    read_s = plan.weight_bytes_per_pass / memory_bytes_per_s
    step_s = seconds_per_draft(plan, memory_bytes_per_s, on_gpu=link_bytes_per_s is not None)
    outlooks = [
        Outlook(
            drafted,
            tokens_per_pass(agreement, drafted),
            drafted * step_s,
            max(link_s, read_s * (1 + share * drafted)),
        )
        for drafted in range(LONGEST + 1)
    ]
    return min(outlooks, key=lambda one: one.seconds_per_token)
