"""The OpenAI response objects we send, field for field, so that the public `openai` package's models parse them.

Source: OpenAI API reference, "The chat completion object", "The chat completion chunk object", "The completion object".
"""

from collections.abc import Sequence
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


class AssistantMessage(msgspec.Struct, frozen=True):
    """``content`` is null where the model did nothing but call tools."""

    content: str | None
    role: Literal["assistant"] = "assistant"
    tool_calls: list[ToolCall] | None = None


class ChatChoice(msgspec.Struct, frozen=True):
    message: AssistantMessage
    finish_reason: FinishReason
    index: int = 0
    logprobs: None = None

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
    logprobs: None = None

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
    text: str
    index: int = 0
    finish_reason: FinishReason | None = None
    logprobs: None = None

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


def answer(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    text: str,
    reason: FinishReason,
    usage: Usage,
    calls: Sequence[ToolCall] = (),
) -> ChatCompletion | TextCompletion:
    """The whole answer, as the kind of object that was asked for."""
    if chat:
        message = AssistantMessage(text or None, tool_calls=list(calls)) if calls else AssistantMessage(text)
        choices = [ChatChoice(message, reason)]
        return ChatCompletion(f"chatcmpl-{request_id}", created, model, choices, usage)
    return TextCompletion(f"cmpl-{request_id}", created, model, [TextChoice(text, 0, reason)], usage)


def piece(
    *,
    chat: bool,
    request_id: str,
    created: int,
    model: str,
    text: str,
    reason: FinishReason | None,
    first: bool,
    calls: Sequence[ToolCall] = (),
    calls_before: int = 0,
) -> ChatCompletionChunk | TextCompletion:
    """One piece of an answer; the first of a chat names the role, the last carries the finish reason."""
    if chat:
        numbered = [ToolCallDelta(calls_before + n, call.id, call.function) for n, call in enumerate(calls)]
        delta = Delta(text, "assistant" if first else None, numbered or None)
        choices = [ChatChunkChoice(delta, 0, reason)]
        return ChatCompletionChunk(f"chatcmpl-{request_id}", created, model, choices)
    return TextCompletion(f"cmpl-{request_id}", created, model, [TextChoice(text, 0, reason)])
