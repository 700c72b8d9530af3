"""A model folder of random weights for the card's benchmark: MOSS's width and as many blocks as asked, or something tiny.

python3 -P benchmarks/card/model.py DIR LAYERS BITS [--small]
"""

import sys
from dataclasses import replace
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.random_model import write_random_model
from moss_jt.store.config import MOSS_MOON_003

TINY = replace(
    MOSS_MOON_003, vocab_size=512, n_positions=128, n_embd=128, n_head=2, rotary_dim=16, n_inner=256
)

if __name__ == "__main__":
    folder, layers, bits = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    geometry = TINY if "--small" in sys.argv else MOSS_MOON_003
    write_random_model(folder, replace(geometry, n_layer=layers), bits)
