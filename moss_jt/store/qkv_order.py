"""In which order a checkpoint has the rows of qkv_proj, and a model folder: permuted once, at conversion."""

from moss_jt.errors import MossError
from moss_jt.store.config import MossConfig

# The checkpoint's qkv rows come in four chunks (one per TPU core that trained CodeGen), each query, value, key.
MP_NUM = 4


def head_runs(config: MossConfig) -> list[tuple[int, int]]:
    """(first, count) of the checkpoint's qkv rows in our order: all heads' queries, all keys, all values."""
    if config.n_head % MP_NUM:
        raise MossError(
            f"the model has {config.n_head} heads; MOSS and CodeGen store them in {MP_NUM} equal parts, so their number must "
            f"be a multiple of {MP_NUM}."
        )
    part = config.n_embd // MP_NUM
    query, value, key = 0, 1, 2
    return [((3 * chunk + which) * part, part) for which in (query, key, value) for chunk in range(MP_NUM)]
