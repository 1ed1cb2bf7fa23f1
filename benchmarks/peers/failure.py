"""Why a peer has no figures."""

_SHOWN = 600


class PeerFailed(Exception):
    """A peer could not be installed, or failed, or did other work than it was given; the text says how."""


def last_lines(log: str) -> str:
    """The end of a log, where the reason stands."""
    return log.strip()[-_SHOWN:]
