"""Text to token ids and back. Foreign text is encoded so that it can never hold one of the model's special tokens."""

import codecs
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from moss_jt.errors import MossError
from moss_jt.store.config import LARGEST
from moss_jt.store.files import read_small

# Some editors begin files with it; it is no part of their text.
BYTE_ORDER_MARK = "\ufeff"


def _byte_values() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for characters from 256 up, in order."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    values = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    values.update({chr(256 + index): byte for index, byte in enumerate(others)})
    return values


BYTE_VALUES = _byte_values()


class Tokenizer:
    """A model folder's tokenizer."""

    def __init__(self, rust: RustTokenizer) -> None:
        self._rust = rust
        # Added tokens are written literally: an accent in one is a character, not GPT-2's spelling of a byte. Only where a
        # single such character is in the vocabulary, too, it must stay the byte that other characters are made of.
        self._added = {
            number: token.content.encode()
            for number, token in rust.get_added_tokens_decoder().items()
            if len(token.content) > 1 or rust.model.token_to_id(token.content) is None
        }
        self._plain = RustTokenizer.from_str(rust.to_str())
        self._plain.encode_special_tokens = True

    @classmethod
    def from_file(cls, path: Path) -> "Tokenizer":
        """Read tokenizer.json.

        Raises:
            MossError: the file is missing or damaged.
        """
        data = read_small(path)
        try:
            rust = RustTokenizer.from_str(data.decode("utf-8"))
        except Exception as error:  # noqa: BLE001  the package raises no narrower type for a damaged file
            raise MossError(
                f"{path} is not a tokenizer: {str(error)[:200]}. Convert the checkpoint again."
            ) from error
        # The package makes a list as long as the largest id says, and prints each number that has no token.
        ids = rust.get_vocab().values()
        if not ids or max(ids) >= min(LARGEST["vocab_size"], 2 * len(ids) + 1024):
            raise MossError(
                f"{path} has {len(ids)} tokens and an id of {max(ids, default=0)}. Convert the checkpoint again."
            )
        return cls(rust)

    def check_size(self, vocab_size: int) -> None:
        """Raises MossError where a token's id is none of the model's, as in another model's tokenizer."""
        largest = max(self._rust.get_vocab().values())
        if largest >= vocab_size:
            raise MossError(
                f"tokenizer.json has an id of {largest}, but the model has {vocab_size} tokens. Convert the "
                "checkpoint again."
            )

    def encode(self, text: str) -> list[int]:
        """Ids of our own text: ``<eoh>`` and the other special tokens in it become their ids."""
        ids: list[int] = self._rust.encode(_without_surrogates(text), add_special_tokens=False).ids
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """Ids of foreign text (a user's, a file's, the network's): what looks like a special token stays plain characters."""
        ids: list[int] = self._plain.encode(_without_surrogates(text), add_special_tokens=False).ids
        return ids

    def decode(self, token_ids: list[int]) -> str:
        """The text of ids, special tokens included; ids without a text (padding rows) give nothing."""
        return b"".join(map(self.token_bytes, token_ids)).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, perhaps only part of a character; none for ids without a text (padding rows)."""
        if token_id in self._added:
            return self._added[token_id]
        token = self._rust.id_to_token(token_id) or ""
        if all(character in BYTE_VALUES for character in token):
            return bytes(BYTE_VALUES[character] for character in token)
        return token.encode()  # a vocabulary that spells no bytes

    def id(self, token: str) -> int | None:
        """Id of a token written literally, such as ``<eom>``; None where this vocabulary lacks it."""
        number: int | None = self._rust.token_to_id(token)
        return number


def _without_surrogates(text: str) -> str:
    """The text with ``?`` for each half of a surrogate pair: terminals give those for bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


class IncrementalDecoder:
    """Text of ids as they come, never half a character: bytes of an unfinished one are held back.

    It works on bytes, because a token may end one character and begin the next: text cut at tokens has no bound within which
    it is complete. What comes out, ``finish`` included, is exactly what decoding all ids at once gives.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this id completes; empty while a character is unfinished."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What was held back, with a replacement character for what never became complete."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
