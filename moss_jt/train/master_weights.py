"""All weights of a model in float32, in one flat array: what full training learns, and a checkpoint of it in float16.

Half precision would lose steps: 1 - 1e-4 is 1 there.
"""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from moss_jt.errors import MossError
from moss_jt.kernels.interface import BlockWeights, DenseMatrix, Var
from moss_jt.store.architecture import (
    BLOCK,
    HEAD_WEIGHT,
    block_tensors,
    embedding_tensors,
    full_name,
    head_tensors,
)
from moss_jt.store.config import MossConfig
from moss_jt.store.files import read_small, write_text, writing
from moss_jt.store.model_folder import Store, StoreFile, read_tensor
from moss_jt.store.qkv_order import head_runs
from moss_jt.store.tensor_file import write_tensors
from moss_jt.train.lora import Floats

EMBEDDING = "transformer.wte.weight"
CHECKPOINT = "model.safetensors"
# As CodeGen begins: matrices are normal numbers of this size.
INITIAL_RANGE = 0.02
LARGEST_HALF = 65504.0


class Masters:
    """A model's weights as it learns.

    values   (P,) float32: all of them; ``tensors`` are views of it, by their names in a checkpoint, qkv rows in our order
    tied     head and embedding are one matrix while they learn; a checkpoint has both
    """

    def __init__(self, config: MossConfig, tied: bool = False) -> None:
        self.config, self.tied = config, tied
        self._shapes = dict(_shapes(config, tied))
        self.values = np.zeros(sum(map(math.prod, self._shapes.values())), np.float32)
        self.tensors = self.views(self.values)

    @classmethod
    def random(cls, config: MossConfig, seed: int, tied: bool = False) -> "Masters":
        """A model that knows nothing: matrices are normal numbers, norms ones, biases nothing."""
        masters = cls(config, tied)
        for number, (name, tensor) in enumerate(masters.tensors.items()):
            if tensor.ndim == 2:
                draw = np.random.default_rng([seed, number])
                tensor[:] = INITIAL_RANGE * draw.standard_normal(tensor.shape, np.float32)
            elif name.endswith(("ln_1.weight", "ln_f.weight")):
                tensor[:] = 1
        return masters

    @classmethod
    def of_store(cls, store: Store, tied: bool = False) -> "Masters":
        """The weights of a float16 model folder.

        Raises:
            MossError: it is quantized, or cannot be read; or it is to be tied, and head and embedding differ.
        """
        if store.bits != 16:
            raise MossError(
                f"{store.path.name} is int{store.bits}: all weights learn in float32, and what quantization lost does not come "
                "back. Take the float16 model, or leave out --full."
            )
        masters = cls(store.config, tied)
        for name, file, local in _stored(store):
            stored = read_tensor(file, local)
            if name in masters.tensors:
                masters.tensors[name][:] = stored
            elif not np.array_equal(masters.tensors[EMBEDDING], stored):
                raise MossError(f"{store.path.name} has a head that is not its embedding: it cannot be tied.")
        return masters

    def views(self, flat: Floats) -> dict[str, Floats]:
        """Views of a flat array that is laid out as ``values``: moments."""
        views, begin = {}, 0
        for name, shape in self._shapes.items():
            end = begin + math.prod(shape)
            views[name] = flat[begin:end].reshape(shape)
            begin = end
        return views

    @property
    def head(self) -> str:
        """The name of the matrix that makes logits."""
        return EMBEDDING if self.tied else HEAD_WEIGHT

    def block(self, layer: int, var: Callable[[np.ndarray], Var]) -> BlockWeights:
        """A block's weights as the operators take them; ``var`` makes a Var over an array's own memory."""
        fields = {}
        for tensor in BLOCK:
            array = var(self.tensors[block_name(layer, tensor.field)])
            fields[tensor.field] = DenseMatrix(array) if tensor.is_matrix else array
        return BlockWeights(**fields)

    def write(self, folder: Path, tokenizer: Path) -> None:
        """A checkpoint in float16, as Hugging Face lays it out; its file of weights is replaced in one step.

        Args:
            tokenizer: the model's tokenizer.json.

        Raises:
            MossError: the folder cannot be written.
        """
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        about = {
            **self.config.to_json(),
            "architectures": [
                "MossForCausalLM" if self.config.model_type == "moss" else "CodeGenForCausalLM"
            ],
            "activation_function": "gelu_new",
            "n_ctx": self.config.n_positions,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
        }
        write_text(folder / "config.json", json.dumps(about, indent=2) + "\n")
        write_text(folder / "tokenizer.json", read_small(tokenizer).decode())
        write_tensors(folder / CHECKPOINT, dict(self._halves()), {"format": "pt"})

    def _halves(self) -> Iterator[tuple[str, np.ndarray]]:
        order = np.concatenate([np.arange(first, first + count) for first, count in head_runs(self.config)])
        back = np.argsort(order)
        for name, tensor in self.tensors.items():
            half = np.clip(tensor, -LARGEST_HALF, LARGEST_HALF).astype(np.float16)
            yield name, half[back] if name.endswith("qkv_proj.weight") else half
            if name == EMBEDDING and self.tied:
                yield HEAD_WEIGHT, half


def block_name(layer: int, field: str) -> str:
    """A block's tensor by the operators' name for it -> its name in a checkpoint."""
    tensor = next(tensor for tensor in BLOCK if tensor.field == field)
    return full_name(f"{tensor.name}.weight" if tensor.is_matrix else tensor.name, layer)


def parameters_of(config: MossConfig, tied: bool = False) -> int:
    return sum(math.prod(shape) for _, shape in _shapes(config, tied))


def _shapes(config: MossConfig, tied: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((full_name(name), shape) for name, (_, shape) in embedding_tensors(config).items())
    for layer in range(config.n_layer):
        yield from (
            (full_name(name, layer), shape) for name, (_, shape) in block_tensors(config, 16, 0).items()
        )
    for name, (_, shape) in head_tensors(config).items():
        if not (tied and name == HEAD_WEIGHT):
            yield full_name(name), shape


def _stored(store: Store) -> Iterator[tuple[str, StoreFile, str]]:
    """Every tensor's name, and where it lies."""
    for layer, file in [(None, store.embedding), *enumerate(store.blocks), (None, store.head)]:
        yield from ((full_name(name, layer), file, name) for name in file.tensors)
