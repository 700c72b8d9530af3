"""A chat over HTTP with what Python brings along: start `moss-jt serve moss-tiny`, then run this file.

The server keeps the conversation. Where the connection breaks in the midst of an answer, the rest is asked for.
"""

import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

SERVER = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"


def request(path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{SERVER}{path}", data, headers))


def events(response: Any) -> Iterator[dict[str, Any]]:
    """What an answer's stream tells, each event a dictionary."""
    for line in response:
        if line.startswith(b"data: "):
            yield json.loads(line[6:])


def answer(conversation: str, message: str) -> Iterator[dict[str, Any]]:
    """The events of an answer to its end, through lost connections."""
    seen = -1
    response = request(f"/api/conversations/{conversation}/turns", {"message": message})
    while True:
        try:
            for event in events(response):
                seen = event.get("n", seen)
                yield event
                if event["type"] in ("end", "error"):
                    return
        except (OSError, HTTPException):
            pass
        response = request(f"/api/conversations/{conversation}/answer?from={seen + 1}")


def main() -> None:
    conversation = json.load(request("/api/conversations", {}))["id"]
    for message in iter(lambda: input("> "), ""):
        for event in answer(conversation, message):
            if event["type"] == "text":
                print(event["text"], end="", flush=True)
            elif event["type"] in ("command", "result"):
                print(f"[{event['text']}]")
            elif event["type"] == "error":
                print(event["error"]["message"])
        print()


if __name__ == "__main__":
    try:
        main()
    except urllib.error.URLError as error:
        sys.exit(f"{SERVER} does not answer ({error.reason}). Start it first: moss-jt serve moss-tiny")
    except (EOFError, KeyboardInterrupt):
        print()
