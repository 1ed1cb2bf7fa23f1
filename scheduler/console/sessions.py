"""Who has logged in to the console."""

import hashlib
import hmac
import secrets
from collections import OrderedDict
from collections.abc import Callable

from scheduler.bucket import TokenBucket

LIFETIME_S = 12 * 3600.0
_MOST_SESSIONS = 64
#: Wrong passwords: so many at once, then so many a second, from all addresses together, since an address costs nothing.
_WRONG_AT_ONCE, _WRONG_PER_S = 5, 0.2


class WrongPassword(Exception):
    """It isn't the password."""


class TooManyAttempts(Exception):
    """Too many wrong passwords have come; nothing is looked at for ``retry_after_s`` more seconds."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(f"too many wrong passwords; try again in {retry_after_s:.0f} s")
        self.retry_after_s = retry_after_s


class Sessions:
    """Tokens for who knew the ``password``; they are in memory only, so a restart logs everyone out. ``clock``: seconds."""

    def __init__(self, password: str, clock: Callable[[], float]) -> None:
        self._password = _digest(password)
        self._clock = clock
        self._wrong = TokenBucket(_WRONG_PER_S, _WRONG_AT_ONCE, at=clock())
        self._ends: OrderedDict[str, float] = OrderedDict()

    def log_in(self, password: str) -> str:
        """A new session's token. Raises WrongPassword, or TooManyAttempts whatever the password."""
        now = self._clock()
        ready_at = self._wrong.ready_at(1)
        if now < ready_at:
            raise TooManyAttempts(ready_at - now)
        if not hmac.compare_digest(_digest(password), self._password):
            self._wrong.take(1, now)
            raise WrongPassword("that isn't the password")
        token = secrets.token_urlsafe(32)
        self._ends[token] = now + LIFETIME_S
        if len(self._ends) > _MOST_SESSIONS:
            self._ends.popitem(last=False)
        return token

    def __contains__(self, token: str) -> bool:
        return self._clock() < self._ends.get(token, 0.0)

    def log_out(self, token: str) -> None:
        self._ends.pop(token, None)


def _digest(password: str) -> bytes:
    """Of one length, so that comparing doesn't tell the password's."""
    return hashlib.sha256(password.encode()).digest()
