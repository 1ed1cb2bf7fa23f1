"""The OpenAI response objects we send, field for field, so that the public `openai` package's models parse them.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object".
"""

from dataclasses import dataclass
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length"]


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
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct, frozen=True):
    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.message.content


class ChatCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion"):
    """The whole answer to a chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str
    role: Literal["assistant"] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    delta: Delta
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: ChatLogprobs | None = None

    @property
    def text(self) -> str:
        return self.delta.content


class ChatCompletionChunk(msgspec.Struct, frozen=True, tag_field="object", tag="chat.completion.chunk"):
    """One piece of the answer to a chat."""

    id: str
    created: int
    model: str
    choices: list[ChatChunkChoice]


class TextChoice(msgspec.Struct, frozen=True):
    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: TextLogprobs | None = None
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class TextCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """A whole completion, or (without ``usage``) one piece of it: the OpenAI API uses one object for both."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


def answer(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    text: str,
    reason: FinishReason,
    usage: Usage,
    logprobs: TokenLogprobs | None = None,
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET,
) -> ChatCompletion | TextCompletion:
    """The whole answer, as the kind of object that was asked for."""
    if chat:
        choice = ChatChoice(AssistantMessage(text), reason, 0, _for_chat(logprobs))
        return ChatCompletion(f"chatcmpl-{request_id}", created, model, [choice], usage, prompt_logprobs)
    choices = [TextChoice(text, 0, reason, _for_text(logprobs), prompt_logprobs)]
    return TextCompletion(f"cmpl-{request_id}", created, model, choices, usage)


def piece(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    text: str,
    reason: FinishReason | None,
    first: bool,
    logprobs: TokenLogprobs | None = None,
) -> ChatCompletionChunk | TextCompletion:
    """One piece of an answer; the first of a chat names the role, the last carries the finish reason."""
    if chat:
        delta = Delta(text, "assistant" if first else None)
        choices = [ChatChunkChoice(delta, 0, reason, _for_chat(logprobs))]
        return ChatCompletionChunk(f"chatcmpl-{request_id}", created, model, choices)
    text_choices = [TextChoice(text, 0, reason, _for_text(logprobs))]
    return TextCompletion(f"cmpl-{request_id}", created, model, text_choices)
