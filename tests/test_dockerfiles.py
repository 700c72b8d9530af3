"""What a reading can check of the Dockerfiles, which cannot be built here: paths, extras, command line, port, rights."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from moss_jt.commands.serve import command

ROOT = Path(__file__).parent.parent
FILES = ("Dockerfile", "Dockerfile.cuda")
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


def instructions(name: str) -> list[tuple[str, str]]:
    """Each instruction and what it is given, lines that go on joined."""
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    text = "\n".join(lines).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def given(name: str, instruction: str) -> list[str]:
    return [rest for one, rest in instructions(name) if one == instruction]


@pytest.fixture(params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_command_line_is_one_of_ours(name: str) -> None:
    """Its arguments are parsed, and nothing is run. It listens where the port is published that is asked for by default."""
    entry, rest = json.loads(given(name, "ENTRYPOINT")[0]), json.loads(given(name, "CMD")[0])
    assert entry[:2] == ["moss-jt", "serve"]
    params = command.make_context("serve", [*entry[2:], *rest]).params
    assert params["model"] == "moss-tiny" and params["host"] == "0.0.0.0"
    assert given(name, "EXPOSE") == [str(params["ports"][0])]
    (health,) = given(name, "HEALTHCHECK")
    assert f"http://127.0.0.1:{params['ports'][0]}/health" in health


def test_what_is_copied_and_installed_exists(name: str) -> None:
    for copied in given(name, "COPY"):
        assert all((ROOT / source).exists() for source in copied.split()[:-1])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = re.findall(r"\"\.\[([\w,]+)\]\"", " ".join(given(name, "RUN")))
    assert len(extras) == 1
    assert {"serve", "search"} <= {*extras[0].split(",")} <= {*project["optional-dependencies"]}
    assert project["scripts"]["moss-jt"]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv"} <= {*ignored}, "neither a history nor this machine's packages are in an image"


def test_a_user_without_rights_keeps_everything_in_the_volume(name: str) -> None:
    order = [one for one, _ in instructions(name)]
    (user,), (volume,) = given(name, "USER"), given(name, "VOLUME")
    made = " ".join(given(name, "RUN"))
    assert f"useradd --create-home {user}" in made and f"chown {user} {volume}" in made
    assert order.index("USER") > max(at for at, one in enumerate(order) if one in ("RUN", "COPY"))
    environment = dict(pair.split("=", 1) for line in given(name, "ENV") for pair in shlex.split(line))
    for variable in ("MOSS_JT_HOME", "JITTOR_HOME"):
        assert Path(environment[variable]).is_relative_to(volume)
    assert not [one for one in environment if SECRET.search(one)] and "ARG" not in order
    assert all(":" in base and not base.endswith(":latest") for base in given(name, "FROM"))
