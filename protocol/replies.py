"""What the service answers on the response topic: `accepted`, numbered chunks, then exactly one terminal message.

Every body is JSON with a ``type``; chunks and results carry the OpenAI object in ``data``.
"""

from collections.abc import Sequence
from typing import Literal

import msgspec

from protocol.chat import ToolCall
from protocol.errors import ErrorBody
from protocol.openai import (
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    EmbeddingList,
    FinishReason,
    TextChoice,
    TextCompletion,
    ToolCallDelta,
    Usage,
)


class Timings(msgspec.Struct, frozen=True):
    """Seconds: waiting before the first step, to the first token (TTFT), and from acceptance to the end."""

    queued_s: float
    ttft_s: float | None
    total_s: float


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is in; from here on it ends in exactly one terminal message."""

    request_id: str


class Chunk(msgspec.Struct, frozen=True, tag="chunk"):
    """A piece of one choice. ``seq`` counts 0, 1, 2, … over all of them: a gap means that one was lost and the result makes it
    whole."""

    request_id: str
    seq: int
    data: ChatCompletionChunk | TextCompletion

    @property
    def index(self) -> int:
        """Of which choice."""
        return self.data.choices[0].index

    @property
    def text(self) -> str:
        return self.data.choices[0].text

    @property
    def calls(self) -> Sequence[ToolCallDelta]:
        """The tool calls that it carries."""
        return self.data.choices[0].calls


class Result(msgspec.Struct, frozen=True, tag="result"):
    """Terminal: the whole answer, usage and timings. ``chunks`` is how many chunks were published before it. Of a request for
    several choices ``text``, ``calls`` and ``finish_reason`` are the first one's; ``data`` holds them all.

    Terminal messages carry ``attempt``: how many processes of the service took the request up. One that was published
    right before a crash may come again, with a higher number.
    """

    request_id: str
    data: ChatCompletion | TextCompletion | EmbeddingList
    timings: Timings
    chunks: int
    attempt: int = 1

    @property
    def choices(self) -> Sequence[ChatChoice | TextChoice]:
        """None of embeddings."""
        return [] if isinstance(self.data, EmbeddingList) else self.data.choices

    @property
    def text(self) -> str:
        """Empty for embeddings."""
        return self.choices[0].text if self.choices else ""

    @property
    def texts(self) -> list[str]:
        """Of all choices."""
        return [choice.text for choice in self.choices]

    @property
    def embeddings(self) -> list[list[float]]:
        """A vector for each text; none for other requests."""
        return [each.vector for each in self.data.data] if isinstance(self.data, EmbeddingList) else []

    @property
    def score(self) -> TextChoice:
        """Of a request for it: ``logprobs`` of the text's tokens, and ``cumulative_logprob``, their sum."""
        assert isinstance(self.data, TextCompletion)
        return self.data.choices[0]

    @property
    def calls(self) -> Sequence[ToolCall]:
        """The tools that the model calls."""
        assert not isinstance(self.data, EmbeddingList)
        return self.data.choices[0].calls

    @property
    def usage(self) -> Usage:
        assert self.data.usage is not None
        return self.data.usage

    @property
    def finish_reason(self) -> FinishReason:
        assert not isinstance(self.data, EmbeddingList)
        reason = self.data.choices[0].finish_reason
        assert reason is not None
        return reason


class Cancelled(msgspec.Struct, frozen=True, tag="cancelled"):
    """Terminal: the tenant cancelled; ``completion_tokens`` were generated until then."""

    request_id: str
    completion_tokens: int
    attempt: int = 1


class Expired(msgspec.Struct, frozen=True, tag="expired"):
    """Terminal: its deadline passed; ``completion_tokens`` were generated until then."""

    request_id: str
    completion_tokens: int
    attempt: int = 1


class Failed(msgspec.Struct, frozen=True, tag="error"):
    """Terminal: the request was refused or failed."""

    request_id: str | None
    error: ErrorBody
    attempt: int = 1


Terminal = Result | Cancelled | Expired | Failed
Reply = Accepted | Chunk | Terminal
TERMINAL = (Result, Cancelled, Expired, Failed)


class Quarantined(msgspec.Struct, frozen=True):
    """On the ``dead`` topic: a request that killed the worker again and again, and won't be tried any more."""

    request_id: str
    reason: str
    failures: int


class Status(msgspec.Struct, frozen=True, omit_defaults=True):
    """Retained on the status topic of a replica; its will says ``offline``. ``draining``: nothing new is taken up."""

    status: Literal["online", "draining", "offline"]
    model: str | None = None
    max_model_len: int | None = None
    max_running: int | None = None


encode = msgspec.json.encode
decode_reply = msgspec.json.Decoder(Reply).decode
decode_quarantined = msgspec.json.Decoder(Quarantined).decode
decode_status = msgspec.json.Decoder(Status).decode
