"""The structure an answer must have: the OpenAI API's ``response_format``, and vLLM's ``structured_outputs``."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from protocol.chat import check_json
from protocol.errors import BadRequest

#: Of a schema in bytes, of the others in characters: what compiling one may take grows with it.
MAX_LENGTH = 32 * 1024


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="text"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_object"):
    """Any JSON object."""


class NamedSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A JSON schema; the other fields are accepted, and every schema is kept to as if it were ``strict``."""

    name: Annotated[str, Meta(max_length=64)]
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="json_schema"):
    """JSON of this schema."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of: a JSON schema; a regular expression for the whole answer; the answers to choose from; a grammar, in the
    Lark dialect of llguidance."""

    json: dict[str, Any] | None = None
    regex: Annotated[str, Meta(min_length=1, max_length=MAX_LENGTH)] | None = None
    choice: Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=1024)] | None = None
    grammar: Annotated[str, Meta(min_length=1, max_length=MAX_LENGTH)] | None = None


def check_structure(response_format: ResponseFormat | None, structured_outputs: StructuredOutputs | None) -> None:
    """Whether at most one structure is asked for, and none that is too big. Raises BadRequest."""
    if isinstance(response_format, JsonSchemaFormat):
        _check_schema(response_format.json_schema.schema, "response_format.json_schema.schema")
    if structured_outputs is None:
        return
    if response_format is not None:
        raise BadRequest("structured_outputs", "give either response_format or structured_outputs")
    given = [name for name in structured_outputs.__struct_fields__ if getattr(structured_outputs, name) is not None]
    if len(given) != 1:
        raise BadRequest("structured_outputs", "exactly one of json, regex, choice and grammar must be given")
    if structured_outputs.json is not None:
        _check_schema(structured_outputs.json, "structured_outputs.json")
    if sum(map(len, structured_outputs.choice or ())) > MAX_LENGTH:
        raise BadRequest("structured_outputs.choice", f"must have at most {MAX_LENGTH} characters in all")


def _check_schema(schema: dict[str, Any], field: str) -> None:
    check_json(schema, field)
    if len(msgspec.json.encode(schema)) > MAX_LENGTH:
        raise BadRequest(field, f"must have at most {MAX_LENGTH} bytes")
