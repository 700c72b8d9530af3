"""The two vocabularies that tests use: moss-tiny's, which is always there, and MOSS's own, where it lies beside the project."""

from functools import cache

from tokenizers import Tokenizer as RustTokenizer

from moss_jt.convert.tokenizer import build_tokenizer
from moss_jt.store.locations import tiny_checkpoint
from moss_jt.store.tokenizer import Tokenizer
from tests.support.shared import shared


@cache
def tiny_tokenizer() -> Tokenizer:
    folder = tiny_checkpoint()
    return Tokenizer(
        RustTokenizer.from_str(build_tokenizer(lambda name: folder / name, {"vocab_size": 2176}))
    )


@cache
def moss_tokenizer() -> Tokenizer:
    folder = shared("moss-tokenizer")
    return Tokenizer(
        RustTokenizer.from_str(build_tokenizer(lambda name: folder / name, {"vocab_size": 107008}))
    )
