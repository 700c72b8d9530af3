"""Adapters that a model runs with: from folders of peft's files to what the operators take."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from moss_jt.engine.causal_model import LoadedAdapter
from moss_jt.errors import MossError
from moss_jt.kernels.adapters import AdapterBank, AdapterShape
from moss_jt.store.config import MossConfig
from moss_jt.train.peft_files import AdapterFile, open_adapter

MOST_ADAPTERS, MOST_NAME = 256, 64

# What users give: a folder or several, each perhaps as NAME=FOLDER, or folders by their names.
Given = str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def named_folders(given: Given | None) -> dict[str, Path]:
    """Folders by the adapters' names; without a name an adapter is called as its folder.

    Raises:
        MossError: a name is impossible, or two adapters have the same.
    """
    if given is None:
        return {}
    pairs = given.items() if isinstance(given, Mapping) else map(_named, _listed(given))
    folders: dict[str, Path] = {}
    for name, folder in pairs:
        if not 0 < len(name) <= MOST_NAME or not name.isprintable() or set(name) & {":", "/", " "}:
            raise MossError(
                f"an adapter cannot be called {name[:80]!r}: a name has 1 to {MOST_NAME} characters, and no colon, slash or space "
                "among them. Give it as NAME=FOLDER."
            )
        if name in folders:
            raise MossError(f"two adapters are called {name!r}. Give one of them as NAME=FOLDER.")
        folders[name] = Path(folder)
    if len(folders) > MOST_ADAPTERS:
        raise MossError(f"{len(folders)} adapters are too many; a model runs with up to {MOST_ADAPTERS}.")
    return folders


def _listed(given: str | Path | Sequence[str | Path]) -> Iterable[str | Path]:
    return [given] if isinstance(given, str | Path) else given


def _named(given: str | Path) -> tuple[str, str | Path]:
    """``NAME=FOLDER``, or a folder alone, whose name may have a = as well if it is there."""
    name, equals, folder = str(given).partition("=")
    if equals and not Path(given).exists():
        return name, folder
    return Path(given).resolve().name, given


class AdapterFiles:
    """The adapters that a model is to run with, of which the headers are read and checked.

    names  in order
    """

    def __init__(self, config: MossConfig, given: Given | None) -> None:
        """
        Raises:
            MossError: an adapter is none, belongs to another model, is damaged, or has something that is not done.
        """
        self.config = config
        self._files = {name: open_adapter(folder, config) for name, folder in named_folders(given).items()}
        self.names = [*self._files]
        self._shapes = [_shape(config, file) for file in self._files.values()]

    @property
    def n_bytes(self) -> int:
        """What they take in memory."""
        return sum(shape.bytes_in_bank(self.config) for shape in self._shapes)

    @property
    def rank(self) -> int:
        """The most of them."""
        return max((shape.rank for shape in self._shapes), default=0)

    def load(self) -> tuple[AdapterBank | None, dict[str, LoadedAdapter]]:
        """All of them for the operators, and each by its name.

        Raises:
            MossError: a file is cut short, or has values that are no numbers.
        """
        if not self.names:
            return None, {}
        bank, loaded = AdapterBank(self.config, self._shapes), {}
        for number, (name, file) in enumerate(self._files.items()):
            scale = np.float32(file.settings.alpha / file.settings.rank)
            for (layer, target), pair in file.pairs():
                views = bank.pair(number, layer, target)
                assert views is not None
                views[0][:], views[1][:] = pair.a, scale * pair.b.T
            digest = hashlib.blake2b(bank.directory[:, number, :, 2].tobytes(), digest_size=16)
            digest.update(bank.of(number).data)
            loaded[name] = LoadedAdapter(name, number, digest.digest())
        return bank, loaded


def _shape(config: MossConfig, file: AdapterFile) -> AdapterShape:
    layers = range(file.settings.first_layer(config), config.n_layer)
    return AdapterShape(file.settings.rank, tuple(file.settings.targets), layers)
