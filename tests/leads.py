"""Leads that don't depend on how long anything takes."""

from scheduler.lead import Lead


class AtOnce(Lead):
    """The next step is sent right after the one before it, so there are always two in the worker's pipe."""

    def delay_s(self, tokens: int) -> float:
        return 0.0


class Never(Lead):
    """The next step is sent when the answer to the one before it has come."""

    def delay_s(self, tokens: int) -> float:
        return 3600.0
