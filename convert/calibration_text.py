"""The text that GPTQ calibrates on, as tokens: a user's file, or the one that comes with the program."""

from importlib.resources import files
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as RustTokenizer

from moss_jt.chat.prompt import META
from moss_jt.errors import MossError
from moss_jt.store.tokenizer import Tokenizer

MAX_TOKENS = 16384  # more takes longer and changes little
MIN_TOKENS = 256
_MAX_CHARACTERS = 1 << 20


def calibration_tokens(tokenizer_text: str, path: Path | None) -> np.ndarray:
    """The first MAX_TOKENS tokens (T,) int32 of a text; ``<eoh>`` and the like in it are special tokens.

    Args:
        tokenizer_text: tokenizer.json.
        path: a UTF-8 text, best in the format of MOSS's turns; None for the text that comes with the program.

    Raises:
        MossError: the file is no text, or too short to say anything about the model.
    """
    text = _built_in() if path is None else _read(path)
    token_ids = Tokenizer(RustTokenizer.from_str(tokenizer_text)).encode(text)[:MAX_TOKENS]
    if len(token_ids) < MIN_TOKENS:
        raise MossError(
            f"{path} has {len(token_ids)} tokens; GPTQ needs {MIN_TOKENS} or more (a few thousand are good). "
            "Name a longer text with --calibration, or leave it out to use the one that comes with moss-jt."
        )
    return np.array(token_ids, np.int32)


def _built_in() -> str:
    """A conversation: its switches and turns come after the instruction that every conversation with MOSS begins with."""
    return META + (files("moss_jt.convert") / "calibration.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(_MAX_CHARACTERS)
    except (OSError, ValueError) as error:
        raise MossError(f"{path} cannot be read as a UTF-8 text: {error}.") from error
