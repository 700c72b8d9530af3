"""What chat, generate and bench have in common on the command line: the model, where it may live, how it chooses."""

import contextlib
import select
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moss_jt.convert.named import model_folder
from moss_jt.engine.sampling import REPETITION_PENALTY, SamplingParams
from moss_jt.errors import MossError
from moss_jt.store.locations import remember_last
from moss_jt.store.sizes import CACHE_BITS
from moss_jt.terminal.screen import Screen

if TYPE_CHECKING:
    from moss_jt.moss import Moss

PATIENCE_S = 2.0

Command = TypeVar("Command", bound=Callable[..., Any])


def _all_of(*decorators: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Any) -> Any:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return decorate


model_argument = click.argument("model", required=False)


def max_new_tokens_option(default: int, meaning: str) -> Callable[[Command], Command]:
    return click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        default=default,
        show_default=True,
        help=meaning,
    )


cache_bits_option = click.option(
    "--cache-bits",
    type=click.Choice([str(bits) for bits in CACHE_BITS]),
    default="16",
    show_default=True,
    callback=lambda context, parameter, given: int(given),
    help="8 keeps the key/value cache as int8, in about half the memory: room for nearly twice the context. It changes answers a "
    "little; moss-jt eval MODEL TEXT --cache-bits 8 --against MODEL says how much.",
)
memory_options = _all_of(
    click.option(
        "--gpu",
        is_flag=True,
        help="Compute on the GPU. Weights that do not fit there are copied to it for every token.",
    ),
    click.option(
        "--device",
        type=click.IntRange(min=0, max=999),
        metavar="N",
        help="With --gpu: which card, counted from 0 as moss-jt doctor lists them.  [default: 0]",
    ),
    click.option(
        "--memory",
        metavar="AMOUNT",
        help="Without --gpu: the limit for this process, such as 8GiB or 80%. Weights that do not fit are read from disk for every "
        "token. "
        "[default: what is free, less a margin]",
    ),
    click.option(
        "--gpu-memory",
        metavar="AMOUNT",
        help="With --gpu: the limit on the card. Weights that do not fit stay in RAM and are copied for every token. "
        "[default: what is free there, less a margin]",
    ),
    click.option(
        "--host-memory",
        metavar="AMOUNT",
        help="With --gpu: the limit in RAM. Weights that do not fit there either are read from disk for every token. "
        "[default: what is free, less a margin]",
    ),
    click.option(
        "--context",
        type=int,
        metavar="TOKENS",
        help="How many tokens all of the text may have. [default: as many as the model allows]",
    ),
    cache_bits_option,
    click.option(
        "--offload",
        type=click.Choice(["auto", "stream", "swap", "unified"]),
        default="auto",
        show_default=True,
        help="What happens to weights that do not fit: they are streamed; or, for comparison, Jittor swaps them, or (with --gpu) "
        "they lie in CUDA's unified memory.",
    ),
)
draft_model_option = click.option(
    "--draft-model",
    default="auto",
    show_default=True,
    metavar="auto|off|NAME",
    help="A copy of MODEL in fewer bits that writes ahead, for MODEL to verify in one pass: auto (if one was converted and fits, "
    "where weights stream, or float16 computes on the CPU), off, or its name or path. Changes the speed, never the text.",
)
_ADAPTER = "--adapter", "adapters"
_ADAPTER_HELP = "A folder that moss-jt finetune or peft wrote"
adapter_option = click.option(
    *_ADAPTER,
    multiple=True,
    metavar="DIR",
    help=f"{_ADAPTER_HELP}: MODEL with what was learned.",
    callback=lambda context, parameter, given: at_most_one(given),
)
adapters_option = click.option(
    *_ADAPTER,
    multiple=True,
    metavar="[NAME=]DIR",
    help=f"{_ADAPTER_HELP}, for requests that name it; by default it is called as the folder. May be given several times.",
)
loading_options = _all_of(
    memory_options,
    click.option(
        "--draft",
        default="auto",
        show_default=True,
        help="Guess what follows from the text so far, and verify it in one pass: auto (where weights stream), lookup, "
        "off, or the longest guess. Changes the speed, never the text.",
    ),
    draft_model_option,
    click.option(
        "--prompt-cache",
        metavar="AMOUNT",
        default="2GiB",
        show_default=True,
        help="Keep what was read of a chat's beginning beside the model, so that later starts do not read it again: so much at "
        "most; 0 keeps none. Changes the speed, never the text.",
    ),
)
LOADING = (
    "memory",
    "gpu_memory",
    "host_memory",
    "context",
    "draft",
    "draft_model",
    "offload",
    "parallel",
    "prompt_cache",
    "cache_bits",
    "adapters",
)
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")

sampling_options = _all_of(
    click.option(
        "--greedy", is_flag=True, help="Always choose the most likely token; the same as --temperature 0."
    ),
    click.option(
        "--temperature",
        type=float,
        default=SamplingParams.temperature,
        show_default=True,
        help="Higher values give more varied answers.",
    ),
    click.option(
        "--top-k",
        type=int,
        default=SamplingParams.top_k,
        show_default=True,
        help="Choose among the k most likely tokens; 0 for all.",
    ),
    click.option(
        "--top-p",
        type=float,
        default=SamplingParams.top_p,
        show_default=True,
        help="Choose among the most likely tokens that together reach the probability p.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1, tokens that have already occurred become less likely. "
        f"[default: {REPETITION_PENALTY}; 1 when greedy]",
    ),
    click.option("--seed", type=int, help="The same seed gives the same text."),
)


def sampling_arguments(options: dict[str, Any]) -> dict[str, Any]:
    """The sampling options among a command's, as parameters of Moss.generate and Moss.chat."""
    sampling = {name: options[name] for name in SAMPLING}
    return {**sampling, "temperature": 0.0} if options["greedy"] else sampling


@contextlib.contextmanager
def loaded(model: str | None, options: dict[str, Any]) -> Iterator["Moss"]:
    """The model, loaded as the loading options among a command's say, and closed in the end."""
    from moss_jt.moss import Moss

    loading = {name: options[name] for name in LOADING if name in options}
    device = device_of(options)
    folder = model_folder(model)
    with Moss.load(folder, device=device, **loading) as moss:
        with contextlib.suppress(MossError):  # where nothing can be written, nothing is noted
            remember_last(folder)
        if moss.notice:
            Screen(sys.stderr).line(f"moss-jt: {moss.notice}")
        yield moss


def at_most_one(adapters: tuple[str, ...]) -> tuple[str, ...]:
    """
    Raises:
        UsageError: there are more.
    """
    if len(adapters) > 1:
        raise click.UsageError(
            "one --adapter at a time; moss-jt serve and moss-jt batch run several, chosen by request."
        )
    return adapters


def only_adapter(moss: "Moss") -> str | None:
    """The name of the adapter that a command was given."""
    return next(iter(moss.adapters), None)


def device_of(options: dict[str, Any]) -> str:
    """ "gpu", "gpu:1" or "cpu", as the loading options among a command's say.

    Raises:
        UsageError: options of the one were given for the other.
    """
    if options["gpu"] and options["memory"] is not None:
        raise click.UsageError(
            "--memory is the limit without a GPU; with --gpu give --gpu-memory and --host-memory."
        )
    if not options["gpu"]:
        for name in ("device", "gpu_memory", "host_memory"):
            if options[name] is not None:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --gpu.")
        if options["offload"] == "unified":
            raise click.UsageError("--offload unified needs --gpu.")
    if not options["gpu"]:
        return "cpu"
    return f"gpu:{options['device']}" if options["device"] else "gpu"


def read_text(stream: Any) -> str:
    """All of a stream of bytes as UTF-8, without a byte order mark. Whoever does not know that it is read is told.

    Raises:
        MossError: it is not UTF-8, or far too long for any prompt.
    """
    if stream.isatty():
        Screen(sys.stderr).line("Type the text, and then Ctrl-D on a line of its own.")
    elif not comes_soon(stream):
        Screen(sys.stderr).line("moss-jt: waiting for the text on standard input (Ctrl-C ends this).")
    limit = 1 << 24
    data = stream.read(limit + 1)
    if len(data) > limit:
        raise MossError(f"the prompt has more than {limit >> 20} MiB. Give less text.")
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        raise MossError(f"the prompt is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error


def comes_soon(stream: Any) -> bool:
    """Whether something can be read before a user begins to wonder; what is no file of the system's comes at once."""
    try:
        return bool(select.select([stream.fileno()], [], [], PATIENCE_S)[0])
    except (OSError, ValueError):
        return True
