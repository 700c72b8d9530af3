"""The user's folders, and moss-jt's in them."""

import os
from collections.abc import Mapping
from pathlib import Path

from moss_jt.errors import MossError


def user_home() -> Path:
    """HOME, or what the system knows.

    Raises:
        MossError: there is neither, as for a user that a container was given by number.
    """
    try:
        return Path.home()
    except RuntimeError as error:
        raise MossError("this user has no home folder: set HOME to a folder that can be written.") from error


def own_folder(kind: str, default: str, environment: Mapping[str, str] = os.environ) -> Path:
    """MOSS_JT_HOME, or else moss-jt in the user's folder of a kind: ``XDG_<kind>_HOME``, or ``default`` in the home folder.

    Raises:
        MossError: the user has no home folder, or there is no user of the name after a ``~``.
    """
    if home := environment.get("MOSS_JT_HOME"):
        try:
            return Path(home).expanduser()
        except RuntimeError as error:
            raise MossError(f"MOSS_JT_HOME is {home}, and there is no such user.") from error
    given = environment.get(f"XDG_{kind}_HOME")
    return (Path(given) if given else user_home() / default) / "moss-jt"
