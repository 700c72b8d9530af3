"""A conversation as one text of tokens: the meta instruction, then whole turns. The oldest turns go when room is needed.

The model's cache follows the session, so what is appended is read once; only dropping turns, or another instruction, makes
the model read what comes after it anew.
"""

from collections.abc import Sequence

from moss_jt.chat.field_reader import ChatSession


class ConversationContext:
    """See the module.

    turns  how many finished turns it holds
    """

    def __init__(self, session: ChatSession, instruction: Sequence[int]) -> None:
        self.session = session
        self._instruction = len(instruction)
        self._turns: list[int] = []  # tokens of each finished turn, oldest first
        session.truncate(0)
        session.extend(instruction)

    @property
    def turns(self) -> int:
        return len(self._turns)

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
        return self._instruction + sum(self._turns)

    def append(self, token_ids: Sequence[int]) -> None:
        self.session.extend(token_ids)

    def finish_turn(self) -> None:
        """What was appended since the last turn is a turn."""
        self._turns.append(self.session.position - self.turn_start)

    def abandon_turn(self) -> None:
        """Forget what was appended since the last turn."""
        self.session.truncate(self.turn_start)

    def make_room(self, tokens: int) -> int:
        """Drop oldest turns until there is room, where that is possible; returns how many went.

        Reading the rest anew costs much, so that once turns must go, a quarter of the context is made free.
        """
        if self.room >= tokens or not self._turns:
            return 0
        goal = max(tokens, self.session.capacity // 4)
        room, gone = self.room, 0
        while gone < len(self._turns) and room < (goal if gone < len(self._turns) - 1 else tokens):
            room += self._turns[gone]
            gone += 1
        kept = self.session.token_ids[self._instruction + sum(self._turns[:gone]) :]
        del self._turns[:gone]
        self.session.truncate(self._instruction)
        self.session.extend(kept)
        return gone

    def change_instruction(self, instruction: Sequence[int]) -> int:
        """Put another meta instruction before the turns; returns how many turns went because it is longer."""
        self.abandon_turn()
        gone = self.make_room(len(instruction) - self._instruction)
        kept = self.session.token_ids[self._instruction :]
        self._instruction = len(instruction)
        self.session.truncate(0)
        self.session.extend([*instruction, *kept])
        return gone
