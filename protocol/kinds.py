"""The kinds of requests: which body comes on which topic."""

from collections.abc import Callable

from protocol.prefill import EmbeddingRequest, ScoreRequest, decode_embedding, decode_score
from protocol.request import Request, decode_request
from protocol.topics import Kind

AnyRequest = Request | EmbeddingRequest | ScoreRequest

BODIES: dict[Kind, type[AnyRequest]] = {"req": Request, "embed": EmbeddingRequest, "score": ScoreRequest}
_KINDS: dict[type[AnyRequest], Kind] = {body: kind for kind, body in BODIES.items()}
_DECODERS: dict[Kind, Callable[[bytes], AnyRequest]] = {
    "req": decode_request,
    "embed": decode_embedding,
    "score": decode_score,
}


def kind_of(request: AnyRequest) -> Kind:
    return _KINDS[type(request)]


def decode(kind: Kind, payload: bytes) -> AnyRequest:
    """Decode and check a body of this kind. Raises BadRequest naming the field, and the limit where there is one."""
    return _DECODERS[kind](payload)
