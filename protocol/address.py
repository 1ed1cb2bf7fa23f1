"""Where the broker is, who we are there, and the certificates for it."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from protocol.transport_errors import CertificateError

_URL_FORM = "the broker's URL must look like mqtt://user@host:1883 or mqtts://user@host:8883"


@dataclass(frozen=True)
class BrokerAddress:
    """Where the broker is and who we are there. The password is never shown.

    ``ca_file`` holds the authorities to trust instead of the system's; ``cert_file`` and ``key_file`` are our own
    certificate and its key, which must not be encrypted (or both in ``cert_file``).
    """

    host: str
    port: int
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
    ) -> Self:
        """Read ``mqtt://[user@]host[:1883]`` or ``mqtts://[user@]host[:8883]``.

        Raises ValueError, whose text never holds the URL: it may hold a password.
        """
        scheme, host, port, user = _split(url)
        tls = scheme == "mqtts"
        if not tls and (ca_file or cert_file or key_file):
            raise ValueError("certificates are for TLS: the broker's URL must begin with mqtts://")
        if key_file and not cert_file:
            raise ValueError("a key file needs its certificate file")
        port = port or (8883 if tls else 1883)
        return cls(host, port, username or user, password, tls, ca_file, cert_file, key_file)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def _split(url: str) -> tuple[str, str, int | None, str | None]:
    """Scheme, host, port and user. Raises ValueError, in words of our own: urlsplit's may hold a part of the URL."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise ValueError(_URL_FORM) from None
    beyond = parts.path.strip("/") or parts.query or parts.fragment
    if parts.scheme not in {"mqtt", "mqtts"} or not host or beyond:
        raise ValueError(_URL_FORM)
    if parts.password is not None:
        raise ValueError("give the password apart from the broker's URL")
    return parts.scheme, host, port, unquote(parts.username or "") or None


class _TidySocket(ssl.SSLSocket):
    """Closes itself when the handshake fails, which paho leaves to the garbage collector."""

    def do_handshake(self, block: bool = False) -> None:
        try:
            super().do_handshake(block)
        except OSError:
            self.close()
            raise


def tls_context(address: BrokerAddress) -> ssl.SSLContext:
    """What the address's files make. Raises CertificateError."""
    for file in (address.ca_file, address.cert_file, address.key_file):
        _check_readable(file)
    try:
        context = ssl.create_default_context(cafile=address.ca_file)
    except ssl.SSLError as error:
        raise CertificateError(f"{address.ca_file} holds no certificate in PEM: {error.reason or error}") from None
    if address.cert_file is not None:
        try:
            # The empty password has an encrypted key refused; with none OpenSSL would ask for it on the terminal.
            context.load_cert_chain(address.cert_file, address.key_file, password="")
        except ssl.SSLError as error:
            files = " and ".join(filter(None, (address.cert_file, address.key_file)))
            raise CertificateError(
                f"{files} must be a certificate and its own, unencrypted key in PEM: {error.reason or error}"
            ) from None
    context.sslsocket_class = _TidySocket
    return context


def _check_readable(file: str | None) -> None:
    """ssl's own error wouldn't say which of the files it is. Raises CertificateError."""
    if file is not None:
        try:
            Path(file).read_bytes()
        except OSError as error:
            raise CertificateError(f"{file} can't be read: {error.strerror}") from None
