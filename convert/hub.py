"""A checkpoint on the Hugging Face hub, fetched shard by shard: each is removed once everything in it is converted."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moss_jt.convert.checkpoint import (
    Checkpoint,
    checkpoint_config,
    choose_index,
    read_shard,
    read_weight_map,
)
from moss_jt.convert.disk_space import Download, check_disk, folder_bytes
from moss_jt.convert.vocabulary import required_files
from moss_jt.errors import MissingFileError, MossError
from moss_jt.plan.residency import gib
from moss_jt.store.files import FULL, read_json
from moss_jt.store.published import closest


def open_hub(
    repo: str, folder: Path, keep: bool, out: Path, notice: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """A checkpoint by its hub id, such as ``fnlp/moss-moon-003-sft``. Only small files are fetched at once.

    huggingface_hub does the transfers, so HF_ENDPOINT, HF_TOKEN and proxies work, and a broken download goes on.

    Args:
        folder: where shards lie while they are needed.
        keep: leave them there.
        out: the model folder to be, whose disk must hold it beside a checkpoint of one file.

    Raises:
        MossError: no such repository, no access, no network, or no MOSS or CodeGen checkpoint in it.
    """
    # A mirror hands out tokens of the hub's Xet storage, but its data come from an address of their own, which is mirrored
    # by nobody and may be out of reach. Without it every file comes from the mirror. huggingface_hub looks when it is imported.
    if os.environ.get("HF_ENDPOINT"):
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    try:
        from huggingface_hub import HfApi, hf_hub_download
    except ValueError as error:  # it takes the address apart when it is imported
        raise MossError(f"HF_ENDPOINT is not an address ({error}): write it as https://host.") from error

    with hub_errors(repo):
        info = HfApi().model_info(repo, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    identity: dict[str, Any] = {"repo": repo, "revision": str(info.sha)}

    def fetch(name: str) -> Path:
        if name not in sizes:
            raise MissingFileError(f"{repo} on the hub has no file {name}.")
        with hub_errors(repo):
            return Path(hf_hub_download(repo, name, revision=identity["revision"], local_dir=folder))

    fields = read_json(fetch("config.json"))
    config = checkpoint_config(fields, f"{repo}: config.json")
    index, single = choose_index(sizes)
    for name in required_files(sizes):  # before gigabytes come
        fetch(name)

    def read_map() -> dict[str, str]:
        if index is not None:
            return read_weight_map(fetch(index), sizes)
        assert single is not None
        missing = max(0, sizes[single] - folder_bytes(folder))
        if missing:
            notice(
                f"{repo} is one file of {gib(sizes[single])}, downloaded completely before it is converted."
            )
        # Whatever the weights' format, the model folder has about the checkpoint's size.
        check_disk(out, [max(0, sizes[single] - folder_bytes(out))], folder, [missing])
        return dict.fromkeys(read_shard(fetch(single)), single)

    download = Download(folder, sizes, keep)
    return Checkpoint(repo, config, fields, lambda: identity, read_map, fetch, download)


@contextlib.contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """huggingface_hub's errors as one clear line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise MossError(
            f"{repo!r} is neither a folder nor the id of a model on the hub, such as fnlp/moss-moon-003-sft-plugin."
        ) from error
    except errors.GatedRepoError as error:
        raise MossError(f"{repo} is gated: accept its terms on the hub and set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise MossError(
            f"there is no model {repo} on the hub, or it is private (then set HF_TOKEN){closest(repo)}"
        ) from error
    except UnicodeEncodeError as error:  # of a header
        raise MossError(
            "the hub's token (HF_TOKEN, or what its login has saved) has characters that no token has. Copy it anew."
        ) from error
    except ImportError as error:
        raise MossError(
            f"the proxy that the environment names needs a package that is not there: {_first_line(error)} For SOCKS: "
            "pip install socksio. Or unset ALL_PROXY, HTTPS_PROXY and HTTP_PROXY."
        ) from error
    except RuntimeError as error:  # of hf_xet, which has no other name for what goes wrong there
        raise MossError(
            f"the hub's Xet storage, where {repo} lies, cannot be read: {_first_line(error)} Set HF_HUB_DISABLE_XET=1 to go "
            "without it; what is downloaded already is kept."
        ) from error
    # ValueError: an address in HF_ENDPOINT or of a proxy that is none, an answer that is not JSON.
    except (
        errors.HfHubHTTPError,
        errors.OfflineModeIsEnabled,
        errors.HTTPError,
        OSError,
        ValueError,
    ) as error:
        raise MossError(_why_no_download(repo, error)) from error


def _why_no_download(repo: str, error: BaseException) -> str:
    from huggingface_hub import errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _why_no_download(repo, error.__cause__)  # it says no more than that something went wrong
    if isinstance(error, errors.HfHubHTTPError):
        return f"downloading from {repo} failed: {_first_line(error)} Run it again to go on."
    if isinstance(error, OSError) and error.errno in FULL:
        return f"the disk is full: {repo} could not be downloaded. Free some space and run it again to go on."
    return (
        f"the hub cannot be reached for {repo}: {_first_line(error)} "
        "Check the network, or set HF_ENDPOINT to a mirror; what is downloaded already is kept."
    )


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if line.endswith(".") else f"{line}."
