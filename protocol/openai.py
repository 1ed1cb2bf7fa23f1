"""The OpenAI response objects we send, field for field, so that the public `openai` package's models parse them.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object", "The
embedding object".
"""

import base64
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from protocol.chat import FunctionCall, ToolCall

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Of the prompt's tokens, those found in the prefix cache."""

    cached_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails = PromptTokensDetails()


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that might have come: its text, and the bytes of that, which alone may be no whole character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct, frozen=True):
    """A token that came, and the likeliest that might have."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a chat's answer."""

    content: list[TokenLogprob]
    refusal: None = None


class TextLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities of a completion. ``text_offset``: where in the text each token begins, in characters; ``top_logprobs``
    holds the token itself, too."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class PromptLogprob(msgspec.Struct, frozen=True):
    """One token in one place of a prompt, as vLLM tells it."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[int, PromptLogprob] | None]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """What both kinds of answer tell of their tokens, each in its own shape."""

    tokens: list[TokenLogprob]
    offsets: list[int]


def _for_chat(logprobs: TokenLogprobs | None) -> ChatLogprobs | None:
    return None if logprobs is None else ChatLogprobs(logprobs.tokens)


def _for_text(logprobs: TokenLogprobs | None) -> TextLogprobs | None:
    if logprobs is None:
        return None
    tokens = logprobs.tokens
    likeliest = [_alternatives(token) for token in tokens] if any(token.top_logprobs for token in tokens) else None
    return TextLogprobs(
        [token.token for token in tokens], [token.logprob for token in tokens], likeliest, logprobs.offsets
    )


def _alternatives(token: TokenLogprob) -> dict[str, float]:
    """By text; of tokens that look alike the likeliest one."""
    others = {other.token: other.logprob for other in reversed(token.top_logprobs)}
    return {token.token: token.logprob} | dict(reversed(others.items()))


class AssistantMessage(msgspec.Struct, frozen=True):
    """``content`` is null where the model did nothing but call tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.message.content or ""

    @property
    def calls(self) -> list[ToolCall]:
        return self.message.tool_calls or []


class ChatCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The whole answer to a chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A tool call, which is streamed once it is whole; ``index`` counts the calls of its message."""

    index: int
    id: str
    function: FunctionCall
    type: Literal["function"] = "function"


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str | None
    role: Literal["assistant"] | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    delta: Delta
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.delta.content or ""

    @property
    def calls(self) -> list[ToolCallDelta]:
        return self.delta.tool_calls or []


class ChatCompletionChunk(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One piece of the answer to a chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]


class TextChoice(msgspec.Struct, frozen=True):
    """``cumulative_logprob``: where the text was given, not generated, the sum of its tokens' log probabilities."""

    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET
    cumulative_logprob: float | msgspec.UnsetType = msgspec.UNSET

    @property
    def calls(self) -> tuple[()]:
        return ()


class TextCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """A whole completion, or (without ``usage``) one piece of it: the OpenAI API uses one object for both."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class Embedding(msgspec.Struct, frozen=True, tag_field="object", tag="embedding"):
    """One vector, as numbers or as the base64 of its float32 in little-endian byte order."""

    index: int
    embedding: list[float] | str

    @property
    def vector(self) -> list[float]:
        """The numbers, however they were sent."""
        if isinstance(self.embedding, list):
            return self.embedding
        data = base64.b64decode(self.embedding)
        return list(struct.unpack(f"<{len(data) // 4}f", data))


class EmbeddingList(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    """The vectors of a request's texts, in their order."""

    data: list[Embedding]
    model: str
    usage: Usage


def embedded(vectors: Sequence[list[float]], *, model: str, usage: Usage, as_base64: bool) -> EmbeddingList:
    """What is answered with these vectors."""
    data = [Embedding(index, _as_base64(vector) if as_base64 else vector) for index, vector in enumerate(vectors)]
    return EmbeddingList(data, model, usage)


def _as_base64(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def scored(
    text: str, logprobs: TokenLogprobs, *, request_id: str, created: int, model: str, usage: Usage
) -> TextCompletion:
    """A text that was given: as completions echo one after which nothing is to be generated."""
    total = math.fsum(token.logprob for token in logprobs.tokens)
    choice = TextChoice(text, 0, "length", _for_text(logprobs), cumulative_logprob=total)
    return TextCompletion(f"cmpl-{request_id}", created, model, [choice], usage)


@dataclass(frozen=True, slots=True)
class Answer:
    """What one choice of an answer says, and why it ends."""

    text: str
    reason: FinishReason
    calls: Sequence[ToolCall] = ()
    logprobs: TokenLogprobs | None = None

    @property
    def message(self) -> AssistantMessage:
        if self.calls:
            return AssistantMessage(self.text or None, tool_calls=list(self.calls))
        return AssistantMessage(self.text)


def answer(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    answers: Sequence[Answer],
    usage: Usage,
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET,
) -> ChatCompletion | TextCompletion:
    """The whole answer, as the kind of object that was asked for."""
    if chat:
        choices = [
            ChatChoice(each.message, each.reason, index, _for_chat(each.logprobs)) for index, each in enumerate(answers)
        ]
        return ChatCompletion(f"chatcmpl-{request_id}", created, model, choices, usage, prompt_logprobs)
    text_choices = [
        TextChoice(each.text, index, each.reason, _for_text(each.logprobs), prompt_logprobs)
        for index, each in enumerate(answers)
    ]
    return TextCompletion(f"cmpl-{request_id}", created, model, text_choices, usage)


def piece(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    text: str,
    reason: FinishReason | None,
    first: bool,
    index: int = 0,
    calls: Sequence[ToolCall] = (),
    calls_before: int = 0,
    logprobs: TokenLogprobs | None = None,
) -> ChatCompletionChunk | TextCompletion:
    """One piece of a choice; the first of a chat's names the role, the last carries the finish reason."""
    if chat:
        numbered = [ToolCallDelta(calls_before + n, call.id, call.function) for n, call in enumerate(calls)]
        delta = Delta(text, "assistant" if first else None, numbered or None)
        choices = [ChatChunkChoice(delta, index, reason, _for_chat(logprobs))]
        return ChatCompletionChunk(f"chatcmpl-{request_id}", created, model, choices)
    text_choices = [TextChoice(text, index, reason, _for_text(logprobs))]
    return TextCompletion(f"cmpl-{request_id}", created, model, text_choices)
