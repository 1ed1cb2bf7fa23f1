"""What a tenant sends to have texts read, not continued: to be embedded, or scored.

The body of embeddings follows the OpenAI API reference (`/v1/embeddings`); ``normalize`` is named as vLLM names it, ``pooling``
is ours. OpenAI has no body for scores: ``logprobs`` is that of completions, ``context`` and ``text`` are ours. What every request
may say of its turn is as in `protocol/request.py`.
"""

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from protocol.errors import BadRequest
from protocol.plan import Pooling
from protocol.request import MAX_DEADLINE_MS, Likeliest, TokenId, decode_body

#: As many texts as the OpenAI API takes in one request.
MAX_INPUTS = 2048


class PrefillRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What both kinds may say. Neither generates a token."""

    output_limit: ClassVar[int] = 0
    num_choices: ClassVar[int] = 1

    model: str | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    refuse_late: bool = False

    @property
    def adapter(self) -> str:
        """What ``model`` names behind a colon, or nothing."""
        return (self.model or "").partition(":")[2]


class EmbeddingRequest(PrefillRequest, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A vector is wanted of each text. `parameters` says what each field means."""

    prompt_field: ClassVar[str] = "input"

    input: str | list[str | TokenId | list[TokenId]]
    pooling: Pooling = "last"
    normalize: bool = True
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None

    @property
    def texts(self) -> list[str | list[int]]:
        """What is to be embedded, each as text or token ids."""
        if isinstance(self.input, str):
            return [self.input]
        ids = [part for part in self.input if isinstance(part, int)]
        return [ids] if ids else [part for part in self.input if not isinstance(part, int)]


class ScoreRequest(PrefillRequest, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """The log probability of ``text`` after ``context`` is wanted. `parameters` says what each field means."""

    prompt_field: ClassVar[str] = "text"

    text: str | list[TokenId]
    context: str | list[TokenId] | None = None
    logprobs: Likeliest = 0


_embedding_decoder = msgspec.json.Decoder(EmbeddingRequest)
_score_decoder = msgspec.json.Decoder(ScoreRequest)


def decode_embedding(payload: bytes) -> EmbeddingRequest:
    """Decode and check a body. Raises BadRequest naming the field, and the limit where there is one."""
    request = decode_body(_embedding_decoder, payload)
    texts = request.texts
    if not texts or not all(texts):
        raise BadRequest("input", "must not be empty, nor hold a text that is")
    if len({type(part) for part in request.input}) > 1:
        raise BadRequest("input", "must be texts, token ids, or lists of token ids, not a mixture")
    if len(texts) > MAX_INPUTS:
        raise BadRequest("input", f"must be at most {MAX_INPUTS} texts")
    return request


def decode_score(payload: bytes) -> ScoreRequest:
    """Decode and check a body. Raises BadRequest naming the field, and the limit where there is one."""
    request = decode_body(_score_decoder, payload)
    if not request.text:
        raise BadRequest("text", "must not be empty")
    if request.context is not None and type(request.context) is not type(request.text):
        raise BadRequest("context", "must be text or token ids, whichever the text is")
    return request
