"""A chat whose conversation is kept on disk, turn by turn: the one that runs, under a name that it may be given."""

import dataclasses
from collections.abc import Mapping, Sequence

from moss_jt.chat.chat import Chat
from moss_jt.chat.finished_turn import FinishedTurn
from moss_jt.chat.saved import PLUGIN_SETTINGS, About, Conversations, OpenConversation
from moss_jt.engine.generate import check_count
from moss_jt.engine.sampling import SamplingParams
from moss_jt.errors import MossError

SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty", "seed")


class Keeping:
    """moss_jt.chat.chat.Keeper. Close it, so that others may go on with the conversation.

    Args:
        conversations: where it is kept.
        model: the path of the model's folder, for who resumes.
        opened: the conversation, where it was opened already; otherwise it is made when its first turn is finished.
    """

    def __init__(
        self, conversations: Conversations, model: str, opened: OpenConversation | None = None
    ) -> None:
        self.conversations = conversations
        self._model = model
        self._opened = opened
        self._failure = ""

    @property
    def name(self) -> str | None:
        """What the conversation is called; None before its first turn."""
        return None if self._opened is None else self._opened.name

    def keep(self, chat: Chat) -> None:
        """See :class:`moss_jt.chat.chat.Keeper`. What goes wrong again in the same way is said once."""
        try:
            self._keep(chat, chat.history)
            self._failure = ""
        except MossError as error:
            if str(error) != self._failure:
                self._failure = str(error)
                raise

    def _keep(self, chat: Chat, turns: Sequence[FinishedTurn]) -> None:
        if self._opened is not None:
            self._opened.keep(self._about(chat), turns)
        elif turns:
            self._opened = self.conversations.create(self._about(chat), turns)

    def save_as(self, chat: Chat, name: str) -> None:
        """Keep the conversation under this name from now on. One that had another name stays there as it is now.

        Raises:
            MossError: another conversation has the name, it is impossible, or the disk fails.
        """
        if self._opened is not None and self._opened.name == name:
            self._keep(chat, chat.history)
        elif self._opened is not None and self._opened.unnamed:
            self.conversations.rename(self._opened, name)
            self._keep(chat, chat.history)
        else:
            opened = self.conversations.create(self._about(chat), chat.history, name)
            self.close()
            self._opened = opened

    def forget(self) -> None:
        """Another conversation begins. What nobody named is deleted."""
        if self._opened is not None and self._opened.unnamed:
            self._opened.remove()
        self.close()

    def close(self) -> None:
        if self._opened is not None:
            self._opened.close()
            self._opened = None

    def _about(self, chat: Chat) -> About:
        return about_chat(chat, self._model)


def about_chat(chat: Chat, model: str = "") -> About:
    """What is kept of a chat beside its turns."""
    sampling = {name: getattr(chat.params, name) for name in SAMPLING}
    settings = {name: getattr(chat.settings, name, None) for name in PLUGIN_SETTINGS}
    return About(
        chat.meta_instruction,
        chat.system,
        tuple(plugin.name for plugin in chat.plugins),
        {**sampling, "max_new_tokens": chat.max_new_tokens},
        {name: str(value) for name, value in settings.items() if value is not None},
        model,
    )


def sampling_of(
    sampling: Mapping[str, int | float | None], params: SamplingParams, max_new_tokens: int
) -> tuple[SamplingParams, int]:
    """What a file says of how tokens are chosen, and these where it says nothing possible."""
    known = {name: value for name, value in sampling.items() if name in SAMPLING}
    most = sampling.get("max_new_tokens")
    try:
        if isinstance(most, int):
            check_count(most)
            max_new_tokens = most
        return dataclasses.replace(params, **known), max_new_tokens  # type: ignore[arg-type]
    except (MossError, TypeError, ValueError):
        return params, max_new_tokens
