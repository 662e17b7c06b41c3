"""What command lines share."""

import argparse


def positive(text: str) -> int:
    """Returns the whole number, at least 1, that an option gives; raises `argparse.ArgumentTypeError` for another."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a whole number, at least 1")
    return int(text)
