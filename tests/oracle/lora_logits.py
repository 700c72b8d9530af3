"""What peft makes of adapters that others wrote. Runs in a process of its own.

    python lora_logits.py CHECKPOINTS ADAPTERS NAME..

For each name loads CHECKPOINTS/NAME, as lora.py wrote it, with the adapter in ADAPTERS/NAME, and compares its logits for the
``ids`` of ADAPTERS/NAME.npz with the ``logits`` there. The last line is a JSON object: of each name the difference's root mean
square as a share of the logits'.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from codegen import random_model
from peft import PeftModel


def main() -> None:
    checkpoints, adapters = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(2)
    errors = {}
    for name in sys.argv[3:]:
        fields = json.loads((checkpoints / name / "config.json").read_text())
        model = PeftModel.from_pretrained(random_model(fields, seed=7), adapters / name)
        given = np.load(adapters / f"{name}.npz")
        with torch.no_grad():
            logits = model(torch.from_numpy(given["ids"].astype(np.int64))[None]).logits[0].numpy()
        errors[name] = float(np.linalg.norm(logits - given["logits"]) / np.linalg.norm(logits))
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
