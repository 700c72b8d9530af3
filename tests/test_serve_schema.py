"""Schemathesis over our own OpenAPI description: what it says is what happens, whatever is sent."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.serve.server import Server
from tests.support.serving import client, served, shared_moss, shared_server, url

# What JSON Schema cannot say: the user has the last word, ids are those of a vocabulary, texts fit into a context, an address is on
# the client's machine, a plugin is on this server. A valid body may be refused there, with a 400; everywhere else it is taken.
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 401, 404, 409]
""" + "".join(
    f"""
[[operations]]
include-path = "{path}"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 409]
"""
    for path in (
        "/v1/chat/completions",
        "/v1/completions",
        "/apply-template",
        "/inference",
        "/api/conversations",
        "/api/conversations/{name}",
        "/api/conversations/{name}/turns",
        "/api/conversations/{name}/turns/{turn}",
        "/",
    )
)


def run(server: Server, folder: Path, examples: int, *more: str) -> None:
    configuration = folder / "schemathesis.toml"
    configuration.write_text(CONFIGURATION)
    command = [
        sys.executable, "-P", "-m", "schemathesis.cli", "--config-file", str(configuration), "run", f"{url(server)}/openapi.json",
        "--checks", "all", "--mode", "all", "--max-examples", str(examples), "--seed", "1", "--request-timeout", "60",
        "--suppress-health-check", "all", "--no-color", *more,
    ]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_bounds_of_numbers_are_in_the_description() -> None:
    text = client(shared_server()).get("/openapi.json").text
    assert '"minimum":' in text and not set(re.findall(r'"(\w+)":', text)) & {"ge", "le", "gt", "lt"}


def test_streams_are_in_the_description() -> None:
    paths = client(shared_server()).get("/openapi.json").json()["paths"]
    for path in ("/v1/chat/completions", "/v1/completions"):
        assert {*paths[path]["post"]["responses"]["200"]["content"]} == {
            "application/json",
            "text/event-stream",
        }
    assert {*paths["/v1/stream"]["get"]["responses"]["200"]["content"]} == {"text/event-stream"}


def test_what_the_description_says_holds(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path, keys=["secret"]) as server:
        run(server, tmp_path, 1, "--phases", "coverage", "--header", "Authorization: Bearer secret")


@pytest.mark.long
def test_what_the_description_says_holds_for_much_more(tmp_path: Path) -> None:
    with served(shared_moss(), tmp_path) as server:
        run(server, tmp_path, 100, "--phases", "examples,coverage,fuzzing,stateful")
