"""tokenizer.json from a checkpoint's vocab.json and merges.txt, and its added_tokens.json or tokenizer_config.json.

Where the checkpoint has a tokenizer.json alone, all of these are read from there.

MOSS's reference tokenizer loses newlines beside runs of spaces; these settings lose nothing: encoding then decoding any text
gives it back, and where a text has no such run the ids are the reference's own.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from moss_jt.convert.vocabulary import optional_file, read_vocabulary
from moss_jt.errors import MossError
from moss_jt.store.files import read_json

# The five ends of MOSS's fields, and the end of a text.
SPECIAL_TOKENS = ("<eoh>", "<eom>", "<eot>", "<eoc>", "<eor>", "<|endoftext|>")


def build_tokenizer(fetch: Callable[[str], Path], fields: dict[str, Any]) -> str:
    """The text of tokenizer.json.

    Args:
        fetch: gives the path of a checkpoint's file by name.
        fields: the checkpoint's config.json; ids at or above its vocab_size are refused.

    Raises:
        MossError: a file is missing or damaged; it is named.
    """
    source = read_vocabulary(fetch)
    vocabulary = source.tokens
    added, special = _added_tokens(fetch)
    added, special = {**source.added, **added}, special | source.special
    ids = [*vocabulary.values(), *added.values()]
    if not all(type(number) is int and 0 <= number < fields["vocab_size"] for number in ids):
        raise MossError("vocab.json or the added tokens' list holds an id that the model has no row for.")
    if len({*vocabulary.values()}) < len(vocabulary):
        raise MossError("vocab.json gives one id to two tokens.")
    try:
        tokenizer = Tokenizer(BPE(vocabulary, source.merges))
    except Exception as error:  # noqa: BLE001  the package raises no narrower type for an unknown token
        raise MossError(f"vocab.json and merges.txt do not belong together: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    for token in sorted(added, key=added.__getitem__):
        _add(tokenizer, token, added[token], token in special)
    for token in SPECIAL_TOKENS:
        if token not in added and token in vocabulary:
            _add(tokenizer, token, vocabulary[token], True)
    text: str = tokenizer.to_str()
    return text


def _added_tokens(fetch: Callable[[str], Path]) -> tuple[dict[str, int], set[str]]:
    """Ids of the added tokens, and which of them are special.

    added_tokens.json has them in older checkpoints; tokenizer_config.json in newer ones, often alone.
    """
    added, special = _read_optional(fetch, "added_tokens.json"), set(SPECIAL_TOKENS)
    listed = _read_optional(fetch, "tokenizer_config.json").get("added_tokens_decoder", {})
    if not isinstance(listed, dict):
        raise MossError("added_tokens_decoder in tokenizer_config.json is not a list of added tokens.")
    for number, entry in listed.items():
        token = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(token, str) or not re.fullmatch("[0-9]{1,9}", number):
            raise MossError(f"tokenizer_config.json lists {number!r} as an added token, and it is not one.")
        if added.setdefault(token, int(number)) != int(number):
            raise MossError(
                f"{token!r} has the id {added[token]} in added_tokens.json, and {number} in tokenizer_config.json."
            )
        if entry.get("special") is True:
            special.add(token)
    return added, special


def _read_optional(fetch: Callable[[str], Path], name: str) -> dict[str, Any]:
    """A file's fields; none where the checkpoint has no such file."""
    path = optional_file(fetch, name)
    return {} if path is None else read_json(path)


def _add(tokenizer: Tokenizer, token: str, wanted: int, special: bool) -> None:
    if not token or token != token.encode("utf-8", "replace").decode():
        raise MossError(f"the checkpoint adds {token!r}, which is not a token.")
    entry = AddedToken(token, single_word=False, lstrip=False, rstrip=False, normalized=False)
    if special:
        tokenizer.add_special_tokens([entry])
    else:
        tokenizer.add_tokens([entry])
    if tokenizer.token_to_id(token) != wanted:
        raise MossError(
            f"the checkpoint gives {token!r} the id {wanted}, but its id here is {tokenizer.token_to_id(token)}."
        )
