"""What all interfaces of a server share: the model once it is loaded, the answers that are being written, what is counted."""

import asyncio
import time
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Plugin
from moss_jt.serve.answering import Answers
from moss_jt.serve.errors import ApiError, bad_value
from moss_jt.serve.metrics import Metrics
from moss_jt.serve.schemas import Sampling
from moss_jt.serve.settings import Settings

if TYPE_CHECKING:
    from moss_jt.moss import Moss

LOADING_RETRY_S = 5.0
SEEDS = 1 << 62  # a client's may be any number


class Service:
    """See the module.

    moss     the model; None while it is loaded
    name     of the model
    created  when the server began, in seconds since 1970
    """

    def __init__(self, settings: Settings, name: str) -> None:
        limits = settings.limits
        self.settings = settings
        self.name = name
        self.created = int(time.time())
        self.moss: Moss | None = None
        self.answers = Answers(limits.answers, limits.kept_answers, limits.kept_s)
        self.metrics = Metrics(
            {
                "answers_running": ("Answers that are written or wait", lambda: self.answers.running),
                "answers_waiting": (
                    "Of these, that wait for room in the cache",
                    lambda: 0 if self.moss is None else self.moss.engine.waiting,
                ),
                "cache_pages_free": (
                    "Pages of 64 tokens that the cache has free",
                    lambda: 0 if self.moss is None else self.moss.engine.pool.free,
                ),
            }
        )
        self.tasks: set[asyncio.Task[None]] = set()
        self.fingerprint = f"moss_jt_{version('moss-jt')}"

    def model(self, name: str | None = None) -> "Moss":
        """
        Raises:
            ApiError: it is not loaded yet, or another one was asked for.
        """
        if self.moss is None:
            raise ApiError(503, "Loading model", code="loading", retry_after_s=LOADING_RETRY_S)
        if name is not None:
            self.adapter(name)
        return self.moss

    @property
    def names(self) -> list[str]:
        """What requests may name as their model: it, and its adapters."""
        return [self.name, *self.settings.adapters]

    def adapter(self, name: str | None) -> str | None:
        """The adapter that a request has which names its model so; None for the model alone.

        Raises:
            ApiError: there is no such model.
        """
        if name is not None and name not in self.names:
            known = ", ".join(map(repr, self.names))
            message = f"There is no model {name[:100]!r} here, only {known}."
            raise ApiError(404, message, "model", "model_not_found")
        return None if name == self.name else name

    def params(self, asked: Sampling) -> SamplingParams:
        """How a request wants tokens chosen; the server's own way where it says nothing.

        Raises:
            ApiError: a value is impossible.
        """
        names = (
            "temperature",
            "top_k",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        given: dict[str, Any] = {name: value for name in names if (value := getattr(asked, name)) is not None}
        if given.get("top_p") == 0:
            given["top_p"] = 1e-9  # the likeliest alone
        if asked.seed is not None:
            given["seed"] = asked.seed % SEEDS
        if asked.logit_bias:
            size = self.model().config.vocab_size
            given["logit_bias"] = {
                int(token): bias for token, bias in asked.logit_bias.items() if token.isdecimal()
            }
            if (
                len(given["logit_bias"]) < len(asked.logit_bias)
                or max(given["logit_bias"], default=0) >= size
            ):
                raise ApiError(
                    400, f"logit_bias: ids of tokens are 0 to {size - 1}.", "logit_bias", "invalid_value"
                )
        try:
            return SamplingParams(**(vars(self.settings.params) | given))
        except MossError as error:
            raise bad_value(error) from error

    def plugins(self, names: list[str] | None) -> list[Plugin]:
        """Those of these names; the server's own choice where nothing is said.

        Raises:
            ApiError: the server's owner has not made one of them available.
        """
        wanted = self.settings.default_plugins if names is None else names
        for name in wanted:
            if name not in [plugin.name for plugin in self.settings.plugins]:
                known = ", ".join(plugin.name for plugin in self.settings.plugins) or "none"
                message = f"There is no plugin {name[:100]!r} on this server; there are {known}."
                raise ApiError(400, message, "plugins", "unknown_plugin")
        return [plugin for plugin in self.settings.plugins if plugin.name in wanted]

    def check_length(self, tokens: int) -> int:
        """Room for an answer to a prompt of so many tokens.

        Raises:
            ApiError: there is none.
        """
        capacity = self.model().model.capacity
        if tokens >= capacity:
            raise ApiError(
                400,
                f"This model's context has room for {capacity} tokens, and the prompt has {tokens}.",
                code="context_length_exceeded",
                n_prompt_tokens=tokens,
                n_ctx=capacity,
            )
        return capacity - tokens

    async def stop(self, most_s: float = 5.0) -> None:
        """End all answers."""
        self.answers.stop()
        await self.answers.ended(most_s)

    async def aside(self, work: Any, *arguments: Any) -> Any:
        """What takes a while, in a thread, so that the loop goes on: tokens of a long text, files."""
        return await asyncio.to_thread(work, *arguments)
