"""Where a server is: a URL whose scheme picks the protocol."""

from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_URL = "grpc://127.0.0.1:8001"
SCHEMES = ("grpc", "http")


@dataclass(frozen=True)
class Address:
    """A server's address.

    Attributes:
        url: as the caller wrote it, for messages.
        scheme: `grpc` or `http`.
        target: `host:port`, for http with the base path if there is one.
    """

    url: str
    scheme: str
    target: str

    @classmethod
    def parse(cls, url: str) -> "Address":
        """Reads `grpc://host:port` or `http://host:port[/base]`.

        Raises:
            ValueError: another scheme, no host, or no port; the message shows a URL that works.
        """
        parts = urlsplit(url)
        if parts.scheme not in SCHEMES:
            raise ValueError(
                f"{url!r} does not start with grpc:// or http://: write for example {DEFAULT_URL} or http://127.0.0.1:8000"
            )
        try:
            port = parts.port
        except ValueError as error:
            raise ValueError(f"{url!r} has no valid port ({error}): write for example {DEFAULT_URL}") from error
        if not parts.hostname or not port:
            raise ValueError(f"{url!r} lacks a host or a port: write for example {DEFAULT_URL}")
        if parts.username or parts.query or parts.fragment or (parts.scheme == "grpc" and parts.path.strip("/")):
            raise ValueError(f"{url!r} has more than a host and a port: write for example {DEFAULT_URL}")
        base = parts.path.rstrip("/") if parts.scheme == "http" else ""
        return cls(url=url, scheme=parts.scheme, target=parts.netloc + base)
