"""Many conversations at once: moss-jt beside llama.cpp's server, and beside the law of the machine's links and arithmetic.

    python benchmarks/serving.py MODEL --parallel 1,4,16 --peer-python PEER/bin/python --gguf /tmp/phi2-q4_0.gguf
    python benchmarks/serving.py MODEL --memory 16GiB --context 512

MODEL is a model folder with random or real weights; PEER is an environment with xllamacpp and gguf, whose model has the same
shape (phi2) and is made once, Q4_0 for an int4 folder and float16 for a float16 one. The rounds go through both in turn, so that
a noisy minute hits neither alone; medians over rounds. The law is what moss-jt bench says in the same round. The last line is one
JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from moss_jt.store.model_folder import open_store

HERE = Path(__file__).resolve().parent
SHAPE = ("n_embd", "n_layer", "n_head", "rotary_dim", "n_inner", "vocab_size", "n_positions")


def last_json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return measured


def ours(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    command = [sys.executable, "-P", "-m", "moss_jt", "bench", str(arguments.model), "--repeats", "1"]
    command += ["--contexts", str(arguments.context), "--new-tokens", str(arguments.steps)]
    command += ["--parallel", arguments.parallel]
    command += ["--memory", arguments.memory] if arguments.memory else []
    rows: list[dict[str, Any]] = last_json(command)["parallel"]
    return rows


def theirs(arguments: argparse.Namespace) -> dict[str, float]:
    store = open_store(arguments.model)
    shape = json.dumps({name: getattr(store.config, name) for name in SHAPE})
    command = [arguments.peer_python, str(HERE / "serving_peer.py"), str(arguments.gguf), "--shape", shape]
    command += ["--parallel", arguments.parallel, "--context", str(arguments.context)]
    command += ["--steps", str(arguments.steps)] + (["--float16"] if store.bits == 16 else [])
    return last_json(command)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--parallel", default="1,4,16")
    parser.add_argument("--context", type=int, default=128, help="tokens of each conversation")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", help="moss-jt's limit; what does not fit streams")
    parser.add_argument("--peer-python", help="without it only moss-jt runs")
    parser.add_argument("--gguf", type=Path, help="the peer's model; written if it is not there")
    arguments = parser.parse_args()
    rounds: dict[int, list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        peer = theirs(arguments) if arguments.peer_python else {}
        for row in ours(arguments):
            count = row["conversations"]
            entry = {"tok_s": row["tok_s"], "law_share": row["law_share"]}
            if str(count) in peer:
                entry |= {"peer_tok_s": peer[str(count)], "ratio": row["tok_s"] / peer[str(count)]}
            rounds.setdefault(count, []).append(entry)
    summary = {
        count: {name: statistics.median(entry[name] for entry in entries) for name in entries[0]}
        for count, entries in rounds.items()
    }
    alone = summary[min(summary)]["tok_s"] / min(summary)
    print("conversations  tokens/s  times one  of the law  llama.cpp  ratio")
    for count, row in summary.items():
        other = f"{row['peer_tok_s']:9.2f}  {row['ratio']:5.2f}" if "ratio" in row else ""
        print(
            f"{count:13}  {row['tok_s']:8.2f}  {row['tok_s'] / alone:9.2f}  {row['law_share']:10.0%}  {other}"
        )
    print(json.dumps({"model": arguments.model.name, "conversations": summary}))


if __name__ == "__main__":
    main()
