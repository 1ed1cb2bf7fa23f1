"""Tool calls in a model's text: each family of models writes them in its own format, as its chat template shows."""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from protocol.chat import FunctionCall, ToolCall
from scheduler.text import overlap

FormatName = Literal["hermes", "llama3_json", "mistral"]

_JSON = json.JSONDecoder()
_BLANKS = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Format:
    """``opens`` matches what comes before the JSON of a call or of an array of calls, ``closes`` what comes after it.

    ``marker`` is what an opening that can come anywhere begins with; other formats call at the beginning or not at all.
    ``is_special``: the marker is a token that isn't text otherwise.
    """

    opens: re.Pattern[str]
    closes: re.Pattern[str] = re.compile("")
    arguments: str = "arguments"
    marker: str = ""
    is_special: bool = False


#: Sources: NousResearch's Hermes function calling (used by Qwen too); Meta's Llama 3.1 prompt format, "JSON based tool calling";
#: Mistral's chat templates.
FORMATS: dict[FormatName, Format] = {
    "hermes": Format(re.compile("<tool_call>"), re.compile(r"\s*</tool_call>"), marker="<tool_call>"),
    "llama3_json": Format(re.compile(r"\A\s*(?=\{)"), arguments="parameters"),
    "mistral": Format(re.compile(r"\[TOOL_CALLS\]"), marker="[TOOL_CALLS]", is_special=True),
}

#: What a model is made to write when it must call a tool, whatever its family.
FORCED = Format(re.compile(r"\A\s*(?=\[)"))

#: What the chat template of a family says of the format, and nobody else's does.
_SIGNS: dict[FormatName, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "<function-name>"),
    "llama3_json": ('"parameters": dictionary of argument name',),
    "mistral": ("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"),
}


def recognise(template: str) -> Format | None:
    """The format that a chat template teaches its model, if it is one that we know."""
    return next((FORMATS[name] for name, signs in _SIGNS.items() if all(sign in template for sign in signs)), None)


@dataclass(frozen=True, slots=True)
class Said:
    """What a text says: the part for the reader, and the calls."""

    content: str
    calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolParser:
    """Reads the calls of one generation; ``names`` are the tools that it was offered, ``most`` how many calls it may make.

    What isn't a whole call of an offered tool is content, so nothing that a model writes is lost.
    """

    format: Format
    names: Sequence[str]
    generation: str
    most: int | None = None

    def parse(self, text: str, *, complete: bool) -> Said:
        """What the text says for certain; with ``complete`` nothing follows it. What is said of a text is said of all that
        begin with it too, then perhaps more."""
        content = ""
        calls: list[ToolCall] = []
        at = 0
        opening = self.format.opens.search(text)
        while opening is not None:
            block = self._block(text, opening.end(), len(calls))
            if block is None and not complete:
                break
            if block is not None:
                content += _between(text[at : opening.start()], calls).rstrip()
                calls += block.calls
                at = block.end
            opening = self.format.opens.search(text, at if block else opening.start() + 1)
        if opening is not None:
            end = opening.start()
        else:
            end = len(text) if complete else len(text) - overlap(text[at:], self.format.marker)
        rest = _between(text[at:end], calls)
        # White space may yet turn out to stand before a call.
        if calls or not complete:
            rest = rest.rstrip()
        return Said(content + rest, tuple(calls[: self.most]))

    def _block(self, text: str, at: int, number: int) -> "_Block | None":
        """The calls that are written from ``at`` on, the first of them with this number; None when it isn't that, or not yet."""
        blanks = _BLANKS.match(text, at)
        assert blanks is not None
        try:
            value, end = _JSON.raw_decode(text, blanks.end())
            values = value if isinstance(value, list) else [value]
            calls = [self._call(value, number + n) for n, value in enumerate(values)]
        except (ValueError, RecursionError):
            return None
        closing = self.format.closes.match(text, end)
        return _Block(calls, closing.end()) if calls and closing is not None else None

    def _call(self, value: Any, number: int) -> ToolCall:
        """Raises ValueError for what is no call."""
        arguments = value.get(self.format.arguments, {}) if isinstance(value, dict) else None
        if not isinstance(arguments, dict) or value.get("name") not in self.names:
            raise ValueError("no call of a tool that was offered")
        # The same in every process that takes the generation up; Mistral's templates insist on nine characters.
        id = hashlib.sha256(f"{self.generation}/{number}".encode()).hexdigest()[:9]
        return ToolCall(id, FunctionCall(value["name"], json.dumps(arguments, allow_nan=False)))


@dataclass(frozen=True, slots=True)
class _Block:
    calls: list[ToolCall]
    end: int


def _between(text: str, calls: list[ToolCall]) -> str:
    """Text without the white space after a call."""
    return text.lstrip() if calls else text
