"""What torch computes when all weights of a random CodeGen model learn. Runs in a process of its own.

    python full.py FOLDER TOKENIZER_FOLDER

For each case writes FOLDER/NAME/ (the checkpoint) and FOLDER/NAME.npz: ``ids`` and ``targets`` of some samples one after another,
their ``lengths``, the ``losses`` of each step, every gradient of the first step and every weight after the last, by their names.
All is computed in float32; LOMO's and AdaLomo's rules are written here as their papers have them.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codegen import config_of, random_model, save
from lora import LENGTHS, loss_of, samples

# Geometry of codegen.py, rate, weight decay, tied.
CASES: dict[str, tuple[str, float, float, bool]] = {
    "adamw": ("heads-4", 1e-4, 0.1, False),
    "lomo": ("heads-8-inner", 3e-2, 0.0, False),
    "adalomo": ("heads-24", 2e-3, 0.1, False),
    "tied": ("heads-4", 1e-4, 0.0, True),
}
STEPS, CLIP = 20, 1.0


class AdaLomo:
    """arXiv 2310.10195, Algorithm 1, with the moment's decay and the parameters' scale of Adafactor."""

    def __init__(self, tensors: dict[str, torch.Tensor], rate: float, decay: float) -> None:
        self.tensors, self.rate, self.decay, self.steps = tensors, rate, decay, 0
        self.moments: dict[str, list[torch.Tensor]] = {}

    def step(self) -> None:
        self.steps += 1
        keep = 1 - self.steps**-0.8
        for name, x in self.tensors.items():
            g = x.grad.double()
            squares = g * g + 1e-30
            means = [squares.mean(1), squares.mean(0)] if x.ndim == 2 else [squares]
            old = self.moments.get(name, [torch.zeros_like(part) for part in means])
            new = [keep * a + (1 - keep) * b for a, b in zip(old, means, strict=True)]
            self.moments[name] = new
            moment = torch.outer(new[0], new[1]) / new[0].mean() if x.ndim == 2 else new[0]
            update = g / moment.sqrt()
            update /= max(1.0, float(update.square().mean().sqrt()))
            length = self.rate * max(1e-3, float(x.double().square().mean().sqrt()))
            shrink = 1 - length * self.decay if x.ndim == 2 else 1.0
            x.copy_(shrink * x.double() - length * update)


def train(folder: Path, name: str) -> None:
    geometry, rate, decay, tied = CASES[name]
    fields = config_of(geometry)
    model: Any = random_model(fields, seed=11)
    if tied:
        model.lm_head.weight = model.transformer.wte.weight
    save_untied(model, fields, folder / name)
    ids, targets = samples()
    tensors = dict(model.named_parameters())
    matrices = [tensor for tensor in tensors.values() if tensor.ndim == 2]
    vectors = [tensor for tensor in tensors.values() if tensor.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    rule: Any = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    if name == "lomo":
        rule = torch.optim.SGD(tensors.values(), lr=rate)
    elif name == "adalomo":
        rule = AdaLomo(tensors, rate, decay)
    losses, first = [], {}
    for _ in range(STEPS):
        model.zero_grad()
        loss = loss_of(model, ids, targets)
        loss.backward()
        first = first or {f"gradient {key}": value.grad.numpy().copy() for key, value in tensors.items()}
        if name != "adalomo":
            torch.nn.utils.clip_grad_norm_(tensors.values(), CLIP)
        with torch.no_grad():
            rule.step()
        losses.append(float(loss.detach()))
    last = {f"last {key}": value.detach().numpy() for key, value in tensors.items()}
    arrays = {"ids": ids, "targets": targets, "lengths": np.array(LENGTHS), "losses": np.array(losses)}
    np.savez(folder / f"{name}.npz", **arrays, **first, **last)


def save_untied(model: Any, fields: dict[str, Any], folder: Path) -> None:
    """Head and embedding both, also where they are one."""
    save(model, fields, folder, "safetensors", 1)
    if model.lm_head.weight is model.transformer.wte.weight:
        (folder / "config.json").write_text(json.dumps({**fields, "tie_word_embeddings": True}))


def main() -> None:
    folder, tokenizer = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(2)
    for name in CASES:
        train(folder, name)
        for file in ("vocab.json", "merges.txt", "added_tokens.json"):
            shutil.copy(tokenizer / file, folder / name / file)
    settings = {
        name: {"rate": rate, "decay": decay, "tied": tied} for name, (_, rate, decay, tied) in CASES.items()
    }
    (folder / "settings.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
