"""What a chat is made of: messages, the tools a model may call, and its calls.

Field for field as in the OpenAI API reference, "Create chat completion"; `developer` messages, images and audio are not served.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from protocol.errors import BadRequest

#: Deeper JSON than this is refused: templates and grammars walk it recursively.
MAX_DEPTH = 64

#: As the OpenAI API names functions.
FunctionName = Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One part of a message's content."""

    text: str
    type: Literal["text"] = "text"


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``arguments``: a JSON object, as text."""

    name: FunctionName
    arguments: str

    def decoded(self) -> dict[str, Any]:
        """The arguments as templates want them. Raises msgspec.DecodeError or RecursionError."""
        return msgspec.json.decode(self.arguments, type=dict[str, Any])


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The model calls a tool."""

    id: Annotated[str, Meta(min_length=1, max_length=64)]
    function: FunctionCall
    type: Literal["function"] = "function"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat; one of the role ``tool`` answers the call ``tool_call_id`` of an assistant's message before it."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Meta(min_length=1, max_length=256)] | None = None
    name: Annotated[str, Meta(max_length=64)] | None = None
    tool_calls: Annotated[list[ToolCall], Meta(min_length=1, max_length=128)] | None = None
    tool_call_id: Annotated[str, Meta(min_length=1, max_length=64)] | None = None

    @property
    def text(self) -> str:
        if self.content is None:
            return ""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def check(self, field: str) -> None:
        """What the types can't say. Raises BadRequest."""
        if self.content is None and self.tool_calls is None:
            raise BadRequest(field, "content is required")
        if self.tool_calls is not None and self.role != "assistant":
            raise BadRequest(f"{field}.tool_calls", "only an assistant calls tools")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise BadRequest(f"{field}.tool_call_id", "is required of a tool, and of no other role")
        for number, call in enumerate(self.tool_calls or ()):
            arguments = f"{field}.tool_calls[{number}].function.arguments"
            try:
                check_json(call.function.decoded(), arguments)
            except (msgspec.DecodeError, RecursionError) as error:
                raise BadRequest(arguments, f"must be a JSON object: {error}") from None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """``parameters`` is a JSON schema. ``strict`` is accepted: a forced call follows the schema anyway, a free one never must."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Something that the model may call."""

    function: Function
    type: Literal["function"] = "function"


class FunctionChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: FunctionName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tool that the model must call."""

    function: FunctionChoice
    type: Literal["function"] = "function"


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> None:
    """Raises BadRequest for tools that can't be told apart, or a choice that isn't among them."""
    names = [tool.function.name for tool in tools or ()]
    for number, tool in enumerate(tools or ()):
        if tool.function.name in names[:number]:
            raise BadRequest(f"tools[{number}].function.name", "another tool has this name")
        check_json(tool.function.parameters, f"tools[{number}].function.parameters")
    if choice == "required" and not names:
        raise BadRequest("tool_choice", "needs tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise BadRequest("tool_choice.function.name", "is not among the tools")


def check_json(value: object, field: str) -> None:
    """Raises BadRequest for JSON that is nested deeper than ``MAX_DEPTH``, or holds integers beyond 64 bits, which the journal's
    msgpack hasn't."""
    level = [value]
    for _ in range(MAX_DEPTH):
        if any(isinstance(node, int) and not -(1 << 63) <= node < 1 << 64 for node in level):
            raise BadRequest(field, "integers must have at most 64 bits")
        level = [child for node in level for child in _children(node)]
        if not level:
            return
    raise BadRequest(field, f"must be nested at most {MAX_DEPTH} deep")


def _children(node: object) -> list[object]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []
