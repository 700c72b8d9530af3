"""What the server's owner decides: where it listens, who may ask, what plugins reach, and the bounds of everything."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from moss_jt.chat.turn import MAX_ANSWER_TOKENS
from moss_jt.engine.sampling import SamplingParams
from moss_jt.plugins.interface import Plugin
from moss_jt.plugins.registry import PluginSettings

MIB = 1 << 20
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """Bounds of what clients can have the server do or keep.

    answers          that are written or wait at once; who comes then is told to come again
    body_bytes       of a request
    body_s           seconds in which a request must have arrived
    slow_reader_s    an answer is given up whose reader takes nothing for so long
    ping_s           seconds without an event after which a comment keeps a stream's connection open
    kept_answers     that have ended and can still be taken up again after a lost connection
    kept_s           for so long
    conversations    that are kept on disk; those changed longest ago go first
    conversation_bytes  that one of them may have
    live             conversations whose cache is kept beside those that are being answered
    """

    answers: int = 64
    body_bytes: int = 2 * MIB
    body_s: float = 30.0
    slow_reader_s: float = 60.0
    ping_s: float = 10.0
    kept_answers: int = 256
    kept_s: float = 600.0
    conversations: int = 1000
    conversation_bytes: int = 4 * MIB
    live: int = 32


@dataclass(frozen=True)
class Settings:
    """
    ports      at least one; 0 is any that is free
    keys       of which a request must have one; none are asked for where there are none
    origins    of other sites whose pages may ask
    plugins    that conversations and requests may switch on
    default_plugins  names of those that are on where nobody says otherwise
    streams    hosts that MOSS Vortex's interface may stream to, beside the one that asks
    home       where conversations are kept
    system     a meta instruction in the place of MOSS's own
    adapters   names of those that the model is loaded with: a request has one by naming it as its model
    params, max_new_tokens  where a conversation does not say otherwise
    """

    home: Path
    host: str = "127.0.0.1"
    ports: Sequence[int] = (8000,)
    keys: Sequence[str] = ()
    origins: Sequence[str] = ()
    plugins: Sequence[Plugin] = ()
    default_plugins: Sequence[str] = ()
    plugin_settings: PluginSettings = field(default_factory=PluginSettings)
    streams: Sequence[str] = ()
    system: str | None = None
    adapters: Sequence[str] = ()
    params: SamplingParams = field(default_factory=SamplingParams)
    max_new_tokens: int = MAX_ANSWER_TOKENS
    metrics: bool = True
    limits: Limits = field(default_factory=Limits)

    @property
    def loopback(self) -> bool:
        return self.host in LOOPBACK
