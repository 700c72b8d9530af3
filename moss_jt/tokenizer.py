"""Text to token ids and back. Foreign text is encoded so that it can never hold one of the model's special tokens."""

from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from moss_jt.errors import MossError

REPLACEMENT = "\ufffd"


class Tokenizer:
    """A model folder's tokenizer."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust
        added = rust.get_added_tokens_decoder()
        self._special = {number for number, token in added.items() if token.special}
        self._plain = RustTokenizer.from_str(rust.to_str())
        self._plain.encode_special_tokens = True

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json.

        Raises:
            MossError: the file is missing or damaged.
        """
        try:
            return cls(RustTokenizer.from_str(path.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise MossError(f"{path} is missing. Convert the checkpoint again.") from error
        except Exception as error:  # noqa: BLE001  the package raises no narrower type for a damaged file
            raise MossError(f"{path} is no tokenizer: {error}. Convert the checkpoint again.") from error

    def encode(self, text: str) -> list[int]:
        """Ids of our own text: ``<eoh>`` and the other special tokens in it become their ids."""
        ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of foreign text (a user's, a file's, the network's): what looks like a special token stays plain characters."""
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids, special tokens included; ids without a text (padding rows) give nothing."""
        text: str = self._rust.decode(token_ids, skip_special_tokens=False)
        return text

    def id(self, token: str) -> int | None:
        """Id of a token written literally, such as ``<eom>``; None where this vocabulary lacks it."""
        number: int | None = self._rust.token_to_id(token)
        return number

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special


class IncrementalDecoder:
    """Text of ids as they come, never half a character: bytes of an unfinished one are held back."""

    # A character has at most four bytes, so at most three tokens are ever held back for one.
    LONGEST = 4

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(REPLACEMENT) and len(self._pending) < self.LONGEST:
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        """What was held back, with a replacement character for what never became whole."""
        text = self._tokenizer.decode(self._pending)
        self._pending.clear()
        return text
