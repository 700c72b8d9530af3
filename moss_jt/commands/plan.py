"""``moss-jt plan``: where the weights would live, and how fast that can be. Loads nothing, needs no GPU."""

import click

from moss_jt.backend.threads import compute_threads
from moss_jt.convert.named import model_folder
from moss_jt.errors import MossError
from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.plan.machine import default_budget, parse_memory, process_memory
from moss_jt.plan.report import GB, Speed, Speeds, report
from moss_jt.plan.residency import ResidencyPlan, plan, plan_gpu
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import ModelSizes, geometry_of_name, sizes_of_store
from moss_jt.terminal.screen import Screen
from moss_jt.weights.disk_speed import disk_under

# What is assumed where nothing is measured or given: a SATA or cloud disk, two channels of DDR4 under two cores,
# PCIe 3 x16, and a card of the lower middle class. docs/memory.md says so beside its tables.
ASSUMED_DISK = 1.0
ASSUMED_MEMORY = 20.0
ASSUMED_GPU_MEMORY = 400.0
ASSUMED_LINK = 12.0


@click.command()
@click.argument("model")
@click.option(
    "--memory", metavar="AMOUNT", help="RAM for the whole process: 8GiB, 80%.  [default: what is free]"
)
@click.option("--gpu-memory", metavar="AMOUNT", help="Plan for a GPU with this much memory.")
@click.option("--host-memory", metavar="AMOUNT", help="With --gpu-memory: RAM for the whole process.")
@click.option(
    "--context", type=int, help="Tokens that the conversation may have.  [default: what the model has]"
)
@click.option("--disk-speed", type=float, metavar="GB/s", help="Sequential reads.  [default: measured]")
@click.option("--link-speed", type=float, metavar="GB/s", help="Between host and GPU.  [default: 12]")
@click.option(
    "--memory-speed", type=float, metavar="GB/s", help="Of RAM, or the GPU's.  [default: 20 or 400]"
)
def command(
    model: str,
    memory: str | None,
    gpu_memory: str | None,
    host_memory: str | None,
    context: int | None,
    disk_speed: float | None,
    link_speed: float | None,
    memory_speed: float | None,
) -> None:
    """Where the weights of MODEL would live, and how fast that can be.

    MODEL is a model folder, or a published model's name or hub id, such as moss-moon-003 or
    fnlp/moss-moon-003-sft-int4: nothing is downloaded.
    """
    if gpu_memory is not None and memory is not None:
        raise click.UsageError("--memory is the limit without a GPU; beside --gpu-memory give --host-memory.")
    if gpu_memory is None and (host_memory is not None or link_speed is not None):
        raise click.UsageError("--host-memory and --link-speed need --gpu-memory.")
    sizes, store = sizes_of(model)
    placed = place(sizes, memory, gpu_memory, host_memory, context)
    speeds = Speeds(
        disk=disk_of(store, disk_speed),
        memory=given_or_assumed(memory_speed, ASSUMED_MEMORY if gpu_memory is None else ASSUMED_GPU_MEMORY),
        link=None if gpu_memory is None else given_or_assumed(link_speed, ASSUMED_LINK),
    )
    Screen().line(report(model, placed, speeds))


def sizes_of(model: str) -> tuple[ModelSizes, Store | None]:
    """Sizes from a model folder where there is one, or else from the geometry that the name stands for.

    Raises:
        MossError: there is no such folder, and no published model has that name.
    """
    try:
        folder = model_folder(model)
    except MossError:
        sizes = geometry_of_name(model)
        if sizes is None:
            raise
        return sizes, None
    store = open_store(folder)
    return sizes_of_store(store), store


def place(
    sizes: ModelSizes,
    memory: str | None,
    gpu_memory: str | None,
    host_memory: str | None,
    context: int | None,
) -> ResidencyPlan:
    """The plan for amounts as typed; limits larger than this machine has are fine here."""
    here = process_memory()
    context = sizes.config.n_positions if context is None else context
    if gpu_memory is None:
        budget = default_budget(here) if memory is None else parse_memory(memory, here.total_bytes)
        needs = CpuNeeds(sizes.config, sizes.bits)
        return plan(sizes, needs, context, budget, threads=compute_threads())
    host = default_budget(here) if host_memory is None else parse_memory(host_memory, here.total_bytes)
    if gpu_memory.strip().endswith("%"):
        raise MossError(
            "--gpu-memory is planned without the GPU, so a share means nothing. Write it like 8GiB."
        )
    card = parse_memory(gpu_memory, 0)
    return plan_gpu(sizes, CudaNeeds(sizes.config, sizes.bits), context, card, host)


def given_or_assumed(gigabytes: float | None, assumed: float) -> Speed:
    if gigabytes is None:
        return Speed(assumed * GB, "assumed")
    if not gigabytes > 0:
        raise MossError(f"{gigabytes} GB/s is no speed. Give a number above 0.")
    return Speed(gigabytes * GB, "given")


def disk_of(store: Store | None, gigabytes: float | None) -> Speed:
    """Measured where the model folder is there: a short read of its largest block."""
    if gigabytes is not None or store is None:
        return given_or_assumed(gigabytes, ASSUMED_DISK)
    return Speed(disk_under(store, model_home()).best, "measured")
