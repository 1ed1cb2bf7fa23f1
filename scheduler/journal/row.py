"""How an entry lies in a database: what only its running needs is one value, gone when it ends."""

from collections.abc import Iterable

import msgspec

from protocol.kinds import BODIES, AnyRequest, kind_of
from protocol.request import Request
from protocol.topics import Kind
from scheduler.journal.entry import Entry, Listener, Piece, Token

encode = msgspec.msgpack.encode
_decode_listeners = msgspec.msgpack.Decoder(list[Listener]).decode
_decode_piece = msgspec.msgpack.Decoder(list[Token] | Piece).decode


class _Body(msgspec.Struct, frozen=True, array_like=True):
    """What only the running of a request needs."""

    model: str
    request: msgspec.Raw
    prompt: list[int]
    seed: int
    expires_at: float | None = None  # not in files of the first release
    kind: Kind = "req"  # nor are these
    splits: list[int] = []


_decode_body = msgspec.msgpack.Decoder(_Body).decode
_ENDED = _Body("", msgspec.Raw(encode(Request())), [], 0)


def body_of(entry: Entry) -> bytes:
    request = msgspec.Raw(encode(entry.request))
    kind = kind_of(entry.request)
    return encode(_Body(entry.model, request, entry.prompt, entry.seed, entry.expires_at, kind, entry.splits))


def encode_piece(piece: Piece) -> bytes:
    """Where there is nothing but tokens to tell, as in files of the first release."""
    return encode(piece if piece.choice or piece.finish else piece.tokens)


def load(row: tuple[str, float, int, int, bytes, bytes | None, bytes | None], pieces: Iterable[bytes]) -> Entry:
    """An entry from its row ``(id, accepted_at, attempt, trials, listeners, body, reply)`` and its pieces in order.

    Raises MsgspecError or UnicodeDecodeError for what we can't have written.
    """
    id, accepted_at, attempt, trials, listeners, body, reply = row
    # A request that has ended is only to be told so: its body is gone.
    parts = _ENDED if body is None else _decode_body(body)
    request: AnyRequest = msgspec.msgpack.decode(parts.request, type=BODIES[parts.kind])
    return Entry(
        id=id,
        model=parts.model,
        request=request,
        prompt=parts.prompt,
        seed=parts.seed,
        accepted_at=accepted_at,
        listeners=_decode_listeners(listeners),
        expires_at=parts.expires_at,
        splits=parts.splits,
        attempt=attempt,
        trials=trials,
        pieces=[piece if isinstance(piece, Piece) else Piece(piece) for piece in map(_decode_piece, pieces)],
        reply=reply,
    )
