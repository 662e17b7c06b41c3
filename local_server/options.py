"""The options of serve.py."""

import argparse
import ipaddress
import os
import re
from collections.abc import Sequence
from pathlib import Path

from export.repository import REPOSITORY

PORTS = {"http": 8000, "grpc": 8001, "metrics": 8002}
LOG_FILE = Path(__file__).resolve().parents[1] / "artefacts" / "logs" / "triton-PORT.log"


class _ManPage(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and shows defaults."""


def parse(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """Returns the options in `argv`, by default the command line's; ends the process if they make no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_ManPage)
    parser.add_argument("--model-repository", type=Path, default=REPOSITORY, metavar="DIR", help="what to serve")
    for name, port in PORTS.items():
        variable = f"{name.upper()}_PORT"
        default = os.environ.get(variable) or str(port)
        parser.add_argument(f"--{name}-port", type=_port, default=default, metavar="PORT", help=f"or ${variable}")
    parser.add_argument("--address", type=_ipv4, default="127.0.0.1", metavar="IP", help="where the ports listen: IPv4")
    parser.add_argument("--allow-remote", action="store_true", help="accept an --address beyond this machine")
    parser.add_argument("--log-file", type=Path, default=LOG_FILE, metavar="FILE", help="Triton's log, PORT for HTTP's")
    parser.add_argument(
        "--response-cache-mib",
        type=_mib,
        default=0,
        metavar="MIB",
        help="memory for answers to repeated requests; only a model whose config.pbtxt enables it uses it",
    )
    parser.add_argument(
        "--triton-flag",
        action="append",
        default=[],
        metavar="FLAG",
        help="one more flag of tritonserver, as in --triton-flag=--rate-limit-resource=core:1; may be repeated",
    )
    options = parser.parse_args(argv)
    if not options.log_file.name:
        parser.error(f"argument --log-file: {str(options.log_file)!r} came, expected the name of a file")
    name = re.sub(r"\bPORT\b", str(options.http_port), options.log_file.name)  # not within REPORT
    options.log_file = options.log_file.with_name(name)
    return options


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a port from 1 to 65535")
    return int(text)


def _ipv4(text: str) -> str:
    try:
        return str(ipaddress.IPv4Address("127.0.0.1" if text == "localhost" else text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} came, expected an IPv4 address, as 127.0.0.1") from error


def _mib(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} came, expected a number of MiB, 0 for no cache")
    return int(text)
