"""What can go wrong between us and the broker."""


class TransportError(Exception):
    """Something went wrong between us and the broker."""


class BrokerUnreachable(TransportError):
    """No connection, for a cause that time may heal."""


class ConnectionRefused(TransportError):
    """The broker answered CONNECT or SUBSCRIBE with a failure that trying again won't change."""


class CertificateError(TransportError):
    """A certificate or key file can't be used; the text names it and says why."""


class PayloadTooLarge(TransportError):
    """The message is over the broker's Maximum Packet Size, ``limit`` bytes; it would vanish there without a word."""

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(f"the message needs a packet of up to {size} bytes, the broker takes at most {limit}")
        self.limit = limit
