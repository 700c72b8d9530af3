"""``moss-jt plan``: would a model run, how fast, and where would its weights live? Loads nothing, needs no GPU."""

import contextlib
import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from moss_jt.backend.threads import compute_threads
from moss_jt.commands.options import cache_bits_option
from moss_jt.convert.named import model_folder
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.measure.machine_speed import home_disk_speed, memory_speed, product_speed
from moss_jt.plan.copy_choice import may_pay, pays
from moss_jt.plan.first_word import GFLOP, first_word
from moss_jt.plan.machine import default_budget, parse_memory, process_memory
from moss_jt.plan.placement import gpu_budget, less_margin
from moss_jt.plan.report import (
    ASSUMED_DISK,
    ASSUMED_GPU_MEMORY,
    ASSUMED_LINK,
    ASSUMED_MEMORY,
    GB,
    Speed,
    Speeds,
    number,
    report,
)
from moss_jt.plan.residency import (
    BITS_NAMES,
    Copy,
    ResidencyPlan,
    TooLittleError,
    check_cache_bits,
    gib,
    plan,
    plan_gpu,
)
from moss_jt.plan.summary import duration, summary
from moss_jt.store.config import MOSS_MOON_003
from moss_jt.store.copies import copies_of, open_copy
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.published import BY_BITS, CONVERSION_BYTES, PUBLISHED, about_unpublished
from moss_jt.store.sizes import MIB, ModelSizes, geometry_of_name, sizes_of_geometry, sizes_of_store
from moss_jt.terminal.screen import Screen
from moss_jt.train.course import CourseSettings
from moss_jt.train.fused_optimizers import FullSettings
from moss_jt.train.lora import LoraSettings
from moss_jt.train.step_estimate import TrainingOutlook, adapter_outlook, card_outlook, full_outlook
from moss_jt.train.step_time import Speeds as Pace
from moss_jt.weights.disk_speed import disk_under

# GFLOP/s of matrix products, assumed: two cores with AVX2, and a card of the lower middle class.
ASSUMED_PRODUCTS, ASSUMED_GPU_PRODUCTS = 100.0, 10_000.0
# A token is about a word: at this pace an answer comes as fast as it is read.
READING_S = 0.5
LAST_BLOCKS = 8  # of which an adapter is told beside one in all
LEAST_CONTEXT = 512  # of a conversation that is any use
# A shorter file says little about its disk.
LEAST_PROBE_BYTES = 16 * MIB


@click.command()
@click.argument("model", required=False)
@click.option(
    "--memory", metavar="AMOUNT", help="RAM for the whole process: 8GiB, 80%.  [default: what is free]"
)
@click.option("--bits", type=click.Choice(["4", "8", "16"]), help="Plan MODEL as int4, int8 or float16.")
@click.option(
    "--draft-bits",
    type=click.Choice(["4", "8", "off"]),
    help="With a copy of MODEL in so many bits that writes ahead, for MODEL to verify in one pass.  [default: one that is there]",
)
@click.option("--gpu", is_flag=True, help="Plan for this machine's card.")
@click.option(
    "--device",
    type=click.IntRange(min=0, max=999),
    metavar="N",
    help="With --gpu: the card of that number, from 0, as moss-jt doctor lists them.  [default: 0]",
)
@click.option(
    "--gpu-memory",
    metavar="AMOUNT",
    help="Plan for a card with this much memory, a twentieth of which stays free.",
)
@click.option("--host-memory", metavar="AMOUNT", help="With a card: RAM for the whole process.")
@click.option(
    "--context", type=int, help="Tokens that the conversation may have.  [default: what the model has]"
)
@cache_bits_option
@click.option("--disk-speed", type=float, metavar="GB/s", help="Sequential reads.  [default: measured]")
@click.option(
    "--compute-speed",
    type=float,
    metavar="GFLOP/s",
    help="Of matrix products.  [default: measured, for a card 10000]",
)
@click.option("--link-speed", type=float, metavar="GB/s", help="Between host and card.  [default: 12]")
@click.option(
    "--memory-speed",
    type=float,
    metavar="GB/s",
    help="Of RAM, or the card's.  [default: measured, for a card 400]",
)
@click.option(
    "--train",
    is_flag=True,
    help="What teaching MODEL would take: memory, and seconds per step (moss-jt finetune).",
)
def command(
    model: str | None,
    memory: str | None,
    bits: str | None,
    draft_bits: str | None,
    gpu: bool,
    device: int | None,
    gpu_memory: str | None,
    host_memory: str | None,
    context: int | None,
    cache_bits: int,
    disk_speed: float | None,
    compute_speed: float | None,
    link_speed: float | None,
    memory_speed: float | None,
    train: bool,
) -> None:
    """Would MODEL run, how fast, and where would its weights live? Downloads and loads nothing.

    MODEL is a model folder, or a published model's name or hub id, such as moss-moon-003-sft-plugin-int4; without one, MOSS in
    all three precisions, and which one to take. Speeds are measured on this machine, once, and assumed for other machines.

    \b
    moss-jt plan                                          which MOSS for this machine?
    moss-jt plan moss-moon-003-sft-plugin --bits 4 --memory 14GiB
    moss-jt plan moss-moon-003-sft-plugin-int4 --gpu-memory 12GiB --host-memory 30GiB
    moss-jt plan moss-moon-003-sft-plugin --memory 16GiB --draft-bits 4
    moss-jt plan moss-moon-003-sft --memory 8GiB --train
    """
    on_card = gpu or gpu_memory is not None
    if on_card and memory is not None:
        raise click.UsageError("--memory is the limit without a GPU; beside --gpu-memory give --host-memory.")
    if not on_card and (host_memory is not None or link_speed is not None):
        raise click.UsageError("--host-memory and --link-speed need --gpu or --gpu-memory.")
    if device is not None and not gpu:
        raise click.UsageError("--device needs --gpu.")
    if gpu:
        gpu_memory = this_cards_memory(gpu_memory, device or 0)
    elif gpu_memory is not None:
        gpu_memory = described_cards_memory(gpu_memory)
    if train and model is None:
        raise click.UsageError("--train needs a MODEL.")
    check_cache_bits(cache_bits)
    amounts = memory, gpu_memory, host_memory
    here = on_this_machine(*amounts, gpu)
    screen = Screen()
    if model is None:
        speeds = speeds_of(None, here, on_card, disk_speed, memory_speed, link_speed)
        products = products_of(here, on_card, compute_speed)
        screen.line(overview(amounts, context, cache_bits, speeds, products))
        screen.line(f"\n{advice(amounts, context, cache_bits, speeds, on_card)}")
        return
    sizes, store = sizes_of(model, None if bits is None else int(bits))
    if train:
        disk = speed_of(disk_speed, disk_of(store) if here and disk_speed is None else None, ASSUMED_DISK)
        link = speed_of(link_speed, None, ASSUMED_LINK) if on_card else None
        for line in training_lines(sizes, amounts, products_of(here, on_card, compute_speed), disk, link):
            screen.line(line)
        return
    sizes = replace(sizes, cache_bits=cache_bits)
    chosen = plan_for(sizes, *amounts, context)
    speeds = speeds_of(store, here, on_card, disk_speed, memory_speed, link_speed)
    others = {bits: other for bits, other in fewer_bits(sizes, amounts, context).items() if other is not None}
    quicker = [(bits, speeds.seconds(other)) for bits, other in others.items()]
    remark = ""
    copy = copy_of(store, sizes, draft_bits) if draft_bits is not None or may_pay(chosen) else None
    if copy is not None:
        chosen, remark = with_copy(sizes, copy, draft_bits is not None, amounts, context, chosen, speeds)
    as_it_is = memory is None and (gpu_memory is None or gpu)
    screen.line(summary(speeds.seconds(chosen), as_it_is, quicker))
    screen.line(str(first_word(chosen, speeds.disk.bytes_per_s, products_of(here, on_card, compute_speed))))
    for one in (remark, about_unpublished(model) if store is None else "", shorter(sizes, amounts, chosen)):
        if one:
            screen.line(one)
    screen.line("\n" + report(model, chosen, speeds))


def training_lines(
    sizes: ModelSizes, amounts: "Amounts", products: Speed, disk: Speed, link: Speed | None
) -> list[str]:
    """What an adapter takes, over all blocks and over the last eight, and on the processor what all weights take.

    Args:
        link: to a card, where one is to compute.
    """
    memory, gpu_memory, host_memory = amounts
    here = process_memory()
    given = memory if link is None else host_memory
    budget = default_budget(here) if given is None else parse_memory(given, here.total_bytes)
    card = 0 if gpu_memory is None else parse_memory(gpu_memory, 0)
    speeds, course, threads = (
        Pace(products.bytes_per_s, disk.bytes_per_s),
        CourseSettings(),
        compute_threads(),
    )
    ways: dict[str, Callable[[], TrainingOutlook]] = {}
    for layers in (None, LAST_BLOCKS):
        if layers is None or layers < sizes.config.n_layer:
            name = "An adapter" if layers is None else f"An adapter in the last blocks (--layers {layers})"
            lora = LoraSettings(layers=layers)
            if link is None:
                ways[name] = functools.partial(adapter_outlook, sizes, lora, course, budget, threads, speeds)
            else:
                limits = card, budget, speeds, link.bytes_per_s
                ways[name] = functools.partial(card_outlook, sizes, lora, course, *limits)
    if sizes.bits == 16 and link is None:
        all_of_it = FullSettings(), course, budget, threads, speeds
        ways["All weights (--full)"] = functools.partial(full_outlook, sizes.config, *all_of_it)
    lines = []
    for name, outlook in ways.items():
        try:
            lines.append(f"{name}: {outlook()}.")
        except MossError as error:
            lines.append(f"{name}: {error}")
    speed = f"{products.bytes_per_s / GFLOP:.0f} GFLOP/s {products.source}, the disk {disk}"
    if link is not None:
        speed += f", the link to the card {link}"
    return [*lines, f"Products at {speed}; the memory that may be used: {gib(budget)}."]


Amounts = tuple[str | None, str | None, str | None]  # --memory, --gpu-memory, --host-memory


def overview(amounts: Amounts, context: int | None, cache_bits: int, speeds: Speeds, products: Speed) -> str:
    """What each precision of MOSS brings: whoever has not chosen yet chooses by this."""
    lines = [f"{'MOSS as':<10}{'disk':>10}"]
    for bits, name in BITS_NAMES.items():
        sizes = sizes_of_geometry(MOSS_MOON_003, bits, cache_bits=cache_bits)
        try:
            chosen = plan_for(sizes, *amounts, context)
        except MossError as error:
            text = f"Does not run: {str(error).partition(':')[0]}."
        else:
            wait = duration(first_word(chosen, speeds.disk.bytes_per_s, products).seconds)
            text = f"{summary(speeds.seconds(chosen), False, ())} First word expected after {wait}."
        lines.append(f"{name:<10}{gib(sizes.weight_bytes):>10}  {text}")
    return "\n".join(lines)


def advice(amounts: Amounts, context: int | None, cache_bits: int, speeds: Speeds, on_card: bool) -> str:
    """Which one to take: the most exact that writes at the speed of reading, or else the fastest; and how to get it."""
    seconds = {}
    for bits in BITS_NAMES:
        with contextlib.suppress(MossError):
            sizes = sizes_of_geometry(MOSS_MOON_003, bits, cache_bits=cache_bits)
            chosen = plan_for(sizes, *amounts, context)
            seconds[bits] = speeds.seconds(chosen)
    if not seconds:
        return "None of them runs in so little memory. moss-jt plan moss-moon-003-sft-plugin-int4 says what is missing."
    quick = [bits for bits, each in seconds.items() if each <= READING_S]
    bits = max(quick) if quick else min(seconds, key=lambda bits: seconds[bits])
    home, needed = model_home(), CONVERSION_BYTES[bits]
    lines = [
        f"Take {BITS_NAMES[bits]}: moss-jt convert {BY_BITS[bits]}, and then moss-jt chat{' --gpu' if on_card else ''}. "
        f"Converting takes {needed // GB} GB of disk for a while.",
    ]
    free = free_bytes(home)
    if free < needed:
        lines.append(f"{home} has {free // GB} GB free: set MOSS_JT_HOME to a folder on a larger disk.")
    lines.append(
        "-plugin calls plugins; moss-moon-003-sft, with the same sizes, only talks, and -base continues texts. The details of one: "
        "moss-jt plan NAME"
    )
    return "\n".join(lines)


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.exists())).free


def shorter(sizes: ModelSizes, amounts: Amounts, chosen: ResidencyPlan) -> str:
    """A shorter context with which nothing streams any more, where there is one that is of use; or else empty."""
    if not chosen.streams:
        return ""
    for context in (chosen.context * 3 // 4, chosen.context // 2):
        with contextlib.suppress(MossError):
            if context >= LEAST_CONTEXT and not plan_for(sizes, *amounts, context).streams:
                return f"With --context {context} everything stays in memory, and nothing is read again for each token."
    return ""


def sizes_of(model: str, bits: int | None) -> tuple[ModelSizes, Store | None]:
    """Sizes from a model folder where there is one, or else from the geometry that the name stands for.

    Raises:
        MossError: there is no such folder, and no published model has that name; or bits cannot be had from it.
    """
    try:
        folder = model_folder(model)
    except MossError as error:
        sizes = geometry_of_name(model)
        if sizes is None:
            raise MossError(f"{error}\nPublished are {', '.join(PUBLISHED)}.") from error
        store = None
    else:
        store = open_store(folder)
        sizes = sizes_of_store(store)
    if bits is None or bits == sizes.bits:
        return sizes, store
    if bits > sizes.bits:
        raise MossError(f"{model} is int{sizes.bits}: what quantization lost does not come back.")
    return sizes_of_geometry(sizes.config, bits), store


def fewer_bits(sizes: ModelSizes, amounts: Amounts, context: int | None) -> dict[int, ResidencyPlan | None]:
    """The same model in fewer bits; None where it does not fit even so."""
    plans: dict[int, ResidencyPlan | None] = {}
    for bits in (8, 4):
        if bits < sizes.bits:
            try:
                fewer = sizes_of_geometry(sizes.config, bits, cache_bits=sizes.cache_bits)
                plans[bits] = plan_for(fewer, *amounts, context)
            except MossError:
                plans[bits] = None
    return plans


def copy_of(store: Store | None, sizes: ModelSizes, draft_bits: str | None) -> ModelSizes | None:
    """Sizes of the copy that is asked for, or of the one that was converted.

    Raises:
        MossError: a copy has no fewer bits than the model.
    """
    if draft_bits == "off":
        return None
    if draft_bits is None:
        copies = [] if store is None or store.bits != sizes.bits else copies_of(store)
        return sizes_of_store(open_copy(store, copies[0])) if store is not None and copies else None
    if int(draft_bits) >= sizes.bits:
        raise MossError(f"a copy that drafts has fewer bits than the model, which has {sizes.bits}.")
    return sizes_of_geometry(sizes.config, int(draft_bits))


def with_copy(
    sizes: ModelSizes,
    copy: ModelSizes,
    asked_for: bool,
    amounts: Amounts,
    context: int | None,
    plain: ResidencyPlan,
    speeds: Speeds,
) -> tuple[ResidencyPlan, str]:
    """The better of the plan without a copy and the one with it, and what there is to say about that."""
    name = f"An {BITS_NAMES[copy.bits]} copy that drafts"
    try:
        drafted = plan_for(sizes, *amounts, context, copy)
    except TooLittleError as error:
        lower = f" It would with --context {error.context}." if error.context else ""
        return plain, f"{name} does not fit here.{lower}"
    without, seconds = speeds.seconds(plain), speeds.seconds(drafted)
    if not (seconds < without if asked_for else pays(plain, drafted, speeds)):
        return plain, f"{name} would not pay here: {number(seconds)} s per token."
    return drafted, f"{name} is counted in; without it a token takes {number(without)} s."


def this_cards_memory(gpu_memory: str | None, number: int) -> str:
    """What this machine's card of that number may give, in bytes.

    Raises:
        MossError: there is no card, or it has less.
    """
    from moss_jt.backend.gpu_requirements import find_card

    return str(gpu_budget(gpu_memory, find_card(number)))


def described_cards_memory(gpu_memory: str) -> str:
    """What a card of that size gives, in bytes: as much as ``--gpu`` takes of one that is free by default.

    Raises:
        MossError: it is not an amount of memory.
    """
    if gpu_memory.strip().endswith("%"):
        raise MossError(
            f"--gpu-memory {gpu_memory.strip()} is a share of a card that is not named. Without --gpu, say how much memory the "
            "card has, like 8GiB."
        )
    return str(less_margin(parse_memory(gpu_memory, 0)))


def on_this_machine(memory: str | None, gpu_memory: str | None, host_memory: str | None, gpu: bool) -> bool:
    """Whether these amounts can be had here: a card that was only described is another machine's."""
    if gpu_memory is not None and not gpu:
        return False
    total = process_memory().total_bytes
    given = memory if gpu_memory is None else host_memory
    return given is None or parse_memory(given, total) <= total


def plan_for(
    sizes: ModelSizes,
    memory: str | None,
    gpu_memory: str | None,
    host_memory: str | None,
    context: int | None,
    copy: ModelSizes | None = None,
) -> ResidencyPlan:
    """The plan for amounts as typed; limits larger than this machine has are fine here."""
    here = process_memory()
    context = sizes.config.n_positions if context is None else context
    if gpu_memory is None:
        budget = default_budget(here) if memory is None else parse_memory(memory, here.total_bytes)
        cpu_needs = functools.partial(CpuNeeds, cache_bits=sizes.cache_bits)
        needs = cpu_needs(sizes.config, sizes.bits)
        own = None if copy is None else Copy(copy, cpu_needs(copy.config, copy.bits))
        return plan(sizes, needs, context, budget, threads=compute_threads(), copy=own)
    host = default_budget(here) if host_memory is None else parse_memory(host_memory, here.total_bytes)
    card = parse_memory(gpu_memory, 0)
    cards = None if copy is None else Copy(copy, CudaNeeds(copy.config, copy.bits))
    return plan_gpu(sizes, CudaNeeds(sizes.config, sizes.bits), context, card, host, copy=cards)


def speeds_of(
    store: Store | None,
    here: bool,
    on_card: bool,
    disk: float | None,
    memory: float | None,
    link: float | None,
) -> Speeds:
    """The links' speeds: as given, or else measured on this machine, or assumed for another one and for a card."""
    measured_disk = disk_of(store) if here and disk is None else None
    measured_memory = memory_speed(model_home()) if here and memory is None and not on_card else None
    return Speeds(
        disk=speed_of(disk, measured_disk, ASSUMED_DISK),
        memory=speed_of(memory, measured_memory, ASSUMED_GPU_MEMORY if on_card else ASSUMED_MEMORY),
        link=speed_of(link, None, ASSUMED_LINK) if on_card else None,
    )


def products_of(here: bool, on_card: bool, given: float | None) -> Speed:
    """The speed of matrix products, in FLOP/s."""
    measured = product_speed(model_home()) if here and given is None and not on_card else None
    return speed_of(given, measured, ASSUMED_GPU_PRODUCTS if on_card else ASSUMED_PRODUCTS)


def speed_of(gigabytes: float | None, measured: float | None, assumed: float) -> Speed:
    if gigabytes is None:
        return Speed(assumed * GB, "assumed") if measured is None else Speed(measured, "measured")
    if not gigabytes > 0:
        raise MossError(f"a speed of {gigabytes} is not possible. Give a number above 0.")
    return Speed(gigabytes * GB, "given")


def disk_of(store: Store | None) -> float | None:
    """Measured under the model folder where its files are long enough for that, or else where models come to lie."""
    if store is not None:
        largest = max(store.blocks, key=lambda file: file.nbytes)
        if largest.nbytes >= LEAST_PROBE_BYTES:
            return disk_under(store, model_home()).best
    return home_disk_speed(model_home())
