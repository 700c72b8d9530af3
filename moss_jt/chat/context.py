"""A conversation as one text of tokens: the meta instruction, then complete turns. The oldest turns go when room is needed.

The model's cache follows the session, so what is appended is read once; only dropping turns, or another instruction, makes
the model read what comes after it anew.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from moss_jt.chat.field_reader import ChatSession


class Rewriting(NamedTuple):
    """The session shall have ``token_ids`` from ``start`` on, and these be the lengths of the instruction and the turns."""

    start: int
    token_ids: list[int]
    instruction: int
    turns: dict[object, int]


class ConversationContext:
    """See the module. Ctrl-C may come at any moment in it: what it leaves half done is done by the next that looks.

    turns  how many finished turns it holds
    """

    def __init__(self, session: ChatSession, instruction: Sequence[int]) -> None:
        self._session = session
        self._instruction = 0
        self._turns: dict[object, int] = {}  # tokens of each finished turn, oldest first
        self._unfinished: Rewriting | None = None
        self._rewrite(Rewriting(0, [*instruction], len(instruction), {}))

    @property
    def session(self) -> ChatSession:
        self._complete()
        return self._session

    @property
    def turns(self) -> int:
        return len(self._turns)

    @property
    def unread(self) -> int:
        """Tokens that the next answer must read first; to be asked from anywhere, while it reads them, too."""
        return self._session.unread

    @property
    def room(self) -> int:
        """Tokens that may still be appended."""
        return self.session.capacity - self.session.position

    @property
    def most_room(self) -> int:
        """Tokens that a turn can have at all."""
        return self.session.capacity - self._instruction

    @property
    def turn_start(self) -> int:
        """Where the turn that is being written begins; it moves when older turns are dropped."""
        self._complete()
        return self._instruction + sum(self._turns.values())

    def append(self, token_ids: Sequence[int]) -> None:
        self.session.extend(token_ids)

    def finish_turn(self, turn: object) -> None:
        """What was appended since the last turn is a turn."""
        self._turns[turn] = self.session.position - self.turn_start

    def has(self, turn: object) -> bool:
        """Whether it was finished, and not dropped since."""
        return turn in self._turns

    def finished(self) -> dict[object, list[int]]:
        """The tokens of each finished turn, oldest first."""
        token_ids, start, tokens = self.session.token_ids, self._instruction, {}
        for turn, length in self._turns.items():
            tokens[turn] = token_ids[start : start + length]
            start += length
        return tokens

    def restore(self, turns: Mapping[object, Sequence[int]]) -> int:
        """Have these turns in the place of all, as many of the newest as there is room for; returns how many have none."""
        kept: dict[object, list[int]] = {}
        room = self.most_room
        for turn, token_ids in reversed([*turns.items()]):
            if len(token_ids) > room:
                break
            room -= len(token_ids)
            kept = {turn: [*token_ids], **kept}
        rest = [token for token_ids in kept.values() for token in token_ids]
        lengths = {turn: len(token_ids) for turn, token_ids in kept.items()}
        self._rewrite(Rewriting(self._instruction, rest, self._instruction, lengths))
        return len(turns) - len(kept)

    def forget_last(self) -> None:
        """Forget the newest finished turn, and what was appended since."""
        turns = dict([*self._turns.items()][:-1])
        self._rewrite(Rewriting(self._instruction + sum(turns.values()), [], self._instruction, turns))

    def abandon_turn(self) -> None:
        """Forget what was appended since the last turn."""
        self.session.truncate(self.turn_start)

    def make_room(self, tokens: int) -> int:
        """Drop oldest turns until there is room, where that is possible; returns how many went.

        Reading the rest anew costs much, so that once turns must go, a quarter of the context is made free.
        """
        gone, going = self._going(tokens)
        if gone:
            kept = self.session.token_ids[self._instruction + going :]
            turns = dict([*self._turns.items()][gone:])
            self._rewrite(Rewriting(self._instruction, kept, self._instruction, turns))
        return gone

    def change_instruction(self, instruction: Sequence[int]) -> int:
        """Put another meta instruction before the turns; returns how many turns went because it is longer."""
        self.abandon_turn()
        gone, going = self._going(len(instruction) - self._instruction)
        kept = self.session.token_ids[self._instruction + going :]
        turns = dict([*self._turns.items()][gone:])
        self._rewrite(Rewriting(0, [*instruction, *kept], len(instruction), turns))
        return gone

    def _going(self, tokens: int) -> tuple[int, int]:
        """How many of the oldest turns must go so that there is room, and how many tokens these have."""
        lengths = [*self._turns.values()]
        room, gone = self.room, 0
        if room < tokens:
            goal = max(tokens, self.session.capacity // 4)
            while gone < len(lengths) and room < (goal if gone < len(lengths) - 1 else tokens):
                room += lengths[gone]
                gone += 1
        return gone, sum(lengths[:gone])

    def _complete(self) -> None:
        if self._unfinished is not None:
            self._rewrite(self._unfinished)

    def _rewrite(self, rewriting: Rewriting) -> None:
        """May be interrupted and done again."""
        self._unfinished = rewriting
        self._session.truncate(rewriting.start)
        self._session.extend(rewriting.token_ids)
        self._session.keep_beginning(rewriting.instruction)
        self._instruction, self._turns = rewriting.instruction, rewriting.turns
        self._unfinished = None
