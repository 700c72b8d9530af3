"""How a model is loaded: what is asked for is checked, then planned, and only then Jittor starts and the weights are read."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moss_jt.backend.device import Device, Offload, check_choice, decide, parse_device, while_jittor_starts
from moss_jt.backend.gpu_requirements import require_gpu
from moss_jt.convert.named import model_folder
from moss_jt.engine.cache_identity import prompt_cache as open_prompt_cache
from moss_jt.engine.cache_identity import prompt_cache_bytes
from moss_jt.engine.causal_model import LoadedAdapter
from moss_jt.engine.draft_copy import CopyModel, DraftCopy
from moss_jt.engine.draft_length import LONGEST_DRAFT, DraftPace
from moss_jt.engine.prompt_cache import PromptCache
from moss_jt.engine.prompt_lookup import make_drafter
from moss_jt.errors import MossError
from moss_jt.kernels.adapters import AdapterBank
from moss_jt.kernels.needs import CpuNeeds, CudaNeeds
from moss_jt.measure.machine_speed import known_memory_speed
from moss_jt.plan.copy_choice import Choice, best_copy, may_pay, named_copy
from moss_jt.plan.drafting import seconds_per_draft, token_share
from moss_jt.plan.placement import gpu_planner, hold, plan_here
from moss_jt.plan.report import ASSUMED_GPU_MEMORY, ASSUMED_LINK, ASSUMED_MEMORY, GB, Speed, Speeds
from moss_jt.plan.residency import Copy, ResidencyPlan, check_cache_bits, seconds_per_pass
from moss_jt.store.config import MossConfig
from moss_jt.store.copies import copies_of
from moss_jt.store.locations import model_home
from moss_jt.store.model_folder import Store, open_store
from moss_jt.store.sizes import sizes_of_store
from moss_jt.store.tokenizer import Tokenizer
from moss_jt.train.adapter_bank import AdapterFiles, Given
from moss_jt.weights.disk_speed import disk_under
from moss_jt.weights.host_units import HostUnits, open_host_units
from moss_jt.weights.resident_reader import Arrivals

if TYPE_CHECKING:
    from moss_jt.engine.model import Model


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """What :meth:`moss_jt.moss.Moss.load` is asked for; that says what each means.

    Raises:
        MossError: a value is impossible, or of the other device.
    """

    device: str
    memory: str | int | None
    gpu_memory: str | int | None
    host_memory: str | int | None
    context: int | None
    draft: str | int
    draft_model: str | Path
    offload: str
    parallel: int
    prompt_cache: str | int
    cache_bits: int
    adapters: Given | None

    def __post_init__(self) -> None:
        check_choice(self.kind, self.offload)
        others = (self.memory,) if self.kind == "gpu" else (self.gpu_memory, self.host_memory)
        if any(limit is not None for limit in others):
            raise MossError("memory is the CPU's limit; the GPU has two, gpu_memory and host_memory.")
        if not (self.context is None or isinstance(self.context, Integral)):
            raise MossError(f"context is {self.context!r}; it must be a number of tokens.")
        check_cache_bits(self.cache_bits)
        prompt_cache_bytes(self.prompt_cache)

    @property
    def kind(self) -> Device:
        return parse_device(self.device)[0]

    @property
    def number(self) -> int:
        """Of the card."""
        return parse_device(self.device)[1]

    @property
    def way(self) -> Offload:
        return check_choice(self.kind, self.offload)


@dataclass(frozen=True)
class Loaded:
    """A model, and what belongs to it.

    draft     as asked for
    load_s    seconds that it took
    adapters  by their names
    copy      writes ahead of the model
    prompts   where what was read of beginnings is kept for later processes
    arrivals  the weights that stay, which are read while the first text is; None where all were read before
    notice    a sentence for the user about how it was loaded, or empty
    """

    model: "Model"
    tokenizer: Tokenizer
    plan: ResidencyPlan
    draft: str | int = "auto"
    name: str = "MOSS"
    load_s: float = 0.0
    adapters: Mapping[str, LoadedAdapter] = field(default_factory=dict)
    copy: DraftCopy | None = None
    prompts: PromptCache | None = None
    arrivals: Arrivals | None = None
    notice: str = ""


def load(name: str | Path | None, settings: LoadSettings) -> Loaded:
    """Load a model folder.

    Args:
        name: its path, or the name of a converted model; None for the one used last.

    Raises:
        MossError: there is no such model, its folder or an adapter's is damaged, the memory is too little for it, or
            something that a GPU needs is missing.
    """
    begin = time.perf_counter()
    store = open_store(model_folder(name))
    tokenizer = Tokenizer.from_file(store.tokenizer_path)
    files = AdapterFiles(store.config, settings.adapters)
    on = (_OnGpu if settings.kind == "gpu" else _OnCpu)(store, settings, files)
    choice = _choose_copy(store, settings, on)
    # What is wrong with it is said before Jittor starts.
    make_drafter(settings.draft, choice.plan.streams, token_share(choice.plan))
    decide(settings.kind, settings.way, settings.number)
    bank, adapters = files.load()
    model, plan = on.load(choice, bank)
    copy = None
    if choice.copy is not None:
        try:
            pace = _pace(plan, on.speeds())
            longest = int(settings.draft) if str(settings.draft).isdigit() else LONGEST_DRAFT
            copy = DraftCopy(on.load_copy(choice.copy, model, plan), pace, longest)
        except BaseException:
            model.close()
            raise
    hold(plan)
    keep_bytes = prompt_cache_bytes(settings.prompt_cache)
    prompts = open_prompt_cache(store, model.operators.level, keep_bytes, settings.cache_bits)
    about = settings.draft, store.path.name, time.perf_counter() - begin
    return Loaded(model, tokenizer, plan, *about, adapters, copy, prompts, on.arrivals, choice.notice)


class _OnCpu:
    """What depends on the device: a plan, with a copy or without; how fast the links are; and the loading itself."""

    def __init__(self, store: Store, settings: LoadSettings, files: AdapterFiles) -> None:
        self._store, self._settings, self._adapter_bytes = store, settings, files.n_bytes
        self._needs = partial(CpuNeeds, rank=files.rank, cache_bits=settings.cache_bits)
        self._host: HostUnits | None = None

    def plan_with(self, copy: Store | None) -> ResidencyPlan:
        asked, needs = self._settings, self._needs(self._store.config, self._store.bits)
        limits = asked.memory, asked.context, asked.parallel
        drafts = _copy_on(copy, self._needs)
        return plan_here(self._store, needs, *limits, drafts, self._adapter_bytes, asked.cache_bits)

    def speeds(self) -> Speeds:
        home = model_home()
        disk = Speed(disk_under(self._store, home).best, "measured")
        known = known_memory_speed(home)
        return Speeds(disk, Speed(known or ASSUMED_MEMORY * GB, "measured" if known else "assumed"))

    def load(self, choice: Choice, bank: AdapterBank | None) -> tuple["Model", ResidencyPlan]:
        if self._settings.way != "swap":
            self._host = open_host_units(self._store, choice.plan, model_home())
        return load_on_cpu(self._store, choice.plan, self._host, bank), choice.plan

    def load_copy(self, copy: Store, model: "Model", plan: ResidencyPlan) -> CopyModel:
        from moss_jt.engine.load import load_copy

        assert self._host is not None, "what Jittor swaps has no copy"
        return load_copy(copy, model, plan, model_home(), self._host)

    @property
    def arrivals(self) -> Arrivals | None:
        return None if self._host is None else self._host.arrivals


class _OnGpu:
    """The same as :class:`_OnCpu`, on a card."""

    arrivals: Arrivals | None = None

    def __init__(self, store: Store, settings: LoadSettings, files: AdapterFiles) -> None:
        self._store, self._settings = store, settings
        self._needs = partial(CudaNeeds, rank=files.rank)
        card, _ = require_gpu(settings.number)
        needs = self._needs(store.config, store.bits)
        limits = settings.gpu_memory, settings.host_memory, settings.context, settings.way, settings.parallel
        self._planner = gpu_planner(store, needs, card, *limits, files.n_bytes, settings.cache_bits)

    def plan_with(self, copy: Store | None) -> ResidencyPlan:
        return replace(self._planner, copy=_copy_on(copy, self._needs)).plan()

    def speeds(self) -> Speeds:
        disk = Speed(disk_under(self._store, model_home()).best, "measured")
        return Speeds(disk, Speed(ASSUMED_GPU_MEMORY * GB, "assumed"), Speed(ASSUMED_LINK * GB, "assumed"))

    def load(self, choice: Choice, bank: AdapterBank | None) -> tuple["Model", ResidencyPlan]:
        """With the plan for what CUDA takes on the card."""
        from moss_jt.engine.gpu_load import load_gpu_model

        planner = replace(self._planner, copy=_copy_on(choice.copy, self._needs))
        model = load_gpu_model(self._store, planner, model_home(), self._settings.way, bank)
        return model, model.plan

    def load_copy(self, copy: Store, model: "Model", plan: ResidencyPlan) -> CopyModel:
        from moss_jt.engine.gpu_load import load_copy

        return load_copy(copy, model, plan, model_home())


def load_on_cpu(
    store: Store, plan: ResidencyPlan, host: HostUnits | None, adapters: AdapterBank | None = None
) -> "Model":
    """Start Jittor, unless it runs, while the weights are read that ``host`` holds; None where Jittor will swap them."""
    try:
        if host is not None:
            while_jittor_starts(host.begin)
        from moss_jt.engine.load import load_model

        return load_model(store, plan, host, adapters)
    except BaseException:
        if host is not None:
            host.close()
        raise


def _copy_on(copy: Store | None, needs: Callable[[MossConfig, int], Any]) -> Copy | None:
    """A copy as the plan takes it, for the operators with these needs."""
    return None if copy is None else Copy(sizes_of_store(copy), needs(copy.config, copy.bits))


def _choose_copy(store: Store, settings: LoadSettings, on: _OnCpu | _OnGpu) -> Choice:
    """The copy that drafts for a model, if any, and the plan with it."""
    may_stream = settings.way in ("auto", "stream")
    if settings.draft_model not in ("auto", "off"):
        if not may_stream:
            raise MossError(
                f"--draft-model needs weights that stream; it does not go with --offload {settings.way}."
            )
        return named_copy(store, model_folder(settings.draft_model), on.plan_with)
    plan = on.plan_with(None)
    if "off" in (settings.draft_model, str(settings.draft)) or not may_pay(plan) or not may_stream:
        return Choice(plan)
    candidates = copies_of(store)
    return best_copy(store, candidates, plan, on.plan_with, on.speeds()) if candidates else Choice(plan)


def _pace(plan: ResidencyPlan, speeds: Speeds) -> DraftPace:
    """What drafts and passes are expected to cost, until they have been measured."""
    link = None if speeds.link is None else speeds.link.bytes_per_s
    pass_s = seconds_per_pass(plan, speeds.disk.bytes_per_s, speeds.memory.bytes_per_s, link)
    return DraftPace(
        pass_s, step_s=seconds_per_draft(plan, speeds.memory.bytes_per_s, on_gpu=link is not None)
    )
