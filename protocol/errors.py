"""Every way a request can be refused or fail, as a tenant sees it."""

from typing import Literal

import msgspec

ErrorCode = Literal[
    "invalid_request",
    "payload_too_large",
    "invalid_topic",
    "model_not_found",
    "context_length_exceeded",
    "not_found",
    "id_conflict",
    "rate_limited",
    "overloaded",
    "deadline_unreachable",
    "unavailable",
    "quarantined",
    "internal",
]


class ErrorBody(msgspec.Struct, frozen=True, omit_defaults=True):
    """The OpenAI error object: ``code`` is ours and stable, ``param`` names the field at fault.

    With ``retry_after_ms`` the request may be sent again, but not before. ``estimate_ms``: after so long it would be done.
    """

    message: str
    code: ErrorCode
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"] = "invalid_request_error"
    param: str | None = None
    retry_after_ms: int | None = None
    estimate_ms: int | None = None


class RequestError(Exception):
    """A request was refused or failed; what the client library raises and the service publishes."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self.body = body

    @property
    def code(self) -> ErrorCode:
        return self.body.code


class BadRequest(RequestError):
    """The sender's own mistake, with the field it is in."""

    def __init__(self, param: str, detail: str, code: ErrorCode = "invalid_request") -> None:
        super().__init__(ErrorBody(message=f"{param}: {detail}", code=code, param=param))

    @classmethod
    def from_validation(cls, error: msgspec.ValidationError) -> "BadRequest":
        """Turn msgspec's ``Expected `int` >= 1 - at `$.max_tokens` `` into a field and a detail."""
        detail, _, where = str(error).partition(" - at ")  # a key of an object is at `key` in `$.object`
        return cls(where.partition("`$")[2].rstrip("`").lstrip(".") or "body", detail)


class Busy(RequestError):
    """Too much is asked at once, by this tenant or by all together."""

    def __init__(self, code: Literal["rate_limited", "overloaded"], detail: str, retry_after_ms: int) -> None:
        super().__init__(ErrorBody(message=detail, code=code, type="rate_limit_error", retry_after_ms=retry_after_ms))


class DeadlineUnreachable(RequestError):
    """The request asked to be refused rather than to expire: its deadline is in ``left_ms``, it would take ``estimate_ms``."""

    def __init__(self, left_ms: int, estimate_ms: int) -> None:
        detail = (
            f"the deadline is in {left_ms} ms, and at the present pace the request would be done in {estimate_ms} ms"
        )
        body = ErrorBody(message=detail, code="deadline_unreachable", type="rate_limit_error", estimate_ms=estimate_ms)
        super().__init__(body)


class ServiceError(RequestError):
    """The service's own failure. After ``unavailable`` the request may be sent again."""

    def __init__(self, code: Literal["unavailable", "quarantined", "internal"], detail: str) -> None:
        super().__init__(ErrorBody(message=detail, code=code, type="server_error"))
