"""A model's geometry, with Hugging Face's field names, read from config.json and checked."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jt.errors import MossError

MODEL_TYPES = ("moss", "codegen")


@dataclass(frozen=True)
class MossConfig:
    """Geometry of a MOSS or CodeGen model; n_inner is resolved (4 * n_embd where the file says null)."""

    model_type: str
    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    rotary_dim: int
    n_inner: int
    layer_norm_epsilon: float
    bos_token_id: int
    eos_token_id: int

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise MossError(
                f"model_type is {self.model_type!r}; only MOSS (moss) and CodeGen (codegen) models are supported."
            )
        sizes = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "rotary_dim", "n_inner")
        for name in sizes:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= 1 << 24:
                raise MossError(f"config.json: {name} is {value!r}; a whole number from 1 up is needed.")
        if self.n_embd % self.n_head:
            raise MossError(f"config.json: n_embd {self.n_embd} is no multiple of n_head {self.n_head}.")
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise MossError(
                f"config.json: rotary_dim {self.rotary_dim} must be even and at most the head's {self.head_dim}."
            )

    @classmethod
    def from_json(cls, fields: Mapping[str, Any], where: str = "config.json") -> "MossConfig":
        """Build from a parsed config.json.

        Raises:
            MossError: a field is missing or impossible; the message names ``where`` and the field.
        """
        inner = fields.get("n_inner")
        values = {
            "n_inner": 4 * fields.get("n_embd", 0) if inner is None else inner,
            "layer_norm_epsilon": 1e-5,
        }
        for field in dataclasses.fields(cls):
            if field.name in fields and fields[field.name] is not None:
                values[field.name] = fields[field.name]
            elif field.name not in values:
                raise MossError(
                    f"{where}: {field.name} is missing; this is no MOSS or CodeGen model's configuration."
                )
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# The published models all have this geometry (their config.json; the class defaults of the reference are another's).
MOSS_MOON_003 = MossConfig(
    model_type="moss",
    vocab_size=107008,
    n_positions=2048,
    n_embd=6144,
    n_layer=34,
    n_head=24,
    rotary_dim=64,
    n_inner=24576,
    layer_norm_epsilon=1e-5,
    bos_token_id=106028,
    eos_token_id=106068,
)
