"""What torch and peft compute when they train adapters on a random CodeGen model. Runs in a process of its own.

    python lora.py FOLDER TOKENIZER_FOLDER

For each case writes FOLDER/NAME/ (the checkpoint), FOLDER/NAME-first/ and FOLDER/NAME-last/ (the adapter before and after
training, as peft saves it), and FOLDER/NAME.npz: ``ids`` and ``targets`` of some samples one after another, their ``lengths``,
the ``losses`` of each step, the gradient of the first step by peft's names, and ``logits`` of the first sample at the end.
All is computed in float32 over float16 weights.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codegen import POSITIONS, VOCABULARY, config_of, random_model, save
from peft import LoraConfig, get_peft_model

# Geometry of codegen.py, rank, alpha, targets, last blocks or None for all.
CASES: dict[str, tuple[str, int, float, list[str], int | None]] = {
    "all": ("heads-4", 4, 8.0, ["qkv_proj", "out_proj", "fc_in", "fc_out"], None),
    "qkv": ("heads-8-inner", 8, 32.0, ["qkv_proj"], None),
    "last": ("heads-24", 2, 3.0, ["fc_out", "qkv_proj", "out_proj"], 1),
}
STEPS, LEARNING_RATE, WEIGHT_DECAY, CLIP = 20, 4e-4, 0.1, 1.0
LENGTHS = (37, 5, 90, 64)


def samples() -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    ids = draw.integers(0, VOCABULARY, sum(LENGTHS)).astype(np.int32)
    targets = draw.random(sum(LENGTHS)) < 0.6
    targets[np.cumsum([0, *LENGTHS[:-1]])] = False
    return ids, targets


def loss_of(model: Any, ids: np.ndarray, targets: np.ndarray) -> torch.Tensor:
    """The mean over all targets of all samples."""
    total, begin = torch.zeros(()), 0
    for length in LENGTHS:
        part = slice(begin, begin + length)
        x = torch.from_numpy(ids[part].astype(np.int64))
        logits = model(x[None]).logits[0, :-1]
        chosen = torch.from_numpy(targets[part][1:])
        total = total + torch.nn.functional.cross_entropy(logits[chosen], x[1:][chosen], reduction="sum")
        begin += length
    return total / int(targets.sum())


def train(folder: Path, name: str) -> None:
    geometry, rank, alpha, modules, last = CASES[name]
    fields = config_of(geometry)
    model = random_model(fields, seed=7)
    save(model, fields, folder / name, "safetensors", 1)
    count = fields["n_layer"]
    layers = None if last is None else list(range(count - last, count))
    adapted = get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules, layers_to_transform=layers)
    )
    draw = np.random.default_rng(5)
    trained = {key: value for key, value in adapted.named_parameters() if value.requires_grad}
    with torch.no_grad():
        for value in trained.values():  # B, too: with zeros the gradient of A would be nothing
            value.copy_(torch.from_numpy(0.1 * draw.standard_normal(tuple(value.shape)).astype(np.float32)))
    adapted.save_pretrained(folder / f"{name}-first")
    ids, targets = samples()
    optimizer = torch.optim.AdamW(trained.values(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    losses, first = [], {}
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(adapted, ids, targets)
        loss.backward()
        if not first:
            first = {key.replace(".default", ""): value.grad.numpy().copy() for key, value in trained.items()}
        torch.nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        losses.append(float(loss))
    adapted.save_pretrained(folder / f"{name}-last")
    with torch.no_grad():
        logits = adapted(torch.from_numpy(ids[: LENGTHS[0]].astype(np.int64))[None]).logits[0].numpy()
    arrays = {"ids": ids, "targets": targets, "lengths": np.array(LENGTHS), "losses": np.array(losses)}
    np.savez(
        folder / f"{name}.npz", logits=logits, **arrays, **{f"gradient {k}": v for k, v in first.items()}
    )


def main() -> None:
    folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(2)
    assert max(LENGTHS) <= POSITIONS
    for name in CASES:
        train(folder, name)
        for file in ("vocab.json", "merges.txt", "added_tokens.json"):
            shutil.copy(tokenizer / file, folder / name / file)
    (folder / "settings.json").write_text(
        json.dumps({"lr": LEARNING_RATE, "decay": WEIGHT_DECAY, "clip": CLIP})
    )


if __name__ == "__main__":
    main()
