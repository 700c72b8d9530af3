"""A model's geometry, with Hugging Face's field names, read from config.json and checked."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moss_jt.errors import MossError

MODEL_TYPES = ("moss", "codegen")

# Sizes that no model has, so that a damaged or hostile file is refused before anything is made as large as it says.
LARGEST = {
    "vocab_size": 1 << 22,
    "n_positions": 1 << 20,
    "n_embd": 1 << 16,
    "n_layer": 1000,
    "n_head": 1 << 12,
    "rotary_dim": 1 << 12,
    "n_inner": 1 << 18,
}


@dataclass(frozen=True)
class MossConfig:
    """Geometry of a MOSS or CodeGen model; n_inner is resolved (4 * n_embd where the file says null).

    ``eos_token_id`` is one id or several: a text ends at each of them.
    """

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
    eos_token_id: int | tuple[int, ...]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def __post_init__(self) -> None:
        if self.model_type not in MODEL_TYPES:
            raise MossError(
                f"model_type is {_shown(self.model_type)}; only MOSS (moss) and CodeGen (codegen) models are supported."
            )
        for name, largest in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 0 < value <= largest:  # True is an int to Python
                raise MossError(
                    f"config.json: {name} is {_shown(value)}; a whole number from 1 to {largest} is needed."
                )
        epsilon = self.layer_norm_epsilon
        if type(epsilon) not in (int, float) or not 0 < epsilon < 1:
            raise MossError(
                f"config.json: layer_norm_epsilon is {_shown(epsilon)}; a number above 0 and below 1 is needed."
            )
        if not self.eos_token_ids:
            raise MossError("config.json: eos_token_id is an empty list; one id or several are needed.")
        for name, ids in (("bos_token_id", (self.bos_token_id,)), ("eos_token_id", self.eos_token_ids)):
            for number in ids:  # one beyond the vocabulary never comes, which is no fault
                if type(number) is not int or not 0 <= number < LARGEST["vocab_size"]:
                    raise MossError(f"config.json: {name} is {_shown(number)}; the id of a token is needed.")
        if self.n_embd % self.n_head:
            raise MossError(f"config.json: n_embd {self.n_embd} is not a multiple of n_head {self.n_head}.")
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
        values: dict[str, Any] = {"layer_norm_epsilon": 1e-5}
        for field in dataclasses.fields(cls):
            if fields.get(field.name) is not None:
                values[field.name] = fields[field.name]
        if type(values.get("n_embd")) is int:
            values.setdefault("n_inner", 4 * values["n_embd"])
        if isinstance(values.get("eos_token_id"), list):
            values["eos_token_id"] = tuple(values["eos_token_id"])
        for field in dataclasses.fields(cls):
            if field.name not in values and field.name != "n_inner":
                raise MossError(
                    f"{where}: {field.name} is missing; this is not the configuration of a MOSS or CodeGen model."
                )
        values.setdefault("n_inner", None)  # n_embd is refused first
        return cls(**values)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _shown(value: Any) -> str:
    """A wrong value for a message; a list of a million would fill the screen."""
    return repr(value)[:60] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"


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
