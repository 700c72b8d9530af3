"""moss-jt beside transformers, CTranslate2 and llama.cpp: the same random CodeGen checkpoint, the same prompts, one run.

    python benchmarks/peers.py 350M --work /tmp/peers --peer-python PEER/bin/python

PEER is an environment with torch, transformers, ctranslate2, xllamacpp and gguf. Every engine runs in a process of its own with two
threads; the rounds go through all engines in turn, so that a noisy minute hits none of them alone; the table shows
medians over rounds. The last line is one JSON object.

--engines moss-jt:8,moss-jt:8@256,ctranslate2:int8@256,llama.cpp:Q8_0: after @ a level of ours (MOSS_JT_SIMD). At 256, oneDNN
and with it the sgemm of which shares are told, and CTranslate2, are held to AVX2, too. llama.cpp has a random phi2 of that shape;
xllamacpp's build of it is for AVX2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from checkpoint import GEOMETRIES, write_checkpoint
from serving import peer_environment

HERE = Path(__file__).resolve().parent
PEERS = [
    ("transformers", "fp32"),
    ("transformers", "bf16"),
    ("transformers", "fp16"),
    ("transformers", "int8"),
    ("ctranslate2", "fp32"),
    ("ctranslate2", "int8"),
    ("llama.cpp", "Q8_0"),
    ("llama.cpp", "Q4_0"),
]
OURS = [("moss-jt", "16"), ("moss-jt", "8"), ("moss-jt", "4")]
AVX2 = {"DNNL_MAX_CPU_ISA": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2", "CT2_FORCE_CPU_ISA": "AVX2"}


def last_json(command: list[str], environment: dict[str, str]) -> dict[str, Any] | None:
    """The JSON object on a command's last line, or None with its last words on stderr."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    try:
        result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        print(f"{' '.join(command)} failed:\n{done.stderr[-800:]}", file=sys.stderr)
        return None
    return result


def model_folder(checkpoint: Path, bits: str) -> Path:
    """The checkpoint converted by moss-jt, made once."""
    folder = checkpoint.with_name(f"{checkpoint.name}-moss-jt-{bits}")
    if not (folder / "manifest.json").exists():
        command = [sys.executable, "-P", "-m", "moss_jt", "convert", str(checkpoint), "--out", str(folder)]
        if bits != "16":
            command += ["--bits", bits, "--method", "rtn"]
        subprocess.run(command, check=True)
    return folder


def run_engine(
    engine: str, kind: str, arguments: argparse.Namespace, checkpoint: Path
) -> dict[str, Any] | None:
    kind, _, level = kind.partition("@")
    environment = os.environ | (AVX2 if level.startswith("256") else {})
    lengths = ["--contexts", arguments.contexts, "--steps", str(arguments.steps)]
    if engine == "moss-jt":
        folder = model_folder(checkpoint, kind)
        environment |= {"MOSS_JT_SIMD": level} if level else {}
        return last_json(
            [sys.executable, "-P", str(HERE / "our_worker.py"), str(folder), *lengths], environment
        )
    worker = [arguments.peer_python, str(HERE / "peer_worker.py"), str(checkpoint)]
    if engine == "llama.cpp":
        environment = peer_environment(environment)
    return last_json([*worker, "--engine", engine, "--kind", kind, *lengths], environment)


def medians(rounds: list[dict[str, Any]], contexts: list[str]) -> dict[str, Any]:
    """Tokens per second and shares of the limits, medians over rounds."""
    summary: dict[str, Any] = {"peak_gib": max(round_["peak_gib"] for round_ in rounds)}
    for context in contexts:
        times = [round_["contexts"][context] for round_ in rounds]
        summary[context] = {
            "prefill_tok_s": int(context) / statistics.median(time["prefill_s"] for time in times),
            "decode_tok_s": 1 / statistics.median(time["decode_s"] for time in times),
        }
        for share in ("prefill_share", "decode_share"):
            if share in times[0]:
                summary[context][share] = statistics.median(time[share] for time in times)
    return summary


def show(name: str, summary: dict[str, Any], contexts: list[str]) -> None:
    cells = []
    for context in contexts:
        speed = summary[context]
        shares = [
            f"{100 * speed[share]:.0f}%" if share in speed else ""
            for share in ("decode_share", "prefill_share")
        ]
        cells.append(
            f"{speed['decode_tok_s']:7.2f} {shares[0]:>4} {speed['prefill_tok_s']:8.1f} {shares[1]:>4}"
        )
    print(f"{name:20} " + " | ".join(cells) + f" | {summary['peak_gib']:5.2f} GiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for the checkpoint and its converted copies"
    )
    parser.add_argument("--peer-python", help="Python with what the peers are; without it only moss-jt runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contexts", default="32,256,1024")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument(
        "--engines", help="only these, comma-separated, for example moss-jt:16,transformers:fp16"
    )
    arguments = parser.parse_args()
    checkpoint = arguments.work / arguments.geometry
    write_checkpoint(checkpoint, arguments.geometry)
    engines = OURS + (PEERS if arguments.peer_python else [])
    if arguments.engines:
        engines = [
            (name, kind) for name, _, kind in (text.partition(":") for text in arguments.engines.split(","))
        ]
    rounds: dict[str, list[dict[str, Any]]] = {}
    for _ in range(arguments.rounds):
        for engine, kind in engines:
            result = run_engine(engine, kind, arguments, checkpoint)
            if result is not None:
                rounds.setdefault(f"{engine} {kind}", []).append(result)
    contexts = arguments.contexts.split(",")
    print(" " * 20 + " " + " | ".join(f"decode, prefill tok/s at {context:>4}" for context in contexts))
    summaries = {name: medians(results, contexts) for name, results in rounds.items()}
    for name, summary in summaries.items():
        show(name, summary, contexts)
    print(json.dumps({"geometry": arguments.geometry, "engines": summaries}))


if __name__ == "__main__":
    main()
