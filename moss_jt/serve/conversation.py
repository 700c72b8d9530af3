"""A conversation that the server keeps: on the disk after every turn, and in the cache while it is used."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moss_jt.chat.chat import Chat
from moss_jt.chat.events import Event, Notice, Text, Thought
from moss_jt.chat.finished_turn import FinishedTurn
from moss_jt.chat.kept_chat import about_chat, sampling_of
from moss_jt.chat.saved import About, OpenConversation
from moss_jt.chat.saved import Conversation as Held
from moss_jt.chat.turn import TooLongError
from moss_jt.engine.causal_model import Watcher
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError
from moss_jt.plugins.interface import Plugin
from moss_jt.plugins.registry import PluginSettings
from moss_jt.serve.answering import Answering
from moss_jt.serve.errors import ApiError, log
from moss_jt.serve.settings import Settings
from moss_jt.serve.turn_answers import ServedSession, event_fields, sources_fields

if TYPE_CHECKING:
    from moss_jt.moss import Moss

TITLE_CHARACTERS = 60


class _Model:
    """moss_jt.chat.chat.ChatModel, whose session can be served."""

    def __init__(self, moss: "Moss", adapter: str | None) -> None:
        self.tokenizer = moss.tokenizer
        self._moss = moss
        self._session = ServedSession(moss.session(adapter=adapter))

    def session(self) -> ServedSession:
        return self._session

    def watch(self, watcher: Watcher | None) -> None:
        pass  # the engine's progress is read, not told

    @property
    def loaded(self) -> float:
        return self._moss.loaded


@dataclass(frozen=True)
class Question:
    """What is to be answered: a message after the first ``turns`` turns, or None for the last one once more.

    params, max_new_tokens  from this answer on; None: as before
    """

    message: str | None
    turns: int
    params: SamplingParams | None = None
    max_new_tokens: int | None = None


class ServedConversation:
    """See the module. Changed in one thread at a time: by its answer, while that is being written.

    turns      those that are finished, with what a page shows of them under ``extra``
    answering  its answer: the one that is being written, or the last one
    asked      the first event of that
    changing   whoever changes it, or asks it, holds this while doing so, and thus waits for what came before
    damaged    lines of its file that could not be read
    adapter    with which it is read and answered: the one that its file has as its model, where the model has it; otherwise None
    """

    def __init__(
        self,
        moss: "Moss",
        settings: Settings,
        plugins: Sequence[Plugin],
        opened: OpenConversation,
        held: Held,
    ) -> None:
        """
        Raises:
            MossError: the context has no room for the instruction.
        """
        self.about: About = held.about
        self.turns: list[FinishedTurn] = [*held.turns]
        self.answering: Answering | None = None
        self.changing = asyncio.Lock()
        self.asked: dict[str, Any] = {}
        self.damaged = held.damaged
        self.updated = opened.path.stat().st_mtime
        self.adapter = held.about.model if held.about.model in settings.adapters else None
        self._moss, self._opened = moss, opened
        params, most = sampling_of(held.about.sampling, settings.params, settings.max_new_tokens)
        system = settings.system if held.about.system is None else held.about.system
        self._model, self.chat = self._begun(plugins, settings.plugin_settings, system, most)
        self.chat.params = params

    def _begun(
        self, plugins: Sequence[Plugin], settings: PluginSettings | None, system: str | None, most: int
    ) -> tuple[_Model, Chat]:
        """A chat of all turns, for the adapter that is chosen."""
        model = _Model(self._moss, self.adapter)
        chat = Chat(model, plugins, settings=settings, system=system, max_new_tokens=most)
        chat.resume(self.turns)
        return model, chat

    def answer_with(self, adapter: str | None) -> None:
        """Go on with this adapter, None for the model alone. With another one all of it is read anew."""
        if adapter == self.adapter:
            return
        before, self.adapter = self.chat, adapter
        begin = before.plugins, before.settings, before.system, before.max_new_tokens
        self._model, self.chat = self._begun(*begin)
        self.chat.params = before.params

    @property
    def id(self) -> str:
        return self._opened.name

    @property
    def busy(self) -> bool:
        return self.answering is not None and not self.answering.ended

    @property
    def in_use(self) -> bool:
        """An answer of it is being written, or somebody changes it."""
        return self.busy or self.changing.locked()

    @property
    def title(self) -> str:
        return self.about.title or (title_of(self.turns[0]) if self.turns else "")

    def keep(self, title: str | None = None) -> None:
        """Write what has changed.

        Raises:
            MossError: the disk fails.
        """
        about = about_chat(self.chat, self.adapter or self._moss.name)
        self.about = replace(about, title=self.about.title if title is None else title)
        self._opened.keep(self.about, self.turns)
        self.updated = self._opened.path.stat().st_mtime

    def close(self) -> None:
        self._opened.close()

    def remove(self) -> None:
        self._opened.remove()

    def write(self, question: Question, answering: Answering) -> None:
        """Answer; what happens goes into the log as it is sent: {"type": .., ..}."""
        self._model.session().serve(answering)
        begin = time.monotonic()
        shown: list[dict[str, Any]] = []
        try:
            for event in self._events(question):
                fields = event_fields(event)
                answering.put(fields)
                _collect(shown, event, fields)
        except TooLongError as error:
            raise ApiError(
                400, str(error), "message", "message_too_long", tokens=error.tokens, room=error.room
            ) from error
        finally:
            kept = self._note(shown, time.monotonic() - begin)
        if self.chat.sources and kept:
            answering.put({"type": "sources", "sources": sources_fields(self.chat.sources)})
        try:
            self.keep()
        except MossError as error:
            log.error("a conversation could not be kept: %s", error)
            answering.put({"type": "notice", "code": "not_kept"})
        answering.put({"type": "timing", **self._stats(time.monotonic() - begin)})
        answering.put({"type": "end", "kept": kept, "turns": len(self.turns), "title": self.title})

    def _events(self, question: Question) -> Iterator[Event]:
        self.chat.params = question.params or self.chat.params
        self.chat.max_new_tokens = question.max_new_tokens or self.chat.max_new_tokens
        if question.message is None:
            del self.turns[-1:]
            return self.chat.retry()
        if question.turns < len(self.turns):
            del self.turns[question.turns :]
            self.chat.resume(self.turns)
        return self.chat.send(question.message)

    def _note(self, shown: list[dict[str, Any]], seconds: float) -> bool:
        """The turn that is finished now, with what was shown of it. Whether there is one: one without an answer is none."""
        history = self.chat.history
        if len(history) <= len(self.turns):
            return False
        extra = {
            "message": self.chat.message,
            "events": shown,
            "stats": self._stats(seconds),
            "time": int(time.time()),
        }
        self.turns.append(replace(history[-1], extra=extra))
        return True

    def _stats(self, seconds: float) -> dict[str, Any]:
        stats, session = self.chat.stats, self._model.session()
        speed = session.later / session.later_s if session.later_s else None
        return {
            "read_tokens": stats.read_tokens,
            "new_tokens": stats.new_tokens,
            "seconds": round(seconds, 3),
            "tokens_per_s": None if speed is None else round(speed, 3),
        }


def _collect(shown: list[dict[str, Any]], event: Event, fields: dict[str, Any]) -> None:
    """What is kept of an event: pieces of a text are one."""
    last = shown[-1] if shown else {}
    if isinstance(event, Text | Thought) and last.get("type") == fields["type"]:
        last["text"] += event.text
    elif not (isinstance(event, Notice) and event.code == "not_kept"):
        shown.append({**fields})


def title_of(turn: FinishedTurn) -> str:
    """A conversation's title where nobody gave it one: how it begins."""
    text = " ".join(str(turn.extra.get("message") or turn.message).split())
    return text if len(text) <= TITLE_CHARACTERS else f"{text[: TITLE_CHARACTERS - 1]}…"


def turn_fields(number: int, turn: FinishedTurn) -> dict[str, Any]:
    """A turn as a page shows it; of one that was kept elsewhere, what its text says."""
    extra = turn.extra
    events = extra.get("events")
    return {
        "turn": number,
        "message": extra.get("message") or turn.message,
        "events": events if isinstance(events, list) else [{"type": "text", "text": turn.answer}],
        "sources": sources_fields(dict(turn.sources)),
        "stats": extra.get("stats"),
        "time": extra.get("time"),
    }
