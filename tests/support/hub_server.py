"""A hub on loopback: one repository served from a folder, with what huggingface_hub asks of a hub and no more."""

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

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        self.requests.append(f"{self.command} {path}")
        if path.startswith(f"/api/models/{self.repo}"):
            names = sorted(file.name for file in self.folder.iterdir())
            fields = {"id": self.repo, "sha": REVISION, "siblings": [{"rfilename": name} for name in names]}
            return self.send(200, json.dumps(fields).encode(), {"Content-Type": "application/json"}, body)
        prefix = f"/{self.repo}/resolve/{REVISION}/"
        file = self.folder / path.removeprefix(prefix)
        if not path.startswith(prefix) or not file.is_file():
            code = "EntryNotFound" if path.startswith(prefix) else "RepoNotFound"
            return self.send(404, b"", {"X-Error-Code": code}, body)
        data = file.read_bytes()
        headers = {
            "X-Repo-Commit": REVISION,
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "Accept-Ranges": "bytes",
        }
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        return self.send(206 if begin else 200, data[begin:], headers, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def serve_hub(folder: Path, repo: str) -> Iterator[tuple[str, list[str]]]:
    """(address, log of requests) of a hub that has this one repository."""
    requests: list[str] = []
    handler = type("Handler", (HubHandler,), {"folder": folder, "repo": repo, "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
