"""A checkpoint on the Hugging Face hub, fetched shard by shard: each is removed once everything in it is converted."""

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moss_jt.convert.checkpoint import (
    Checkpoint,
    checkpoint_config,
    choose_index,
    read_shard,
    read_weight_map,
)
from moss_jt.errors import MossError
from moss_jt.store import read_json


def open_hub(
    repo: str, download: Path, keep: bool, notice: Callable[[str], None] = lambda text: None
) -> Checkpoint:
    """A checkpoint by its hub id, such as ``fnlp/moss-moon-003-sft``.

    huggingface_hub does the transfers, so HF_ENDPOINT, HF_TOKEN and proxies work, and a broken download goes on.

    Args:
        download: folder for the shards while they are needed.
        keep: leave them there.

    Raises:
        MossError: no such repository, no access, no network, or no MOSS or CodeGen checkpoint in it.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with hub_errors(repo):
        info = HfApi().model_info(repo)
    revision = str(info.sha)
    names = [sibling.rfilename for sibling in info.siblings or []]

    def fetch(name: str) -> Path:
        if name not in names:
            raise MossError(f"{repo} on the hub has no file {name}.")
        with hub_errors(repo):
            return Path(hf_hub_download(repo, name, revision=revision, local_dir=download))

    def release(name: str) -> None:
        if not keep:
            (download / name).unlink(missing_ok=True)

    fields = read_json(fetch("config.json"))
    config = checkpoint_config(fields, f"{repo}: config.json")
    index, single = choose_index(names)
    if index is not None:
        weight_map = read_weight_map(fetch(index), names)
    else:
        assert single is not None
        notice(f"{repo} is one file; it is downloaded whole before it is converted.")
        weight_map = dict.fromkeys(read_shard(fetch(single)), single)
    identity: dict[str, Any] = {"repo": repo, "revision": revision}
    return Checkpoint(repo, identity, config, fields, weight_map, fetch, release)


def remove_download(download: Path) -> None:
    """Remove what is left of a finished download: small files and huggingface_hub's own notes."""
    shutil.rmtree(download, ignore_errors=True)


@contextlib.contextmanager
def hub_errors(repo: str) -> Any:
    """huggingface_hub's errors as one clear line."""
    from huggingface_hub import errors

    try:
        yield
    except errors.HFValidationError as error:
        raise MossError(
            f"{repo!r} is neither a folder nor a hub id such as fnlp/moss-moon-003-sft."
        ) from error
    except errors.GatedRepoError as error:
        raise MossError(f"{repo} is gated: accept its terms on the hub and set HF_TOKEN.") from error
    except errors.RepositoryNotFoundError as error:
        raise MossError(
            f"there is no model {repo} on the hub, or it is private (then set HF_TOKEN)."
        ) from error
    except errors.HfHubHTTPError as error:
        raise MossError(
            f"downloading from {repo} failed: {_first_line(error)} Run it again to go on."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HTTPError, OSError) as error:
        raise MossError(
            f"the hub cannot be reached for {repo}: {_first_line(error)} "
            "Check the network, or set HF_ENDPOINT to a mirror; what is downloaded already is kept."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
