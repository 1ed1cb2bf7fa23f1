"""What the broker tells of itself that nobody else would: messages it had to drop."""

from prometheus_client import Counter

from protocol.transport import Incoming


class BrokerWatch:
    """Carries the broker's own count of dropped messages over into ``dropped``.

    Mosquitto drops silently when a receiver's queue is full: the publisher gets its PUBACK all the same. Subscribe to
    ``SUBSCRIPTION`` and give ``take`` what comes under ``TOPIC``. A broker that forbids it, or has no such topic, sends
    nothing, and nothing is counted.
    """

    TOPIC = "$SYS/broker/publish/messages/dropped"
    SUBSCRIPTION = (TOPIC, 0)

    def __init__(self, dropped: Counter) -> None:
        self._dropped = dropped
        self._total: int | None = None

    def take(self, incoming: Incoming) -> None:
        """Count what was dropped since the last message; the first one only tells where the broker's count stands."""
        if not incoming.payload.isdigit():
            return
        total = int(incoming.payload)
        if self._total is not None:
            # Less than before: the broker was restarted and counts from zero.
            self._dropped.inc(total - self._total if total >= self._total else total)
        self._total = total
