"""From the command to the first word of the first answer, and of the turns after it, as users meet them.

    python benchmarks/first_word.py MODEL --memory 14GiB

Each start is a process of its own over a folder of links to MODEL, so that nothing is written there: with a cold page cache, with
a cold one and the conversation's beginning kept by an earlier process, and with a warm one, which goes on with the later turns.
What plain reads of the blocks give is measured first, cold. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory_cgroup import forget_cached

from moss_jt.store.model_folder import open_store
from moss_jt.weights.disk_speed import reader_for
from moss_jt.weights.file_reader import Extent
from moss_jt.weights.page_buffer import page_buffer

READ_BYTES = 4 << 30


def work(model: str, memory: str | None, keeps: bool, turns: bool, begun: float) -> None:
    """One start: prints seconds since the command as JSON."""
    from moss_jt import Moss
    from moss_jt.measure.first_words import BEGINNING, first_words

    with Moss.load(model, memory=memory, prompt_cache="2GiB" if keeps else 0) as moss:
        seconds: dict[str, float] = {"loaded": time.time() - begun}
        text = moss.session()
        text.keep_beginning(BEGINNING if keeps else 0)
        words = first_words(text, moss.config.vocab_size)
        next(words)
        seconds["first word"] = time.time() - begun
        seconds["tokens read for it"] = text.timing.prefill_tokens
        if turns:
            seconds |= {word.turn: word.seconds for word in words}
    print(json.dumps(seconds))


def start(model: Path, memory: str | None, *flags: str) -> dict[str, Any]:
    arguments = [str(model), "--worker", str(time.time()), *flags]
    arguments += [] if memory is None else ["--memory", memory]
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def disk_bytes_per_s(model: Path) -> float:
    """Of reads of the blocks one after another, as the program reads."""
    store = open_store(model)
    reader, done, begin = reader_for(store, model.parent), 0, time.perf_counter()
    buffer = page_buffer(max(file.nbytes for file in store.blocks))
    buffer[::4096] = 1
    begin = time.perf_counter()
    for file in store.blocks:
        if done < READ_BYTES:
            count = file.nbytes - file.data_offset
            reader.read(Extent(file.path, file.data_offset, count), buffer)
            done += count
    reader.close()
    return done / (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--memory")
    parser.add_argument("--starts", default="cold,kept,warm")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--keeps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--turns", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(str(arguments.model), arguments.memory, arguments.keeps, arguments.turns, arguments.worker)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        linked = Path(folder) / "model"
        linked.mkdir()
        for path in arguments.model.iterdir():
            (linked / path.name).symlink_to(path.resolve())
        forget_cached(arguments.model)
        results["disk_gb_s"] = disk_bytes_per_s(linked) / 1e9
        print(f"disk: {results['disk_gb_s']:.2f} GB/s", flush=True)
        for name in arguments.starts.split(","):
            if name == "kept":
                start(linked, arguments.memory, "--keeps")
            if name != "warm":
                forget_cached(arguments.model)
            results[name] = start(
                linked, arguments.memory, *{"kept": ["--keeps"], "warm": ["--turns"]}.get(name, [])
            )
            print(name, {key: round(value, 2) for key, value in results[name].items()}, flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
