"""What ends serve.py with a message."""


class ServeError(Exception):
    """Triton cannot be served; the message says why, and what to do."""
