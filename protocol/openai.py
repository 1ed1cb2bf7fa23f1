"""The OpenAI response objects we send, field for field, so that the public `openai` package's models parse them.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object".
"""

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


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str
    role: Literal["assistant"] = "assistant"


class ChatChoice(msgspec.Struct, frozen=True):
    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None

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


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    content: str
    role: Literal["assistant"] | None = None


class ChatChunkChoice(msgspec.Struct, frozen=True):
    delta: Delta
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: None = None

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
    logprobs: None = None


class TextCompletion(msgspec.Struct, frozen=True, tag_field="object", tag="text_completion"):
    """A whole completion, or (without ``usage``) one piece of it: the OpenAI API uses one object for both."""

    id: str
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


def answer(
    *, chat: bool, request_id: str, created: int, model: str, text: str, reason: FinishReason, usage: Usage
) -> ChatCompletion | TextCompletion:
    """The whole answer, as the kind of object that was asked for."""
    if chat:
        choice = ChatChoice(AssistantMessage(text), reason)
        return ChatCompletion(f"chatcmpl-{request_id}", created, model, [choice], usage)
    return TextCompletion(f"cmpl-{request_id}", created, model, [TextChoice(text, 0, reason)], usage)


def piece(
    *, chat: bool, request_id: str, created: int, model: str, text: str, reason: FinishReason | None, first: bool
) -> ChatCompletionChunk | TextCompletion:
    """One piece of an answer; the first of a chat names the role, the last carries the finish reason."""
    if chat:
        delta = Delta(text, "assistant" if first else None)
        choices = [ChatChunkChoice(delta, 0, reason)]
        return ChatCompletionChunk(f"chatcmpl-{request_id}", created, model, choices)
    return TextCompletion(f"cmpl-{request_id}", created, model, [TextChoice(text, 0, reason)])
