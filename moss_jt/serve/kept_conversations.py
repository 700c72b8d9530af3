"""All conversations of one kind that a server keeps: those on the disk, and of these the few that are in the cache, too."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from moss_jt.chat.saved import About, Conversations, NoConversationError
from moss_jt.chat.saved import Conversation as Held
from moss_jt.errors import MossError
from moss_jt.serve.answering import Answering
from moss_jt.serve.conversation import Question, ServedConversation, title_of
from moss_jt.serve.errors import ApiError, bad_value, log
from moss_jt.serve.service import Service


class ConversationStore:
    """See the module. Used in the loop; files are read and written in threads."""

    def __init__(self, service: Service, folder: Path) -> None:
        limits = service.settings.limits
        bytes_in_all = limits.conversations * limits.conversation_bytes
        self._service = service
        self._disk = Conversations(folder, limits.conversations, bytes_in_all)
        self._live: OrderedDict[str, ServedConversation] = OrderedDict()
        self._lock = asyncio.Lock()
        self._known: dict[str, tuple[tuple[int, int], dict[str, Any]]] = {}

    async def summaries(self) -> list[dict[str, Any]]:
        """Summaries, those used last first."""
        summaries: list[dict[str, Any]] = await self._service.aside(self._read_summaries)
        for summary in summaries:
            live = self._live.get(summary["id"])
            summary["answering"] = live is not None and live.busy
        return summaries

    def _read_summaries(self) -> list[dict[str, Any]]:
        summaries = []
        known, self._known = self._known, {}
        for name in self._disk.names():
            with contextlib.suppress(MossError, OSError):
                state = (self._disk.folder / f"{name}.jsonl").stat()
                mark = state.st_mtime_ns, state.st_size
                if name in known and known[name][0] == mark:
                    self._known[name] = known[name]
                else:
                    held = self._disk.load(name)
                    title = held.about.title or (title_of(held.turns[0]) if held.turns else "")
                    self._known[name] = mark, {"title": title, "turns": len(held.turns)}
                summaries.append({"id": name, **self._known[name][1], "updated": int(state.st_mtime)})
        return summaries

    async def create(self, about: About) -> ServedConversation:
        """A new conversation.

        Raises:
            ApiError: it cannot be kept, or its instruction is too long.
        """
        self._service.model()
        async with self._lock:
            opened = await self._told(partial(self._disk.create, about))
            return await self._enter(
                partial(self._served, opened, Held(opened.name, about, ())), opened.remove
            )

    async def find(self, name: str) -> ServedConversation:
        """
        Raises:
            ApiError: there is none of that name, or it cannot be read.
        """
        self._service.model()
        async with self._lock:
            if name in self._live:
                self._live.move_to_end(name)
                return self._live[name]
            opened, held = await self._told(partial(self._disk.open, name))
            return await self._enter(partial(self._served, opened, held), opened.close)

    def _served(self, opened: Any, held: Held) -> ServedConversation:
        service = self._service
        known = {plugin.name: plugin for plugin in service.settings.plugins}
        plugins = [known[name] for name in held.about.plugins if name in known]
        return ServedConversation(service.model(), service.settings, plugins, opened, held)

    async def _enter(
        self, make: Callable[[], ServedConversation], undo: Callable[[], None]
    ) -> ServedConversation:
        try:
            conversation: ServedConversation = await self._told(make)
        except BaseException:
            undo()
            raise
        self._live[conversation.id] = conversation
        for name, other in [*self._live.items()]:
            if len(self._live) <= self._service.settings.limits.live:
                break
            if not other.in_use and other is not conversation:
                del self._live[name]
                other.close()
        return conversation

    async def _told(self, work: Callable[[], Any]) -> Any:
        """What takes the disk, with its errors as clients read them: without paths."""
        try:
            return await self._service.aside(work)
        except NoConversationError as error:
            raise ApiError(404, "There is no such conversation.", code="not_found") from error
        except MossError as error:
            log.error("a conversation cannot be used: %s", error)
            raise ApiError(
                507, "The conversation cannot be read or kept; the server's log says why.", code="not_kept"
            ) from error

    @contextlib.asynccontextmanager
    async def changing(self, name: str) -> AsyncIterator[ServedConversation]:
        """A conversation of which no answer is being written, and which nobody else changes or asks meanwhile.

        Raises:
            ApiError: one is being written.
        """
        async with self._held(name) as conversation:
            if conversation.busy:
                raise ApiError(409, "An answer of this conversation is being written.", code="conflict")
            try:
                yield conversation
            except MossError as error:
                raise bad_value(error) from error

    @contextlib.asynccontextmanager
    async def _held(self, name: str) -> AsyncIterator[ServedConversation]:
        """A conversation that nobody else holds: whoever waited for it may find that it was removed or closed meanwhile."""
        while True:
            conversation = await self.find(name)
            async with conversation.changing:
                if self._live.get(name) is conversation:
                    yield conversation
                    return

    async def keep(self, conversation: ServedConversation, title: str | None = None) -> None:
        await self._told(partial(conversation.keep, title))

    async def ask(self, name: str, question: Question) -> ServedConversation:
        """Have a conversation go on.

        Raises:
            ApiError: an answer of it is being written, it has not so many turns, or the server is busy.
        """
        async with self.changing(name) as conversation:
            if question.message is None and not conversation.turns:
                raise ApiError(
                    400, "Nothing was said yet that could be answered again.", code="invalid_value"
                )
            if question.turns > len(conversation.turns):
                raise ApiError(
                    404, f"The conversation has {len(conversation.turns)} turns.", code="not_found"
                )
            last = conversation.turns[-1] if conversation.turns else None
            message = question.message
            if message is None and last is not None:
                message = str(last.extra.get("message") or last.message)
            number = max(0, len(conversation.turns) - 1) if question.message is None else question.turns
            conversation.asked = {"type": "start", "turn": number, "message": message}
            conversation.answering = self._service.answers.start([partial(conversation.write, question)])
            return conversation

    async def remove(self, name: str) -> None:
        """Forget a conversation, and end what is being written of it."""
        conversation = await self.find(name)
        answering: Answering | None = conversation.answering
        if answering is not None and conversation.busy:
            answering.cancel()
            with contextlib.suppress(ApiError):
                async for _ in answering.follow(0.5):
                    pass
        async with self._held(name) as held, self._lock:
            del self._live[name]
            await self._service.aside(held.remove)

    def close(self) -> None:
        """Let go of all files."""
        for conversation in self._live.values():
            conversation.close()
        self._live.clear()


class ConversationStores:
    """Those of the page, and those of the reference's interface: nobody finds the ones among the others."""

    def __init__(self, service: Service, home: Path) -> None:
        self.page = ConversationStore(service, home / "page")
        self.reference = ConversationStore(service, home / "uid")

    def close(self) -> None:
        for store in (self.page, self.reference):
            store.close()
