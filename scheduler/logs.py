"""Structured logs: one line per event, ``message key=value …`` on stderr. Prompts, texts and passwords never get here."""

import json
import logging

_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class KeyValueFormatter(logging.Formatter):
    """Appends whatever was passed as ``extra``, as JSON values: a name that a tenant chose can't forge a line."""

    def format(self, record: logging.LogRecord) -> str:
        pairs = [f"{key}={json.dumps(value)}" for key, value in record.__dict__.items() if key not in _STANDARD]
        return " ".join([super().format(record), *pairs])


def configure(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(KeyValueFormatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
