"""An accepted request as the journal keeps it, and what any journal can do."""

import hashlib
from collections.abc import Awaitable, Collection, Iterable, Sequence
from typing import Protocol

import msgspec

from protocol.plan import Scored
from protocol.request import Request
from scheduler.core.sequence import FinishReason

#: A generated token, with its scores where the request asks for log probabilities.
Token = int | Scored


def token_id(token: Token) -> int:
    return token.token if isinstance(token, Scored) else token


class Piece(msgspec.Struct, frozen=True, omit_defaults=True):
    """Generated tokens of one choice, at least one, that are journalled together. ``finish``: why its sequence ended with the
    last of them, if it did; that a stop string ended it the tokens say."""

    tokens: list[Token]
    choice: int = 0
    finish: FinishReason | None = None


class JournalError(Exception):
    """The journal can't be used, or no longer; the text says what to do."""


class Listener(msgspec.Struct, frozen=True, array_like=True):
    """Where a request is answered, the Correlation Data that its sender wants back, and the span it was sent in."""

    topic: str
    correlation: bytes | None = None
    traceparent: str | None = None  # not in files of the first release

    def hears_with(self, other: "Listener") -> bool:
        """Whether one answer reaches both: a request may be sent again in another span."""
        return (self.topic, self.correlation) == (other.topic, other.correlation)


class Entry(msgspec.Struct, kw_only=True):
    """``id`` is ``tenant/request_id``. ``accepted_at`` and ``expires_at`` are in Unix seconds; None: never.

    ``attempt`` counts the processes that took it up, ``trials`` those that died while it ran alone for that reason.
    ``pieces`` are those that were published. ``reply`` is the terminal message.
    """

    id: str
    model: str
    request: Request
    prompt: list[int]
    seed: int
    accepted_at: float
    listeners: list[Listener]
    expires_at: float | None = None
    attempt: int = 1
    trials: int = 0
    pieces: list[Piece] = []
    reply: bytes | None = None

    def is_overdue(self, now: float) -> bool:
        """Whether its deadline has passed; ``now`` is in Unix seconds."""
        return self.expires_at is not None and self.expires_at <= now

    @property
    def tenant(self) -> str:
        return self.id.partition("/")[0]

    @property
    def request_id(self) -> str:
        return self.id.partition("/")[2]


class Taken(msgspec.Struct, frozen=True):
    """What the journal holds under an id that came again: who asked what, and the terminal message if it has ended.

    ``ours``: this process is to answer, and no other.
    """

    digest: bytes
    reply: bytes | None
    ours: bool = True


def digest(model: str, request: Request) -> bytes:
    """What makes two requests the same: the model and every field, however they were written."""
    return hashlib.sha256(msgspec.msgpack.encode((model, request), order="deterministic")).digest()


class Journal(Protocol):
    """Every write is queued at once, in order, and durable when its awaitable is done; those raise JournalError."""

    @property
    def durable(self) -> bool:
        """Whether what is written outlives this process."""

    @property
    def full(self) -> bool:
        """Whether nothing more may be accepted for want of space."""

    @property
    def lag(self) -> int:
        """Writes that wait."""

    @property
    def rows(self) -> int:
        """Requests that it holds, ended ones included."""

    def unfinished(self) -> Sequence[Entry]:
        """What an earlier process accepted and didn't deliver, oldest first; each counts one more attempt already."""

    def accept(self, entries: Sequence[Entry]) -> Awaitable[list[Taken | None]]:
        """Write new entries; for an id that is taken nothing is written, and what holds it is returned."""

    def find(self, ids: Sequence[str]) -> Awaitable[list[Taken | None]]:
        """What is known of these ids."""

    def progress(self, pieces: Iterable[tuple[str, int, Piece]]) -> Awaitable[Collection[str]]:
        """Write pieces as ``(id, number of the piece, piece)``. Of those ids that are returned nothing was written:
        another process has taken them over."""

    def listen(self, id: str, listeners: Sequence[Listener]) -> Awaitable[None]:
        """Replace those who are to hear the answer."""

    def end(self, id: str, reply: bytes) -> Awaitable[bool]:
        """Write the terminal message; False: nothing was written, as another process has taken it over."""

    def delivered(self, id: str) -> Awaitable[None]:
        """The broker has the terminal message; from now on it is kept for the retention time only."""

    def trial(self, id: str, *, begins: bool) -> Awaitable[None]:
        """Note that a suspect is about to run alone, or that it got through."""
