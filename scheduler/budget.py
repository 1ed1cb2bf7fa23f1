"""How many tokens a step may compute, so that who decodes meanwhile isn't kept waiting longer than wanted.

Sarathi-Serve (Agrawal et al., OSDI'24) cuts prompts by a number of tokens, to be found for each model and machine by trying. Here
a time is given, and the number follows from how long the last steps took.
"""

from scheduler.estimate import Pace


class Budget:
    """``target_s``: about how long a step may take; None: as long as it takes."""

    def __init__(self, target_s: float | None) -> None:
        self._target_s = target_s
        self._pace = Pace()

    def tokens(self) -> int | None:
        """The most for the next step, at least 1; None: no limit, or none that is known yet."""
        per_token_s = self._pace.per_token_s if self._pace.known else 0.0
        if self._target_s is None or not per_token_s:
            return None
        return max(int((self._target_s - self._pace.fixed_s) / per_token_s), 1)

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed so many tokens in so long."""
        self._pace.observe(tokens, seconds)
