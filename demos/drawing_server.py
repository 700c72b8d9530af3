"""A server that draws, on this machine alone: OpenAI's interface, and bright disks instead of art.

python -P -m moss_jt.demos.drawing_server 7999
moss-jt chat moss-tiny --plugins image --image-url http://127.0.0.1:7999
"""

import base64
import contextlib
import json
import random
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SIDE = 192  # pixels
DISKS = 14
MAX_REQUEST_BYTES = 1 << 20


def draw(description: str) -> bytes:
    """A PNG, the same one for the same description."""
    chance = random.Random(description)
    canvas = [[(245, 242, 232)] * SIDE for _ in range(SIDE)]
    for _ in range(DISKS):
        x, y, radius = chance.randrange(SIDE), chance.randrange(SIDE), chance.randrange(12, 56)
        color = (chance.randrange(40, 256), chance.randrange(40, 256), chance.randrange(40, 256))
        for row in range(max(0, y - radius), min(SIDE, y + radius)):
            half = int((radius**2 - (row - y) ** 2) ** 0.5)
            left, right = max(0, x - half), min(SIDE, x + half)
            canvas[row][left:right] = [color] * (right - left)
    return png(canvas)


def png(canvas: list[list[tuple[int, int, int]]]) -> bytes:
    """Rows of red, green, blue as a PNG file: header, pixels with filter 0 in each row, end."""
    header = struct.pack(">IIBBBBB", len(canvas[0]), len(canvas), 8, 2, 0, 0, 0)
    rows = b"".join(b"\0" + bytes(value for pixel in row for value in pixel) for row in canvas)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        if self.path != "/v1/images/generations":
            self.send_error(404)
            return
        size = int(self.headers.get("Content-Length") or 0)
        if size > MAX_REQUEST_BYTES:
            self.send_error(413)
            return
        try:
            description = str(json.loads(self.rfile.read(size))["prompt"])
        except (ValueError, KeyError, TypeError):
            self.send_error(400)
            return
        answer = {"data": [{"b64_json": base64.b64encode(draw(description)).decode()}]}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Silence: the chat says what it does."""


@contextmanager
def drawing_server(port: int = 0) -> Iterator[str]:
    """Its address, while it runs; port 0 is a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(arguments: list[str]) -> int:
    """Draw until Ctrl-C, in the background until the process is ended: standard input is not read."""
    port = arguments[0] if arguments else "0"
    if not (port.isascii() and port.isdecimal() and int(port) < 1 << 16):
        print(f"{port!r} is not a port: give a number from 0 (a free one) to 65535.", file=sys.stderr)
        return 2
    try:
        with contextlib.suppress(KeyboardInterrupt), drawing_server(int(port)) as address:
            print(f"drawing at {address}; Ctrl-C ends it", flush=True)
            threading.Event().wait()
    except OSError as error:
        print(f"port {port} cannot be used: {error.strerror}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
