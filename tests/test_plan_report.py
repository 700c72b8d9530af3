"""The plan as text: every number adds up, and every block and row of the head is named once."""

import re
from pathlib import Path

from moss_jt.plan.report import Speed, Speeds, ranges_of, report
from moss_jt.plan.residency import Unit, gib, gib_up
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.sizes import GIB, sizes_of_geometry
from tests.support.plans import plan, plan_gpu

MOON = sizes_of_geometry(MOSS_MOON_003)
CPU = Speeds(Speed(1e9, "given"), Speed(20e9, "assumed"))
GPU = Speeds(Speed(1e9, "given"), Speed(400e9, "assumed"), Speed(12e9, "assumed"))


def test_the_parts_add_up_to_what_is_held_at_most() -> None:
    for text in (
        report("moss-moon-003", plan(MOON, 2048, 8 * GIB), CPU),
        report("moss-moon-003", plan_gpu(MOON, 2048, 8 * GIB, 16 * GIB), GPU),
    ):
        for part in re.findall(
            r"^(?:RAM|GPU memory|Host memory) .*the limit\n((?:  .*\n?)+)", text, re.MULTILINE
        ):
            sizes = re.findall(r"([\d.]+) (GiB|MiB|KiB)", part)
            *amounts, at_most = [
                float(number) * {"GiB": 1, "MiB": 2**-10, "KiB": 2**-20}[unit] for number, unit in sizes
            ]
            assert abs(sum(amounts) - at_most) < 0.005 * len(amounts) + 0.005, part


def test_sizes_as_people_read_them() -> None:
    sizes = {
        0: "nothing",
        512: "0.5 KiB",
        300 << 10: "300.0 KiB",
        8 << 20: "8.0 MiB",
        835 << 20: "835 MiB",
        3 << 29: "1.50 GiB",
    }
    assert {n_bytes: gib(n_bytes) for n_bytes in sizes} == sizes
    assert gib_up((3 << 29) + 1) == "1.51 GiB" and gib_up((300 << 20) + 1) == "301 MiB"
    root = Path(__file__).resolve().parents[1]
    for folder in ("moss_jt", "convert", "demos"):
        for path in (root / folder).rglob("*.py"):
            assert (
                not re.search(r":\.\df?\} GiB", path.read_text(encoding="utf-8"))
                or path.name == "residency.py"
            ), path


def test_the_slowest_link_is_the_answer() -> None:
    placed = plan(MOON, 2048, 8 * GIB)
    text = report("moss-moon-003", placed, CPU)
    gigabytes = placed.disk_bytes_per_pass / 1e9
    assert f"disk              {gigabytes:.2f}    {gigabytes:.2f}  1.00 GB/s given" in text
    assert "RAM               32.12     1.61  20.00 GB/s assumed" in text
    assert f"At best {gigabytes:.2f} s per token" in text and "drafts" in text


def test_a_gpu_plan_names_three_tiers_and_three_links() -> None:
    text = report("moss-moon-003", plan_gpu(MOON, 2048, 8 * GIB, 16 * GIB), GPU)
    for words in ("GPU memory    ", "host, pinned  ", "disk          ", "host to GPU", "12.00 GB/s assumed"):
        assert words in text
    lived = re.findall(r"^(?:GPU memory|host, pinned|disk) +[\d.]+ GiB  ([\d, -]+)", text, re.MULTILINE)
    blocks = sorted(block for part in lived[:3] for block in expand(part))
    assert blocks == list(range(34))


def test_everything_resident_needs_no_drafts() -> None:
    text = report("moss-moon-003", plan(MOON, 2048, 40 * GIB), CPU)
    assert "drafts" not in text and re.search(r"disk +0\.00 +0\.00", text)


def test_ranges() -> None:
    units = [Unit("block", i, 1) for i in (0, 1, 2, 5, 7, 8)]
    assert ranges_of(units) == "0-2, 5, 7-8"
    assert ranges_of([*units[:1], Unit("head", 0, 1, 0, 10), Unit("head", 1, 1, 10, 20)]) == "0; head 0-19"


def expand(ranges: str) -> list[int]:
    collected = []
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        collected += list(range(int(first), int(last or first) + 1))
    return collected
