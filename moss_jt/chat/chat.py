"""A conversation with MOSS, plugins included. ``send`` yields what happens, as it happens; it prints and asks nothing.

All of it is one text of tokens over one key/value cache, so that only what is new is ever read: see moss_jt.chat.turn.
"""

import dataclasses
from collections.abc import Generator, Iterable, Sequence
from threading import Event as Flag
from typing import Protocol

from moss_jt.chat.context import ConversationContext
from moss_jt.chat.events import Event, Notice
from moss_jt.chat.field_reader import ChatSession
from moss_jt.chat.finished_turn import FinishedTurn, finished_turn, turn_tokens
from moss_jt.chat.language import Language, language_of, user_language
from moss_jt.chat.prompt import PromptEncoder, instruction, text_of
from moss_jt.chat.turn import MAX_ANSWER_TOKENS, Turn, TurnStats, least_tokens
from moss_jt.engine.causal_model import Watcher
from moss_jt.engine.generate import check_count
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError, Reason
from moss_jt.plugins.interface import Plugin, Source
from moss_jt.plugins.registry import PluginSettings, make_plugins
from moss_jt.store.tokenizer import Tokenizer

# Finished turns that a chat remembers as text; its model has fewer before it.
MOST_TURNS = 1000


class ChatModel(Protocol):
    """moss_jt.moss.Moss."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def session(self) -> ChatSession: ...

    def watch(self, watcher: Watcher | None) -> None: ...

    @property
    def loaded(self) -> float: ...


class Keeper(Protocol):
    """moss_jt.chat.kept_chat.Keeping."""

    def keep(self, chat: "Chat") -> None:
        """Have what is kept be as the conversation is.

        Raises:
            MossError: that is not possible.
        """
        ...

    def forget(self) -> None:
        """The conversation is forgotten, and another begins."""
        ...


class Chat:
    """A conversation.

    plugins         those that are switched on
    params          how tokens are chosen; may be changed between answers, as may max_new_tokens
    system          the user's own meta instruction; None is MOSS's
    message         what the user wrote last; None before the first message
    keeper          keeps the conversation where it outlives the program: called after each turn that has ended, with the chat
    language        of the conversation: what the user wrote last, at first the locale's
    """

    def __init__(
        self,
        moss: ChatModel,
        plugins: Iterable[str | Plugin] = (),
        *,
        settings: PluginSettings | None = None,
        system: str | None = None,
        max_new_tokens: int = MAX_ANSWER_TOKENS,
        temperature: float = SamplingParams.temperature,
        top_k: int = SamplingParams.top_k,
        top_p: float = SamplingParams.top_p,
        repetition_penalty: float | None = None,
        seed: int | None = None,
    ) -> None:
        """
        Args:
            moss: a loaded model.
            plugins: names (moss_jt.plugins.registry.plugin_names) or plugin objects.
            settings: where plugins find what they need.
            system: a meta instruction of your own, instead of what MOSS was trained to be told about itself.
            max_new_tokens: the most tokens of an answer.
            temperature: 0 is greedy. For this and what follows see moss_jt.engine.sampling.SamplingParams.

        Raises:
            MossError: the model is no MOSS, there is no such plugin, an option's value is impossible, or the context has
                no room for the meta instruction and a turn.
        """
        check_count(max_new_tokens)
        self.params = SamplingParams(temperature, top_k, top_p, repetition_penalty, seed)
        self.settings = settings
        self.max_new_tokens = max_new_tokens
        self.plugins = make_plugins(plugins, settings)
        self.system = system
        self.message: str | None = None
        self.keeper: Keeper | None = None
        self.language: Language = user_language()
        self._moss = moss
        self._encoder = PromptEncoder(moss.tokenizer)
        session = moss.session()
        self._context = ConversationContext(session, self._instruction(self.plugins, system, session))
        self._cancelled = Flag()
        self._turn: Turn | None = None
        self._last: object = None  # the turn of the last message
        self._history: dict[object, FinishedTurn] = {}
        self._running: Generator[Event] | None = None
        self._asked = 0  # how many messages: each answer has random numbers of its own

    @property
    def turns(self) -> int:
        """Finished turns that the model still has before it."""
        return self._context.turns

    @property
    def history(self) -> list[FinishedTurn]:
        """All finished turns, those that the model has no longer before it among them, up to the newest MOST_TURNS."""
        self._note()
        return [*self._history.values()]

    def _note(self) -> None:
        """Remember the turns that were finished since as text."""
        finished = self._context.finished()
        for turn in [turn for turn in finished if turn not in self._history]:
            while len(self._history) >= MOST_TURNS:
                del self._history[next(iter(self._history))]
            sources = turn.sources if isinstance(turn, Turn) else {}
            dropped = max(0, len(self._history) + 1 - len(finished))
            self._history[turn] = finished_turn(
                self._encoder, finished[turn], sources, self._asked, dropped, self._context.session.ways
            )

    @property
    def meta_instruction(self) -> str:
        """What the conversation begins with."""
        return text_of(instruction(self.plugins, self.system))

    @property
    def token_ids(self) -> list[int]:
        """The conversation as the model has it: the meta instruction and the turns."""
        return self._context.session.token_ids

    @property
    def unread(self) -> int:
        """Tokens that the model must read before it writes on."""
        return self._context.unread

    def watch(self, watcher: Watcher | None) -> None:
        """Have a function called, block after block, while the model reads several tokens; None ends that."""
        self._moss.watch(watcher)

    @property
    def loaded(self) -> float:
        """The share of the weights that stay in memory that is there: reading the first text waits for them."""
        return self._moss.loaded

    @property
    def sources(self) -> dict[int, Source]:
        """Citation number -> source, of the last turn."""
        if self._turn is not None:
            return self._turn.sources
        return dict(self._history[self._last].sources) if self._last in self._history else {}

    @property
    def stats(self) -> TurnStats:
        """Of the last turn."""
        return self._turn.stats if self._turn is not None else TurnStats()

    def send(self, text: str) -> Generator[Event]:
        """Say something; yields what MOSS thinks, does and answers, as it comes.

        A KeyboardInterrupt while it runs, :meth:`cancel`, or closing the iterator ends the answer: what was shown of it
        stays in the conversation, and a turn without an answer is forgotten.

        Raises:
            TooLongError: the message is longer than the context. The conversation is as before, here and below.
            MossError: the model failed.
        """
        if not isinstance(text, str):
            raise MossError(f"a message is text, not {type(text).__name__}.")
        self._stop_running()
        self._cancelled.clear()
        self.message = text
        self.language = language_of(text, self.language)
        params = self.params
        if params.seed is not None:
            params = dataclasses.replace(params, seed=params.seed + self._asked)
        self._asked += 1
        self._turn = Turn(
            self._context,
            self._encoder,
            self.plugins,
            params,
            self.max_new_tokens,
            self._cancelled.is_set,
        )
        self._last = self._turn
        self._running = self._kept(self._turn.events(text))
        return self._running

    def _kept(self, events: Generator[Event]) -> Generator[Event]:
        """The turn's events, and what it leaves is kept however it ends."""
        failure = ""
        try:
            yield from events
        finally:
            events.close()
            self._note()
            if self.keeper is not None:
                try:
                    self.keeper.keep(self)
                except MossError as error:
                    failure = str(error)
        if failure:
            yield Notice("not_kept", {"reason": failure})

    def retry(self) -> Generator[Event]:
        """Forget the last answer, and have another one to the same message. Greedy answers stay the same.

        Raises:
            MossError: nothing was said yet; and as :meth:`send`.
        """
        if self.message is None:
            raise MossError("there is no message yet that could be answered again.")
        self._stop_running()
        if self._context.has(self._last):
            self._history.pop(self._last, None)
            self._context.forget_last()
        return self.send(self.message)

    def resume(self, turns: Sequence[FinishedTurn]) -> int:
        """Go on with a conversation of these turns, under the instruction and with the plugins that are on now.

        Returns:
            how many of the oldest turns the model does not have before it: the context has no room for them.
        """
        self._stop_running()
        history: dict[object, FinishedTurn] = {object(): turn for turn in turns[-MOST_TURNS:]}
        dropped = min(turns[-1].dropped, len(history) - 1) if turns else 0
        present = [*history.items()][dropped:]
        dropped += self._context.restore({key: turn_tokens(self._encoder, turn) for key, turn in present})
        if turns:
            self._context.session.begin_as(turns[-1].ways)
        self._history, self._turn, self._last = history, None, next(reversed(history), None)
        self._asked = turns[-1].asked if turns else 0
        self.message = turns[-1].message if turns else None
        if self.message is not None:
            self.language = language_of(self.message, self.language)
        return dropped

    def cancel(self) -> None:
        """End the answer that is being written, after its next token; for other threads and signal handlers."""
        self._cancelled.set()

    def keep_cache(self) -> None:
        """What the model has made of the conversation so far outlives the process, where there is room: who goes on with it need
        not have it read again."""
        self._context.session.keep()

    def clear(self) -> None:
        """Forget the conversation."""
        self._stop_running()
        session = self._context.session
        self._context = ConversationContext(session, self._instruction(self.plugins, self.system, session))
        self._turn, self._last, self._history, self._asked, self.message = None, None, {}, 0, None
        if self.keeper is not None:
            self.keeper.forget()

    def switch(self, plugins: Iterable[str | Plugin]) -> int:
        """Have these plugins switched on and no others. The conversation stays, and is read anew with the next message.

        Returns:
            how many of the oldest turns had to go, for the longer meta instruction.

        Raises:
            MossError: there is no such plugin, it cannot be loaded or lacks a setting, or the context has no room for the
                longer instruction; nothing is changed then.
        """
        return self._change(make_plugins(plugins, self.settings), self.system)

    def instruct(self, system: str | None) -> int:
        """Have another meta instruction, None for MOSS's own; otherwise as :meth:`switch`."""
        return self._change(self.plugins, system)

    def begin_with(self, plugins: Iterable[str | Plugin], system: str | None) -> int:
        """Both at once."""
        return self._change(make_plugins(plugins, self.settings), system)

    def _change(self, plugins: list[Plugin], system: str | None) -> int:
        token_ids = self._instruction(plugins, system, self._context.session)
        self._stop_running()
        self.plugins, self.system = plugins, system
        return self._context.change_instruction(token_ids)

    def _instruction(self, plugins: Sequence[Plugin], system: str | None, session: ChatSession) -> list[int]:
        """The meta instruction's tokens, where the context has room for them and a turn."""
        token_ids = self._encoder.encode(instruction(plugins, system))
        needed = len(token_ids) + least_tokens(self._encoder)
        if needed > session.capacity:
            raise MossError(
                Reason(
                    "the context has room for {room} tokens, and the instruction that a conversation begins with takes {needed} "
                    "with the shortest turn. Load the model with a larger context, shorten the instruction, or switch on fewer "
                    "plugins.",
                    room=session.capacity,
                    needed=needed,
                )
            )
        return token_ids

    def _stop_running(self) -> None:
        if self._running is not None:
            self._running.close()
            self._running = None
