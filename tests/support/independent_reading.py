"""What a small checkpoint holds, read without the converter: by safetensors' and torch's own libraries and plain formulas."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

PREFIX = re.compile(r"^(module\.|_orig_mod\.|model\.)+")
LEFT_OUT = re.compile(
    r".*\.attn\.(causal_mask|bias|masked_bias|scale_attn|embed_positions|(qkv|out)_proj\.bias)"
)


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor by plain name. Raises whatever the libraries raise for damage."""
    names = sorted(path.name for path in folder.iterdir())
    tensors: dict[str, np.ndarray] = {}
    for kind, read in ((".safetensors", _read_safetensors), (".bin", _read_torch), (".pt", _read_torch)):
        index = [name for name in names if name.endswith(f"{kind}.index.json")]
        files = [name for name in names if name.endswith(kind)]
        if index:
            weight_map = json.loads((folder / index[0]).read_bytes())["weight_map"]
            shards = {shard: read(folder / shard) for shard in set(weight_map.values())}
            tensors = {name: shards[shard][name] for name, shard in weight_map.items()}
            break
        if len(files) == 1:
            tensors = read(folder / files[0])
            break
    return {PREFIX.sub("", name): values for name, values in tensors.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dict


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    import torch

    state: Any = torch.load(path, weights_only=True)
    while not any(isinstance(value, torch.Tensor) for value in state.values()):
        state = next(
            state[key] for key in ("state_dict", "model", "module", "model_state_dict") if key in state
        )
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


def expected_tensors(folder: Path, config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The model's tensors as a float16 model folder names and orders them, float32; GPTQ matrices unpacked.

    config  the geometry as the model folder has it
    """
    import torch

    collected: dict[str, np.ndarray] = {}
    tensors = {name: value for name, value in read_tensors(folder).items() if not LEFT_OUT.fullmatch(name)}
    for name, value in tensors.items():
        if name.rsplit(".", 1)[1] in ("qzeros", "scales", "g_idx"):
            continue
        if name.endswith(".qweight"):
            stem = name.removesuffix(".qweight")
            array = _unpacked({part: tensors.get(f"{stem}.{part}") for part in _PARTS})
            name = f"{stem}.weight"
        else:
            array = value.to(torch.float16).float().numpy()
        collected[name] = _sorted_by_kind(array, config) if name.endswith("qkv_proj.weight") else array
    return collected


_PARTS = ("qweight", "qzeros", "scales", "g_idx")


def _unpacked(parts: dict[str, Any]) -> np.ndarray:
    """The weights (N, K) float32 of a GPTQ matrix whose zero points are stored minus one."""
    arrays = {name: value.numpy() for name, value in parts.items() if value is not None}
    g_idx = arrays["g_idx"].astype(np.int64)
    bits = 32 * arrays["qweight"].shape[0] // len(g_idx)
    mask = (1 << bits) - 1
    shifts = bits * np.arange(32 // bits, dtype=np.int64)
    words = arrays["qweight"].astype(np.int64)
    fields = (words[:, None, :] >> shifts[None, :, None] & mask).reshape(-1, words.shape[1])
    zero_words = arrays["qzeros"].astype(np.int64)
    zeros = (zero_words[:, :, None] >> shifts & mask).reshape(len(zero_words), -1) + 1
    weight = arrays["scales"].astype(np.float32)[g_idx] * (fields - zeros[g_idx])
    return np.ascontiguousarray(weight.T.astype(np.float32))


def _sorted_by_kind(rows: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """qkv rows of four chunks, each query, value, key, as all queries, keys, values."""
    query, value, key = rows.reshape(4, 3, config["n_embd"] // 4, -1).transpose(1, 0, 2, 3)
    return np.concatenate([part.reshape(config["n_embd"], -1) for part in (query, key, value)])
