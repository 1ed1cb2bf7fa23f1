"""The grammar that an answer must follow, in llguidance's own notation: https://github.com/guidance-ai/llguidance."""

import json
from typing import Any

import msgspec
from llguidance import LLMatcher, LLParserLimits

from protocol.chat import NamedTool, Tool
from protocol.errors import BadRequest
from protocol.request import Request
from protocol.structure import JsonSchemaFormat, StructuredOutputs

#: What a schema may not set for itself. White space is bounded, or a model may go on with it for ever; a keyword that can't be
#: enforced is an error.
_JSON_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[ \n]{0,16}", "lenient": False}}
_ANY_OBJECT = {"type": "object"}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}
_LIMITS = LLParserLimits(verbose_errors=False)
_LONGEST_REASON = 500


def grammar_for(request: Request) -> str | None:
    """What the worker's matcher is made of; None for an answer that is free."""
    if request.must_call:
        return _calls(request)
    if request.structured_outputs is not None:
        return _outputs(request.structured_outputs)
    if not request.is_constrained:
        return None
    format = request.response_format
    return _json(format.json_schema.schema if isinstance(format, JsonSchemaFormat) else _ANY_OBJECT)


def check_grammar(request: Request) -> None:
    """Whether the grammar can be compiled, whatever the model. Raises BadRequest with what is wrong with it."""
    grammar = grammar_for(request)
    if grammar is None:
        return
    reason = LLMatcher.validate_grammar(grammar, limits=_LIMITS)
    if reason:
        raise BadRequest(structure_field(request), f"can't be followed: {reason[:_LONGEST_REASON]}")


def structure_field(request: Request) -> str:
    """The field that prescribes the answer's structure."""
    if request.must_call:
        return "tools"
    return "response_format" if request.structured_outputs is None else "structured_outputs"


def lost_structure(request: Request) -> BadRequest:
    """What a request ends with whose grammar the worker can't follow any further."""
    detail = "can't be followed any further: it is too complex, names a token that this model hasn't, or allows only bad words"
    return BadRequest(structure_field(request), detail)


def _outputs(outputs: StructuredOutputs) -> str:
    if outputs.json is not None:
        return _json(outputs.json)
    if outputs.regex is not None:
        return LLMatcher.grammar_from_regex(outputs.regex)
    if outputs.choice is not None:
        return LLMatcher.grammar_from_lark("start: " + " | ".join(map(json.dumps, outputs.choice)))
    assert outputs.grammar is not None, "exactly one is given"
    return LLMatcher.grammar_from_lark(outputs.grammar)


def _json(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema | _JSON_OPTIONS)


def _calls(request: Request) -> str:
    """A JSON array of calls as `scheduler.tools.FORCED` reads them. Each tool's schema is a document of its own, so that its
    references hold."""
    choice = request.tool_choice
    named = choice.function.name if isinstance(choice, NamedTool) else None
    tools = [tool for tool in request.offered_tools if named in (None, tool.function.name)]
    several = ' ("," call)*' if named is None and request.parallel_tool_calls else ""
    rules = [f'start: "[" call{several} "]"', "call: " + " | ".join(f"call_{n}" for n in range(len(tools)))]
    for number, tool in enumerate(tools):
        opening = json.dumps(f'{{"name": "{tool.function.name}", "arguments": ')
        rules.append(f'call_{number}: {opening} arguments_{number} "}}"')
        rules.append(f"arguments_{number}: %json {_arguments(tool)}")
    return LLMatcher.grammar_from_lark("\n".join(rules))


def _arguments(tool: Tool) -> str:
    parameters = tool.function.parameters
    schema = _NO_ARGUMENTS if parameters is None else _ANY_OBJECT | parameters
    return msgspec.json.encode(schema | _JSON_OPTIONS).decode()
