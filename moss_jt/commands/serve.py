"""moss-jt serve."""

import logging
import sys
from pathlib import Path
from typing import Any

import click

from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.commands.options import (
    adapters_option,
    loaded,
    loading_options,
    max_new_tokens_option,
    model_argument,
    model_folder,
    sampling_arguments,
    sampling_options,
)
from moss_jt.commands.plugin_options import chat_arguments, plugin_options
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.store.locations import model_home
from moss_jt.terminal.screen import Screen
from moss_jt.train.adapter_bank import named_folders

MOST_KEY_BYTES = 1 << 16


@click.command()
@model_argument
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen at.")
@click.option(
    "--port",
    "ports",
    type=click.IntRange(0, 65535),
    multiple=True,
    default=(8000,),
    show_default=True,
    help="May be given several times: the reference's clients ask at 19324, MOSS Vortex's at 21333.",
)
@click.option(
    "--api-key",
    "keys",
    multiple=True,
    envvar="MOSS_JT_API_KEY",
    metavar="KEY",
    help="Answer only who gives this key. Others on this machine may see it in the list of processes: rather set "
    "MOSS_JT_API_KEY, or give --api-key-file.",
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Keys from a file, one a line; lines with # are none.",
)
@click.option("--open", "opened", is_flag=True, help="Let others than this machine ask without a key.")
@click.option(
    "--parallel",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Room for N conversations of full length in the cache; more run at once while they are shorter.",
)
@click.option(
    "--answers",
    type=click.IntRange(min=1, max=4096),
    default=64,
    show_default=True,
    help="Answers that are written or wait at once; who asks then is told to come again.",
)
@click.option(
    "--cors-origin",
    "origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of this site ask, as https://example.org. May be given several times.",
)
@click.option(
    "--stream-to",
    "streams",
    multiple=True,
    metavar="HOST",
    help="MOSS Vortex's interface streams to addresses that clients name: to their own machine, and to this one. May be given "
    "several times.",
)
@click.option("--metrics/--no-metrics", default=True, show_default=True, help="Numbers at /metrics.")
@plugin_options
@max_new_tokens_option(
    MAX_ANSWER_TOKENS, "The most tokens of an answer in a conversation that the server keeps."
)
@sampling_options
@adapters_option
@loading_options
def command(
    model: str | None,
    host: str,
    ports: tuple[int, ...],
    keys: tuple[str, ...],
    api_key_file: Path | None,
    opened: bool,
    answers: int,
    origins: tuple[str, ...],
    streams: tuple[str, ...],
    metrics: bool,
    max_new_tokens: int,
    **options: Any,
) -> None:
    """Serve MODEL, the one used last by default, over HTTP: OpenAI's interface, and others that docs/serving.md describes.

    \b
    moss-jt serve moss-tiny                        listens at http://127.0.0.1:8000
    moss-jt serve --parallel 4 --memory 16GiB
    moss-jt serve --host 0.0.0.0 --api-key-file keys.txt
    moss-jt serve --adapter poems=my-adapter       requests for the model "poems" get it

    Ctrl-C ends it, and the answers that are being written.
    """
    try:
        from moss_jt.serve.security import read_keys
        from moss_jt.serve.server import Server, addresses, run
        from moss_jt.serve.settings import LOOPBACK, Limits, Settings
    except ModuleNotFoundError as error:
        raise MossError(
            f"the package {error.name} is missing, which serving needs: pip install 'moss-jt[serve]'"
        ) from error
    known = [*keys, *(read_keys(lines_of(api_key_file)) if api_key_file is not None else [])]
    if api_key_file is not None and not known:
        raise MossError(f"{api_key_file} has no key in it.")
    if host not in LOOPBACK and not known and not opened:
        raise MossError(
            f"everybody who reaches {host} could use this server. Give --api-key-file, or --open where that is meant."
        )
    sampling = SamplingParams(**sampling_arguments(options))
    folder = model_folder(model)
    chat = chat_arguments(options, folder)
    adapters = [*named_folders(options["adapters"])]
    if folder.name in adapters:
        raise MossError(f"an adapter is called as the model, {folder.name}. Give it as NAME=DIR.")
    settings = Settings(
        home=model_home() / "conversations",
        host=host,
        ports=ports,
        keys=known,
        origins=origins,
        plugins=chat["plugins"],
        default_plugins=[plugin.name for plugin in chat["plugins"]],
        plugin_settings=chat["settings"],
        streams=streams,
        system=chat["system"],
        adapters=adapters,
        params=sampling,
        max_new_tokens=max_new_tokens,
        metrics=metrics,
        limits=Limits(answers=answers),
    )
    logging.basicConfig(format="moss-jt: %(message)s", level=logging.WARNING)
    screen = Screen(sys.stderr)
    server = Server(settings, folder.name)
    screen.line(f"moss-jt: listening at {', '.join(addresses(host, server.ports))}; loading {folder.name}.")
    run(server, lambda: loaded(str(folder), options), lambda text: screen.line(f"moss-jt: {text}"))


def lines_of(path: Path) -> list[str]:
    """
    Raises:
        MossError: the file is no text, or far too long.
    """
    try:
        with path.open("rb") as file:
            return file.read(MOST_KEY_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise MossError(f"{path} cannot be read as lines of UTF-8 text: {error}.") from error
