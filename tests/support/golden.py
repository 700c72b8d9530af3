"""The checkpoint behind the model folders in tests/golden: small, and every number in it follows from a formula.

The folders were written by moss-jt 0.1.0 from this checkpoint: float16/ as it is, int4/ by
``--bits 4 --method rtn --group-size 32``, act-order/ from :func:`golden_gptq`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "0.1.0"
CONFIG: dict[str, Any] = {
    "model_type": "moss",
    "vocab_size": 264,
    "n_positions": 64,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "rotary_dim": 4,
    "n_inner": 64,
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": 256,
    "eos_token_id": 258,
}
MATRICES = {
    "attn.qkv_proj": (96, 32),
    "attn.out_proj": (32, 32),
    "mlp.fc_in": (64, 32),
    "mlp.fc_out": (32, 64),
}
ADDED = ["<|endoftext|>", "<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>", "  "]


def golden_checkpoint(folder: Path) -> Path:
    """Write the float16 checkpoint."""
    tensors = _dense()
    for layer in range(2):
        for name, shape in MATRICES.items():
            tensors[f"transformer.h.{layer}.{name}.weight"] = _values(layer * 10 + len(name), shape)
    return _write(folder, tensors)


def golden_gptq(folder: Path) -> Path:
    """Write a GPTQ int4 checkpoint whose inputs are permuted."""
    tensors = _dense()
    for layer in range(2):
        for name, (rows, columns) in MATRICES.items():
            stem, groups = f"transformer.h.{layer}.{name}", columns // 32
            words = np.arange(columns // 8 * rows, dtype=np.uint64) * 2654435761 + layer
            tensors[f"{stem}.qweight"] = words.astype(np.uint32).view(np.int32).reshape(columns // 8, rows)
            words = np.arange(groups * rows // 8, dtype=np.uint64) * 2246822519 + layer
            tensors[f"{stem}.qzeros"] = words.astype(np.uint32).view(np.int32).reshape(groups, rows // 8)
            tensors[f"{stem}.scales"] = np.abs(_values(7, (groups, rows))) + np.float16(0.0009765625)
            tensors[f"{stem}.g_idx"] = (np.arange(columns)[::-1] // 32).astype(np.int32)
    return _write(folder, tensors)


def _dense() -> dict[str, np.ndarray]:
    tensors = {
        "transformer.wte.weight": _values(1, (264, 32)),
        "transformer.ln_f.weight": 1 + _values(2, (32,)),
        "transformer.ln_f.bias": _values(3, (32,)),
        "lm_head.weight": _values(4, (264, 32)),
        "lm_head.bias": _values(5, (264,)),
    }
    for layer in range(2):
        stem = f"transformer.h.{layer}."
        tensors[f"{stem}ln_1.weight"] = 1 + _values(6 + layer, (32,))
        tensors[f"{stem}ln_1.bias"] = _values(8 + layer, (32,))
        tensors[f"{stem}mlp.fc_in.bias"] = _values(11 + layer, (64,))
        tensors[f"{stem}mlp.fc_out.bias"] = _values(13 + layer, (32,))
    return tensors


def _values(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Multiples of 1/1024 between -1/2 and 1/2: exact in float16, no random generator's business."""
    numbers = (np.arange(np.prod(shape), dtype=np.int64) * 7919 + seed * 104729) % 1024 - 512
    return (numbers.reshape(shape) / 1024).astype(np.float16)


def _write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + index) for index in range(len(others)))]
    (folder / "vocab.json").write_text(json.dumps({letter: number for number, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "added_tokens.json").write_text(
        json.dumps({token: 256 + number for number, token in enumerate(ADDED)})
    )
    return folder
