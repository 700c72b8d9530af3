"""The models that the authors of MOSS have published, and which of them a name means."""

import difflib

from moss_jt.errors import MossError

FAMILY = "moss-moon-003"
NAMES = tuple(
    f"{FAMILY}-{variant}"
    for variant in ("base", "sft", "sft-int8", "sft-int4", "sft-plugin", "sft-plugin-int8", "sft-plugin-int4")
)
PUBLISHED = tuple(f"fnlp/{name}" for name in NAMES)
# What whoever does not know should take: it calls plugins, and needs the least memory.
RECOMMENDED = "fnlp/moss-moon-003-sft-plugin-int4"
BY_BITS = {16: "fnlp/moss-moon-003-sft-plugin", 8: "fnlp/moss-moon-003-sft-plugin-int8", 4: RECOMMENDED}
# What converting takes at most, by bits: float16 comes in shards that go once they are converted, the others in one file.
CONVERSION_BYTES = {16: 45 * 10**9, 8: 37 * 10**9, 4: 22 * 10**9}


def hub_id_of(name: str) -> str | None:
    """The hub id that is meant by a name: itself where it has an owner, or a published model of that name, or nearly so."""
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return name
    close = difflib.get_close_matches(name.lower(), NAMES, 1, 0.8)
    return f"fnlp/{close[0]}" if close and "/" not in name else None


def bits_of_name(name: str) -> int | None:
    """How many bits a model of the family has by its name or hub id; None for any other name.

    A model that could be made from a published one, such as moss-moon-003-base-int4, counts, and so does the family's name.

    Raises:
        MossError: the family has no such model.
    """
    short = _short(name)
    if not short.startswith(FAMILY):
        return None
    full, bits = _parted(short)
    if full not in (FAMILY, *NAMES):
        close = difflib.get_close_matches(short, NAMES, 1, 0.8)
        meant = f"; did you mean {close[0]}?" if close else "."
        raise MossError(f"{name} is not a published MOSS model{meant} Published are {', '.join(PUBLISHED)}.")
    return bits


def closest(name: str) -> str:
    """``; did you mean ..?``, where a name is nearly that of a published model."""
    close = difflib.get_close_matches(name, PUBLISHED, 1, 0.8)
    return f"; did you mean {close[0]}?" if close else ""


def about_unpublished(name: str) -> str:
    """What to know about a name of the family that is not published; empty for those that are, and for other names."""
    short = _short(name)
    if not short.startswith(FAMILY) or short in NAMES:
        return ""
    full, bits = _parted(short)
    if full == FAMILY:
        return f"{name} is the family's name; published are {', '.join(PUBLISHED)}."
    return f"{name} is not published. To make it: moss-jt convert fnlp/{full} --bits {bits}"


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1].lower()


def _parted(short: str) -> tuple[str, int]:
    """A name without its bits, and these."""
    for bits in (4, 8):
        if short.endswith(f"-int{bits}"):
            return short.removesuffix(f"-int{bits}"), bits
    return short, 16
