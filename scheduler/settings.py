"""Every setting, told from the types in config.py: as a page for people, as a JSON schema for the Helm chart.

``python -m scheduler.settings`` writes both into the files that a test holds against this module.
"""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import msgspec

from scheduler import config
from scheduler.config import Config

_ROOT = Path(__file__).parents[1]
PAGE = _ROOT / "docs/operations/configure.md"
VALUES_SCHEMA = _ROOT / "deploy/helm/tokenbus/values.schema.json"

_BEGIN, _END = "<!-- settings -->\n", "<!-- /settings -->"
_BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "over {}",
    "maximum": "at most {}",
    "minLength": "of at least {} characters",
}


def definitions() -> dict[str, Any]:
    """JSON schemas (2020-12) of Config and its sections, by the names of their types."""
    _, schemas = msgspec.json.schema_components([Config], ref_template="#/$defs/{name}")
    return schemas


def page(text: str) -> str:
    """The page with the tables as they are to be."""
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + "\n".join(_sections()) + rest[rest.index(_END) :]


def values_schema(text: str) -> str:
    """The chart's schema with the settings as they are to be."""
    return json.dumps(json.loads(text) | {"$defs": definitions()}, indent=2) + "\n"


def _sections() -> list[str]:
    """Markdown, one part for each section."""
    schemas = definitions()
    lines = []
    for field in msgspec.structs.fields(Config):
        table = field.name == "tenants"
        kind = config.TenantConfig if table else field.type
        title = f"{field.name}.NAME" if table else field.name
        lines += [f"### `[{title}]`", "", _prose(kind), "", "| setting | what it may be | default |", "|---|---|---|"]
        for name, schema in schemas[kind.__name__]["properties"].items():
            lines.append(f"| `{title}.{name}` | {_told(schema)} | {_default(schema)} |")
        lines.append("")
    return lines


def _prose(kind: type) -> str:
    return re.sub(r"``(.*?)``", r"`\1`", inspect.cleandoc(kind.__doc__ or ""))


def _default(schema: dict[str, Any]) -> str:
    return "" if schema["default"] is None else f"`{json.dumps(schema['default'])}`"


def _told(schema: dict[str, Any]) -> str:
    """A schema in words."""
    if "anyOf" in schema:
        return " or ".join(_told(choice) for choice in schema["anyOf"] if choice.get("type") != "null")
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if schema["type"] == "array":
        return f"list of: {_told(schema['items'])}"
    bounds = (words.format(schema[name]) for name, words in _BOUNDS.items() if name in schema)
    return " ".join([schema["type"], ", ".join(bounds)]).strip()


def main() -> None:
    """Write both files anew."""
    PAGE.write_text(page(PAGE.read_text()))
    VALUES_SCHEMA.write_text(values_schema(VALUES_SCHEMA.read_text()))


if __name__ == "__main__":
    main()
