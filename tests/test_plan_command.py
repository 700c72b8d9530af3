"""moss-jt plan: for folders, names and machines that are not there, without Jittor and without loading anything."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moss_jt.backend.cards import Card
from moss_jt.commands import plan as plan_command
from moss_jt.commands.cli import main
from moss_jt.commands.plan import command
from tests.support.random_models import SMALL, random_folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOSS_JT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(autouse=True)
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This machine's speeds, so that nothing is measured: disk 2 GB/s, memory 10 GB/s, products 50 GFLOP/s; each probe is noted."""
    asked: list[str] = []
    monkeypatch.setattr(plan_command, "home_disk_speed", lambda home: asked.append("disk") or 2e9)
    monkeypatch.setattr(plan_command, "product_speed", lambda home: asked.append("products") or 50e9)
    monkeypatch.setattr(plan_command, "memory_speed", lambda home: asked.append("memory") or 10e9)
    return asked


def plan(*arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False)


def test_a_model_folder_is_measured_and_planned(home: Path) -> None:
    text = plan(str(random_folder(SMALL)), "--memory", "2GiB", "--context", "100").output
    assert "100 tokens" in text and "2.00 GB/s measured" in text and "10.00 GB/s measured" in text
    assert f"0-{SMALL.n_layer - 1}; head 0-{SMALL.vocab_size - 1}" in text
    assert text.startswith("Runs. 100 tokens take less than a second at best.\n") and " 0.00 GiB" not in text


def test_a_name_is_planned_with_nothing_downloaded() -> None:
    text = plan("fnlp/moss-moon-003-sft-int4", "--memory", "8GiB", "--disk-speed", "2.5").output
    assert "int4" in text and "2.50 GB/s given" in text and "2048 tokens" in text


def test_a_gpu_that_is_not_there() -> None:
    text = plan(
        "moss-moon-003", "--gpu-memory", "8GiB", "--host-memory", "32GiB", "--link-speed", "25"
    ).output
    assert "GPU memory" in text and "host, pinned" in text and "25.00 GB/s given" in text


def test_the_verdict_comes_first() -> None:
    speeds = ("--disk-speed", "1", "--memory-speed", "20")
    first = plan("moss-moon-003-sft", "--memory", "14GiB", *speeds).output.split("\n")[0]
    assert re.fullmatch(
        r"Runs\. 100 tokens take about \d+ minutes at best \(\d\d\.\d s each\); as int8 9 minutes, as int4 47 s\.",
        first,
    )
    first = plan("moss-moon-003-sft", "--bits", "4", "--gpu-memory", "12GiB", "--host-memory", "14GiB").output
    assert first.startswith("Runs. 100 tokens take about 7.8 s at best (12.9 tokens/s).")
    assert plan(str(random_folder(SMALL)), "--context", "100").output.startswith("Runs here. ")


def test_without_a_model_every_precision_of_moss_is_judged() -> None:
    text = plan("--memory", "4GiB").output
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["float16", "int8", "int4"]
    assert all(
        "Runs. 100 tokens take about" in line and "First word expected after" in line for line in lines[1:4]
    )
    assert "float16    31.14 GiB  Does not run: 3.00 GiB is too little" in plan("--memory", "3GiB").output


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ("--memory 4GiB", "Take int4: moss-jt convert fnlp/moss-moon-003-sft-plugin-int4, and then moss-jt chat."),
        ("--memory 4000GiB", "Take int4:"),  # 20 GB/s of memory: what is more exact is slower than reading
        ("--memory 4000GiB --memory-speed 60", "Take int8: moss-jt convert fnlp/moss-moon-003-sft-plugin-int8,"),
        ("--memory 4000GiB --memory-speed 400", "Take float16: moss-jt convert fnlp/moss-moon-003-sft-plugin,"),
        ("--gpu-memory 24GiB --host-memory 30GiB", "sft-plugin-int8, and then moss-jt chat --gpu."),
        ("--memory 1GiB", "None of them runs in so little memory."),
    ],
)  # fmt: skip
def test_which_one_to_take(arguments: str, advice: str) -> None:
    assert advice in plan(*arguments.split()).output


def test_a_disk_that_is_too_small_is_said(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    assert "GB free" not in plan("--memory", "4GiB").output or plan_command.free_bytes(home) < 22e9
    monkeypatch.setattr(plan_command, "free_bytes", lambda folder: 3 * 10**9)
    text = plan("--memory", "4GiB").output
    assert "takes 22 GB of disk" in text and f"{home} has 3 GB free: set MOSS_JT_HOME" in text


def test_the_wait_for_the_first_word_is_said() -> None:
    """int4: 9.4 GB of weights to load at 1 GB/s, and 9.2 TFLOP at 100 GFLOP/s, twice as fast as in float32."""
    speeds = ("--disk-speed", "1", "--memory-speed", "20", "--compute-speed", "100")
    second = plan("moss-moon-003-sft-plugin-int4", "--memory", "14GiB", *speeds).output.split("\n")[1]
    assert second == (
        "The first word is expected after about 46 s: 9.4 s to load the weights, meanwhile 46 s to read 300 tokens of instruction "
        "and question (100 GFLOP/s given)."
    )
    streamed = plan("moss-moon-003-sft", "--memory", "6GiB", *speeds).output
    assert (
        "The first word is expected after about 92 s: 1.8 s to load the weights, meanwhile 92 s to read"
        in streamed
    )


def test_a_cards_margin_is_taken_off_and_a_context_that_fits_is_named() -> None:
    """As --gpu does without a limit: of 12 GiB it takes 11.4, and int4 fits with fewer than 2048 tokens."""
    card = ("--gpu-memory", "12GiB", "--host-memory", "14GiB")
    text = plan("moss-moon-003-sft-plugin-int4", *card).output
    assert "GPU memory           11.40 GiB  the limit" in text and "host, pinned" in text
    assert "With --context 1536 everything stays in memory" in text
    for context in ("1536", "1024"):
        shorter = plan("moss-moon-003-sft-plugin-int4", *card, "--context", context).output
        assert "host, pinned" not in shorter and "With --context" not in shorter


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        (
            "moss-moon-003-base-int4",
            "is not published. To make it: moss-jt convert fnlp/moss-moon-003-base --bits 4",
        ),
        ("moss-moon-003", "is the family's name; published are fnlp/moss-moon-003-base, "),
        ("moss-moon-003-sft-int4", ""),
        ("fnlp/moss-moon-003-base", ""),
    ],
)
def test_what_was_never_published_is_said_to_be_so(name: str, remark: str) -> None:
    text = plan(name, "--memory", "14GiB").output
    assert (f"{name} {remark}" in text) if remark else ("published" not in text)


def test_what_is_measured_and_what_is_assumed(probes: list[str]) -> None:
    assert "2.00 GB/s measured" in plan("moss-moon-003", "--memory", "8GiB").output
    assert probes == ["disk", "memory", "products"]
    probes.clear()
    other = plan("moss-moon-003", "--memory", "4000GiB").output
    card = plan("moss-moon-003", "--gpu-memory", "8GiB", "--host-memory", "16GiB").output
    given = plan(
        "moss-moon-003",
        "--memory",
        "8GiB",
        "--disk-speed",
        "3",
        "--memory-speed",
        "9",
        "--compute-speed",
        "9",
    ).output
    assert "measured" not in other + card + given and not probes
    assert "1.00 GB/s assumed" in other and "20.00 GB/s assumed" in other and "400.00 GB/s assumed" in card


def test_this_machines_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_card(number: int) -> Card:
        return Card("a card", (12 + number) << 30, (10 + number) << 30, (8, 6), (13, 0), number=number)

    monkeypatch.setattr("moss_jt.backend.gpu_requirements.find_card", find_card)
    text = plan("moss-moon-003-sft-int4", "--gpu", "--gpu-memory", "9GiB").output
    assert text.startswith("Runs here.") and "GPU memory            9.00 GiB  the limit" in text
    assert "2.00 GB/s measured" in text, "the disk is this machine's"
    second = plan("moss-moon-003-sft-int4", "--gpu", "--device", "1").output
    assert "GPU memory           10.45 GiB  the limit" in second, "11 GiB are free there, less a margin"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-here", "--memory", "8GiB"], "no model called 'nothing-here'"),
        (["nothing-here"], "Published are fnlp/moss-moon-003-base, fnlp/moss-moon-003-sft, "),
        (["moss-moon-003-pm"], "moss-moon-003-pm is not a published MOSS model"),
        (["moss-moon-003-sft-plugn-int4"], "did you mean moss-moon-003-sft-plugin-int4? Published are"),
        (["moss-moon-003-sft-int4", "--bits", "8"], "what quantization lost does not come back"),
        (["moss-moon-003", "--memory", "1GiB"], "too little for this model"),
        (["moss-moon-003", "--memory", "lots"], "is not an amount of memory"),
        (["moss-moon-003", "--memory", "8GiB", "--context", "4096"], "2048 positions"),
        (["moss-moon-003", "--memory", "8GiB", "--disk-speed", "0"], "a speed of 0.0 is not possible"),
        (
            ["moss-moon-003", "--gpu-memory", "80%", "--host-memory", "32GiB"],
            "is a share of a card that is not named",
        ),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *arguments])
    assert stopped.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith("moss-jt: error: ") and message in errors and errors.count("\n") <= 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--memory", "8GiB", "--gpu-memory", "8GiB"],
        ["--host-memory", "8GiB"],
        ["--link-speed", "3"],
        ["--gpu-memory", "8GiB", "--device", "1"],
    ],
)
def test_options_that_contradict_are_usage_errors(arguments: list[str]) -> None:
    assert plan("moss-moon-003", *arguments).exit_code == 2


def test_planning_starts_no_jittor() -> None:
    code = (
        "import sys; from moss_jt.commands.cli import main\n"
        "try: main(['plan', 'moss-moon-003', '--memory', '8GiB'])\n"
        "finally: print(sorted(name for name in sys.modules if name.startswith(('jittor', 'torch'))))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("[]\n")


def test_what_teaching_takes() -> None:
    given = ["--train", "--compute-speed", "250", "--disk-speed", "3"]
    lines = plan("moss-moon-003-sft", *given, "--memory", "8GiB").output.splitlines()
    assert [line.partition(":")[0] for line in lines[:3]] == [
        "An adapter",
        "An adapter in the last blocks (--layers 8)",
        "All weights (--full)",
    ]
    # 2 * 15.4 + 3 * 0.66 billion products of a token there and back, and half of that where the front is known.
    assert "(3.8 tokens/s)" in lines[0] and "from the second epoch on 13.6" in lines[1]
    assert "takes 104.90 GiB of memory, and the limit is 8.00 GiB" in lines[2]
    assert "250 GFLOP/s given" in lines[3]
    tiny = plan("moss-tiny", *given).output
    assert "All weights (--full): at most" in tiny and "--layers" not in tiny
    refused = plan("--train")
    assert refused.exit_code == 2 and "--train needs a MODEL" in refused.output


def test_what_teaching_takes_of_a_card() -> None:
    given = ["--train", "--gpu-memory", "4GiB", "--host-memory", "40GiB", "--compute-speed", "10000"]
    lines = plan("moss-moon-003-sft", *given, "--link-speed", "5").output.splitlines()
    assert lines[0].startswith("An adapter: at most 3.8") and " of the card and 31." in lines[0]
    assert "(82.0 tokens/s)" in lines[0], "twice 31.2 GB through the link"
    assert "All weights" not in lines[2] and "the link to the card 5.00 GB/s given" in lines[2]
    short = plan(
        "moss-moon-003-sft", *given, "--link-speed", "12", "--host-memory", "12GiB", "--disk-speed", "1"
    )
    assert "(22.0 tokens/s)" in short.output.splitlines()[0], (
        "what the host does not hold comes from the disk"
    )
