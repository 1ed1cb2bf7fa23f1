"""Chats and prompts into tokens: the model's tokenizer and its chat template."""

from itertools import takewhile
from typing import TYPE_CHECKING, Any

import msgspec
from jinja2.exceptions import TemplateError

from protocol.chat import Message
from protocol.errors import BadRequest
from protocol.request import Request
from scheduler.tools import FORCED, FORMATS, Format, FormatName, ToolParser, recognise

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def preload() -> None:
    """Import what takes a second, so that a thread can while the worker starts."""
    import transformers  # noqa: PLC0415

    # Not AutoTokenizer, which would import torch: two seconds and 250 MB that only a worker needs.
    transformers.PreTrainedTokenizerFast  # noqa: B018 - it is imported at the first access


class Chat:
    """The tokenizer and the chat template of one model, and how it calls tools. Thread-safe."""

    def __init__(self, path: str, tool_parser: FormatName | None = None) -> None:
        from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - see preload

        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        template = self._tokenizer.chat_template
        self._template = template if isinstance(template, str) else ""
        self._format = recognise(self._template) if tool_parser is None else FORMATS[tool_parser]

    @property
    def backend(self) -> "Tokenizer":
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        return backend

    def prompt_tokens(self, request: Request) -> list[int]:
        """Token ids of the prompt, through the chat template for messages. Raises BadRequest."""
        if request.messages is None:
            return self.tokens(request.prompt or "")
        tools = [msgspec.to_builtins(tool) for tool in request.offered_tools]
        if tools and "tools" not in self._template:
            raise BadRequest("tools", "this model's chat template has no place for tools")
        if tools and self._tool_format(request) is None:
            raise BadRequest(
                "tools", "this model calls them in no format that is known here; tool_choice can force a call"
            )
        return self._render(
            [_as_dict(message) for message in request.messages],
            tools=tools or None,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
        )

    def tokens(self, text: str | list[int]) -> list[int]:
        """The token ids of a text by itself, which may be given as those."""
        return text if isinstance(text, list) else list(self._tokenizer.encode(text))

    def text_in_context(self, text: str | list[int], context: str | list[int] | None) -> tuple[list[int], int]:
        """The token ids of a context and the text after it, and which is the first that reaches into the text. Both are given in
        the same way."""
        if isinstance(text, list):
            before = context if isinstance(context, list) else []
            return before + text, len(before)
        before_text = context if isinstance(context, str) else ""
        # Together, for that is how the model knows them: a tokenizer may join, or add spaces, where a text begins.
        encoding = self._tokenizer(before_text + text, return_offsets_mapping=True)
        ends = [end for _, end in encoding["offset_mapping"]]
        first = next((index for index, end in enumerate(ends) if end > len(before_text)), len(ends))
        return list(encoding["input_ids"]), first

    def system_tokens(self, system: str) -> list[int]:
        """The token ids that every chat with this system message begins with. Raises BadRequest."""
        chats = [[{"role": "system", "content": system}, {"role": "user", "content": user}] for user in ("a", "1")]
        common = takewhile(lambda pair: pair[0] == pair[1], zip(*map(self._render, chats), strict=False))
        return [token for token, _ in common]

    def tool_parser(self, request: Request, generation: str) -> ToolParser | None:
        """What reads the calls of the generation of this id; None when it was offered nothing to call."""
        format = self._tool_format(request)
        names = [tool.function.name for tool in request.offered_tools]
        if format is None or not names:
            return None
        return ToolParser(format, names, generation, most=None if request.parallel_tool_calls else 1)

    def _tool_format(self, request: Request) -> Format | None:
        return FORCED if request.must_call else self._format

    def _render(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except (TemplateError, ValueError, TypeError, LookupError, RecursionError) as error:
            # Templates are programs: on messages that they weren't written for they fail in any of these ways.
            raise BadRequest("messages", f"the model's chat template refuses them: {error}") from None
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _as_dict(message: Message) -> dict[str, Any]:
    """A message as templates take it: the keys that it has, its content as text, arguments as objects."""
    fields: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if message.tool_calls is not None:
        fields["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": call.function.decoded()},
            }
            for call in message.tool_calls
        ]
    return fields
