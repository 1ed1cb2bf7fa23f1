"""What a tenant sends: the OpenAI chat-completions or completions body, and a few fields more.

Fields follow the OpenAI API reference (`/v1/chat/completions`, `/v1/completions`) in name, type and range; what that lacks is
named as vLLM names it; ``priority``, ``deadline_ms`` and ``refuse_late`` are ours. A field of the OpenAI API that we don't act on
is accepted only at the value that asks for nothing, so that no request is served other than as it was written.
"""

from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta

from protocol.chat import Message, Tool, ToolChoice, check_tools
from protocol.errors import BadRequest
from protocol.structure import ResponseFormat, StructuredOutputs, TextFormat, check_structure

#: 2**63 - 1: seeds are signed 64-bit in the OpenAI API.
MAX_SEED = (1 << 63) - 1
#: A week, in milliseconds: for as long a broker keeps messages for the service, unless configured otherwise.
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000

__all__ = [
    "MAX_CHOICES",
    "MAX_DEADLINE_MS",
    "MAX_LOGPROBS",
    "MAX_SEED",
    "Message",
    "Request",
    "StreamOptions",
    "decode_body",
    "decode_request",
    "encode_request",
]

#: As many answers may be asked for in the OpenAI API; a service may allow fewer.
MAX_CHOICES = 128
#: Of the likeliest tokens at one position, so many may be asked for.
MAX_LOGPROBS = 20

StopString = Annotated[str, Meta(min_length=1, max_length=256)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
#: What JSON makes of a token id that is a key.
TokenKey = Annotated[str, Meta(pattern="^[0-9]{1,10}$")]
Bias = Annotated[float, Meta(ge=-100, le=100)]
Likeliest = Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)]
Choices = Annotated[int, Meta(ge=1, le=MAX_CHOICES)]


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Accepted as sent by OpenAI clients; usage always comes with the result."""

    include_usage: bool = False


class Request(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """One generation. Exactly one of ``messages`` and ``prompt`` is given. `parameters` says what each field means."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=1024)] | None = None
    prompt: str | list[TokenId] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=128)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] = 0
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    logit_bias: Annotated[dict[TokenKey, Bias], Meta(max_length=1024)] | None = None
    bad_words: Annotated[list[StopString], Meta(max_length=128)] | None = None
    seed: Annotated[int, Meta(ge=-MAX_SEED - 1, le=MAX_SEED)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=128)] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logprobs: bool | Likeliest | None = None
    top_logprobs: Likeliest | None = None
    prompt_logprobs: Likeliest | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Choices = 1
    best_of: Choices | None = None
    user: Annotated[str, Meta(max_length=256)] | None = None
    metadata: dict[str, str] | None = None
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    deadline_ms: Annotated[int, Meta(ge=1, le=MAX_DEADLINE_MS)] | None = None
    refuse_late: bool = False

    @property
    def is_chat(self) -> bool:
        return self.messages is not None

    @property
    def prompt_field(self) -> str:
        """Where its prompt stands."""
        return "messages" if self.is_chat else "prompt"

    @property
    def adapter(self) -> str:
        """What ``model`` names behind a colon, or nothing."""
        return (self.model or "").partition(":")[2]

    @property
    def offered_tools(self) -> list[Tool]:
        """Those that the model may call."""
        return [] if self.tools is None or self.tool_choice == "none" else self.tools

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be nothing but calls."""
        return bool(self.offered_tools) and self.tool_choice not in (None, "auto")

    @property
    def is_constrained(self) -> bool:
        """Whether the answer's structure is prescribed."""
        free = self.response_format is None or isinstance(self.response_format, TextFormat)
        return self.must_call or not free or self.structured_outputs is not None

    @property
    def output_limit(self) -> int | None:
        """The most tokens the sender wants, under either of the OpenAI API's two names."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_choices(self) -> int:
        """How many answers are generated; where that are more than ``n``, the best of them are told."""
        return self.n if self.best_of is None else self.best_of

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def num_logprobs(self) -> int | None:
        """How many of the likeliest tokens are wanted with each of the output's; None: no log probabilities at all."""
        if self.logprobs is None or self.logprobs is False:
            return None
        return self.top_logprobs or 0 if self.logprobs is True else self.logprobs


Body = TypeVar("Body")

_decoder = msgspec.json.Decoder(Request)


def decode_body(decoder: msgspec.json.Decoder[Body], payload: bytes) -> Body:
    """Decode a body of any kind. Raises BadRequest."""
    try:
        return decoder.decode(payload)
    except msgspec.ValidationError as error:
        raise BadRequest.from_validation(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest("body", f"must be UTF-8 JSON: {error}") from None


def decode_request(payload: bytes) -> Request:
    """Decode and check a request body. Raises BadRequest naming the field, and the limit where there is one."""
    request = decode_body(_decoder, payload)
    _check_prompt(request)
    _check_lengths(request)
    _check_logprobs(request)
    _check_best_of(request)
    for number, message in enumerate(request.messages or ()):
        message.check(f"messages[{number}]")
    check_tools(request.tools, request.tool_choice)
    check_structure(request.response_format, request.structured_outputs)
    _check_chat(request)
    _check_constrained(request)
    return request


def _check_prompt(request: Request) -> None:
    if (request.messages is None) == (request.prompt is None):
        raise BadRequest("messages", "exactly one of messages and prompt must be given")
    if request.prompt is not None and not request.prompt:
        raise BadRequest("prompt", "must not be empty")


def _check_lengths(request: Request) -> None:
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise BadRequest("max_completion_tokens", "give either max_tokens or max_completion_tokens")
    if request.output_limit is not None and request.min_tokens > request.output_limit:
        raise BadRequest("min_tokens", f"must be at most max_tokens, {request.output_limit}")


def _check_logprobs(request: Request) -> None:
    """The OpenAI API has two ways to ask: a flag and a number for a chat, a number for a prompt."""
    if request.logprobs is not None and isinstance(request.logprobs, bool) != request.is_chat:
        raise BadRequest(
            "logprobs", f"must be {'a boolean for messages' if request.is_chat else 'a number for a prompt'}"
        )
    if request.top_logprobs is not None and request.logprobs is not True:
        raise BadRequest("top_logprobs", "needs messages and logprobs = true")


def _check_best_of(request: Request) -> None:
    if request.num_choices < request.n:
        raise BadRequest("best_of", f"must be at least n, {request.n}")
    if request.num_choices > request.n and request.stream:
        raise BadRequest("best_of", "which answers are the best is known at their ends: they can't be streamed")


def _check_chat(request: Request) -> None:
    if request.messages is None:
        if request.tools is not None:
            raise BadRequest("tools", "needs messages")
        if request.continue_final_message:
            raise BadRequest("continue_final_message", "needs messages")
        return
    if request.continue_final_message:
        if request.add_generation_prompt:
            raise BadRequest("add_generation_prompt", "must be false where the final message is continued")
        if not request.messages[-1].text:
            raise BadRequest(f"messages[{len(request.messages) - 1}].content", "holds nothing to be continued")


def _check_constrained(request: Request) -> None:
    if not request.is_constrained:
        return
    field = "structured_outputs" if request.structured_outputs is not None else "response_format"
    for name in ("ignore_eos", "min_tokens"):
        if getattr(request, name):
            raise BadRequest(name, "a prescribed structure ends where it ends")
    if request.offered_tools and (request.structured_outputs is not None or request.response_format is not None):
        raise BadRequest(field, "can't be had beside tools that may be called")


def encode_request(request: msgspec.Struct) -> bytes:
    """The body of a request of any kind."""
    return msgspec.json.encode(request)
