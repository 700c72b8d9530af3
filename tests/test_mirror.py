"""What README says of mirrors: every file comes from HF_ENDPOINT, also where the hub keeps it in Xet storage.

By itself huggingface_hub asks HF_ENDPOINT for a token of that storage, and then the address that comes with the token, which is no
mirror's. HF_HUB_DISABLE_XET=0 has it do that.
"""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.hub_server import HubHandler, serve_hub
from tests.support.models import random_checkpoint

REPO = "someone/small"
pytest.importorskip("hf_xet")


@pytest.fixture
def storage() -> Iterator[tuple[str, list[str]]]:
    """(address, log of requests) of a Xet storage that has nothing."""
    requests: list[str] = []

    class Storage(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_POST = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Storage)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("disabled", [None, "1", "0"])
def test_files_in_xet_storage_come_from_the_mirror(
    tmp_path: Path, storage: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, disabled: str | None
) -> None:
    address, asked = storage
    send = HubHandler.send

    def as_a_mirror(
        self: HubHandler, status: int, data: bytes, headers: dict[str, str], body: bool, **rest: int
    ) -> None:
        """Passes on what the hub that it mirrors says of its storage."""
        if "/xet-read-token/" in self.path:
            status, data = 200, b"{}"
            headers = {
                "X-Xet-Cas-Url": address,
                "X-Xet-Access-Token": "token",
                "X-Xet-Token-Expiration": "4000000000",
            }
        elif self.path.split("?")[0].endswith(".safetensors"):
            from huggingface_hub import constants

            route = f"{constants.HUGGINGFACE_CO_URL_HOME}api/models/{REPO}/xet-read-token/main"
            headers = {**headers, "X-Xet-Hash": "0" * 64, "X-Xet-Refresh-Route": route}
        send(self, status, data, headers, body, **rest)

    monkeypatch.setattr(HubHandler, "send", as_a_mirror)
    source = random_checkpoint(tmp_path / "source")
    with serve_hub(source, REPO) as (mirror, log):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "moss_jt", "convert", REPO],
            capture_output=True,
            text=True,
            timeout=120,
            env={
                **{name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"},
                **({} if disabled is None else {"HF_HUB_DISABLE_XET": disabled}),
                "MOSS_JT_HOME": str(tmp_path / "home"),
                "HF_HOME": str(tmp_path / "hf"),
                "HF_ENDPOINT": mirror,
                "NO_PROXY": "127.0.0.1",
            },
            check=False,
        )
    tokens = [request for request in log if "xet-read-token" in request]
    fetched = [request for request in log if request.startswith("GET") and request.endswith(".safetensors")]
    if disabled != "0":
        assert done.returncode == 0, done.stderr
        assert fetched and not tokens and not asked
    else:
        assert (
            done.returncode == 1
            and "Traceback" not in done.stderr
            and "moss-jt: error: the hub's Xet storage, where someone/small lies, cannot be read"
            in done.stderr
        )
        assert tokens and asked and not fetched, "the token is the mirror's, the data are not"
