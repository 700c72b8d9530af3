"""Text2Image(description): a server that draws, OpenAI-compatible or Automatic1111; the picture is saved."""

import base64
import binascii
import os
import re
import time
import urllib.error
from pathlib import Path
from typing import Any

from moss_jt.errors import MossError, Reason, ReasonedError
from moss_jt.plugins.http import check_address, fetch, fetch_json
from moss_jt.plugins.interface import Outcome, Style

# What the model was trained to read after a picture; the command is not repeated.
DONE = "Image generated successfully."
MAX_PICTURE_BYTES = 32 << 20
MAX_DESCRIPTION_CHARACTERS = 1_000
NO_PICTURE = Reason("there is no picture in the server's answer")
SIZE = 512
STEPS = 25
DRAWING_S = 280.0  # a server without a GPU draws for minutes, and sends nothing before it is done
OPENAI_KEY = "OPENAI_API_KEY"  # goes to OpenAI alone
KEY = "MOSS_JT_IMAGE_KEY"  # goes to whatever server --image-url names
OPENAI_ADDRESS = "https://api.openai.com"
MAGIC = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}


class ImagePlugin:
    """The plugin.

    Args:
        address: of the server; ``http://127.0.0.1:7860`` for Automatic1111, any OpenAI-compatible one otherwise.
        folder: where pictures are saved; by default the current one.

    Raises:
        MossError: no address was given.
    """

    name = "image"
    label = "Text-to-image"
    function = "Text2Image"
    argument = "description"
    style: Style = "picture"
    timeout_s = 300.0

    def __init__(self, address: str | None, folder: Path | None = None) -> None:
        if address is None:
            raise MossError(
                Reason(
                    "text-to-image needs a server that draws: start with --image-url and the address of an Automatic1111 or "
                    "OpenAI-compatible server."
                )
            )
        self.address = check_address(address, "--image-url")
        self.folder = folder or Path.cwd()

    def call(self, argument: str, wanted: int) -> Outcome:
        description = " ".join(argument.split())[:MAX_DESCRIPTION_CHARACTERS]
        data = self._draw(description)
        suffix = next((suffix for magic, suffix in MAGIC.items() if data.startswith(magic)), None)
        if suffix is None:
            raise ReasonedError("the server sent neither a PNG nor a JPEG picture")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{file_stem(description)}-{time.time_ns() // 1_000_000 % 10**9:09d}{suffix}"
        path.write_bytes(data)
        return Outcome(text=DONE, picture=path)

    def _draw(self, description: str) -> bytes:
        """Automatic1111's interface, or, where the server has none, OpenAI's."""
        body = {"prompt": description, "width": SIZE, "height": SIZE, "steps": STEPS}
        try:
            answer = fetch_json(
                f"{self.address}/sdapi/v1/txt2img",
                body=body,
                max_bytes=2 * MAX_PICTURE_BYTES,
                timeout_s=DRAWING_S,
            )
            return decoded(picture_in(answer, "images"))
        except urllib.error.HTTPError as error:
            if error.code not in (404, 405):
                raise
        return self._openai(description)

    def _openai(self, description: str) -> bytes:
        # No size and no format: OpenAI's models refuse different ones of them, and each has defaults.
        body = {"prompt": description, "n": 1}
        key = os.environ.get(KEY)
        if key is None and (self.address == OPENAI_ADDRESS or self.address.startswith(f"{OPENAI_ADDRESS}/")):
            key = os.environ.get(OPENAI_KEY)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        base = self.address if self.address.endswith("/v1") else f"{self.address}/v1"
        answer = fetch_json(
            f"{base}/images/generations",
            body=body,
            headers=headers,
            max_bytes=2 * MAX_PICTURE_BYTES,
            timeout_s=DRAWING_S,
        )
        entry = picture_in(answer, "data")
        if isinstance(entry, dict) and entry.get("b64_json"):
            return decoded(entry["b64_json"])
        if not isinstance(entry, dict) or not isinstance(entry.get("url"), str):
            raise ReasonedError(NO_PICTURE)
        return fetch(entry["url"], max_bytes=MAX_PICTURE_BYTES)


def picture_in(answer: Any, key: str) -> Any:
    """The first entry of the list under ``key``, whatever the server sent.

    Raises:
        ReasonedError: there is none.
    """
    entries = answer.get(key) if isinstance(answer, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ReasonedError(NO_PICTURE)
    return entries[0]


def decoded(text: Any) -> bytes:
    """Bytes of base64 text, with or without the prefix of a data address."""
    try:
        return base64.b64decode(str(text).split(",")[-1], validate=True)
    except binascii.Error as error:
        raise ReasonedError("the picture is not valid base64") from error


def file_stem(description: str) -> str:
    """A file name from what was drawn: letters and digits of any script, short, never a path."""
    return re.sub(r"[^\w]+", "-", description).strip("-_")[:40] or "picture"
