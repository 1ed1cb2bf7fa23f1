"""The trace context of a request, in MQTT 5 user properties: https://w3c.github.io/trace-context-mqtt/."""

import re
from collections.abc import Iterable

#: The user property's name.
TRACEPARENT = "traceparent"

_FORM = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def check_traceparent(text: str) -> None:
    """Raises ValueError for what https://www.w3.org/TR/trace-context/#traceparent-header doesn't allow."""
    if not _FORM.fullmatch(text):
        raise ValueError("traceparent must look like 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")


def find_traceparent(properties: Iterable[tuple[str, str]]) -> str | None:
    """The one that is well-formed. Anything else counts as none: a request never fails for its trace."""
    found = [value for name, value in properties if name == TRACEPARENT]
    return found[0] if len(found) == 1 and _FORM.fullmatch(found[0]) else None
