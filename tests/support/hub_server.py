"""A hub on loopback: one repository served from a folder, with what huggingface_hub asks of a hub and no more.

Files named in ``forbidden`` are refused; the first transfer of those in ``cut`` breaks in the middle.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

REVISION = "0123456789abcdef0123456789abcdef01234567"


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    folder: Path
    repo: str
    requests: list[str]
    forbidden: set[str]
    cut: set[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if path.startswith(f"/api/models/{self.repo}"):
            files = sorted(self.folder.iterdir())
            siblings = [{"rfilename": file.name, "size": file.stat().st_size} for file in files]
            fields = {"id": self.repo, "sha": REVISION, "siblings": siblings}
            return self.send(200, json.dumps(fields).encode(), {"Content-Type": "application/json"}, body)
        prefix = f"/{self.repo}/resolve/{REVISION}/"
        file = self.folder / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            code = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            return self.send(404, b"", {"X-Error-Code": code}, body)
        if file.name in self.forbidden:
            return self.send(403, b"", {}, body)
        data = file.read_bytes()
        headers = {"X-Repo-Commit": REVISION, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        if body and file.name in self.cut:
            self.cut.remove(file.name)
            self.close_connection = True
            return self.send(200, data, headers, body, sent=len(data) // 2)
        return self.send(200, data, headers, body)

    def send(
        self, status: int, data: bytes, headers: dict[str, str], body: bool, sent: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[:sent])

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_hub(
    folder: Path, repo: str, forbidden: set[str] | None = None, cut: set[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """(address, log of requests) of a hub that has this one repository."""
    requests: list[str] = []
    fields = {
        "folder": folder,
        "repo": repo,
        "requests": requests,
        "forbidden": set() if forbidden is None else forbidden,
        "cut": set() if cut is None else cut,
    }
    handler = type("Handler", (HubHandler,), fields)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
