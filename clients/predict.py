"""Asks a running server for the sentiment of reviews.

    python -m clients.predict "I loved it" "What a bore"     each argument is a review
    python -m clients.predict --file reviews.txt             one review a line, of any number of lines
    tail -f reviews.txt | python -m clients.predict -        from a pipe, answered as the lines come
    python -m clients.predict --file reviews.txt --json      {"line": 1, "label": "positive", "score": 0.998, ...}

Answers go to stdout in the order of the reviews. A line that is empty, not UTF-8 or refused by the server is reported
with its number on stderr (and, with --json, as {"line": 3, "error": "..."} on stdout), and the rest goes on.

Exit code: 0 all answered; 1 at least one line was broken; 2 wrong usage, or the server failed or nobody reads the
answers any more, and the rest was left; 130 stopped by Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import stat
import sys
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, aclosing
from io import TextIOWrapper
from typing import BinaryIO

from tqdm import tqdm

from clients.address import DEFAULT_URL
from clients.aio import AsyncSentimentClient
from clients.connection import DEFAULT_MODEL, DEFAULT_TIMEOUT_S
from clients.errors import SentimentError
from clients.lines import Answer, Line, answer_lines, read_lines

_SHOWN_CHARACTERS = 72
_MAX_IN_FLIGHT = 4
"""Half of the client's own: each holds as many lines as the server takes, and two cores without VNNI answer four such
requests of long reviews in some 10 s, so that a second program beside this one does not run into the time limit."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the examples' line ends and adds each default that says something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False, []) else super()._get_help_string(action)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clients.predict", description=__doc__, formatter_class=_HelpFormatter
    )
    parser.add_argument("reviews", nargs="*", default=[], metavar="REVIEW", help="a review; a single - reads stdin")
    parser.add_argument("--file", metavar="PATH", help="read one review a line from PATH, - for stdin")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of columns")
    parser.add_argument("--url", default=DEFAULT_URL, help="grpc://host:port or http://host:port")
    parser.add_argument("--model", default=DEFAULT_MODEL, help="name of the model on the server")
    parser.add_argument(
        "--timeout-s", type=float, default=DEFAULT_TIMEOUT_S, help="seconds for each request, its retries included"
    )
    parser.add_argument(
        "--max-in-flight",
        type=int,
        default=_MAX_IN_FLIGHT,
        help="requests on their way at once, of up to 64 lines each",
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show a progress bar on stderr; by default for files and stdin when stderr is a terminal",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    path = args.file or ("-" if args.reviews == ["-"] else None)
    if bool(args.file) == bool(args.reviews):
        parser.error('expected either reviews or --file: write for example "I loved it", --file reviews.txt, or -')
    with ExitStack() as stack:
        lines: Iterable[Line] = (Line(number, review) for number, review in enumerate(args.reviews, start=1))
        total: int | None = len(args.reviews)
        if path is not None:
            try:
                stream = _standard_input() if path == "-" else _opened(path, stack)
            except OSError as error:
                parser.error(f"cannot read {path}: {error.strerror}")
            lines, total = read_lines(stream), None
        show = args.progress if args.progress is not None else path is not None and sys.stderr.isatty()
        if show and path not in (None, "-"):
            total = _count_lines(stream)
        bar = stack.enter_context(tqdm(total=total, unit="review", disable=not show, file=sys.stderr))
        try:
            client = AsyncSentimentClient(
                args.url, model=args.model, timeout_s=args.timeout_s, max_in_flight=args.max_in_flight
            )
        except ValueError as error:
            parser.error(str(error))
        return _run(client, lines, _Printer(args.json, "review" if path is None else "line", bar), args.max_in_flight)


def _standard_input() -> BinaryIO:
    """Returns standard input without the interpreter's own buffer.

    At its end the interpreter takes the lock of that one, and aborts if the thread that reads lines holds it.
    """
    return open(0, "rb", closefd=False)  # not closed either: that would wait for the read


def _opened(path: str, stack: ExitStack) -> BinaryIO:
    stream = open(path, "rb")  # noqa: SIM115  (a pipe is never closed: that would wait for a read which may not end)
    if stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stack.enter_context(stream)
    return stream


def _run(client: AsyncSentimentClient, lines: Iterable[Line], printer: "_Printer", max_in_flight: int) -> int:
    """Answers `lines`; returns the exit code."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character still gets the row
    try:
        asyncio.run(_answer_all(client, lines, printer, max_in_flight))
    except BrokenPipeError:  # `| head` has seen enough; nothing more can be said on stdout, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 2
    except KeyboardInterrupt:
        return 130
    except (SentimentError, OSError) as error:
        tqdm.write(f"stopped after {printer.num_done} {printer.noun}s: {error}", file=sys.stderr)
        return 2
    return 1 if printer.num_broken else 0


async def _answer_all(
    client: AsyncSentimentClient, lines: Iterable[Line], printer: "_Printer", max_in_flight: int
) -> None:
    async with client, aclosing(answer_lines(client, lines, max_in_flight)) as batches:
        async for answers in batches:
            for answer in answers:
                printer.show(answer)
            sys.stdout.flush()


class _Printer:
    """Prints answers to stdout and problems to stderr, above the progress bar."""

    def __init__(self, as_json: bool, noun: str, bar: "tqdm[None]") -> None:
        self.noun = noun
        self.num_done = 0
        self.num_broken = 0
        self._as_json = as_json
        self._bar = bar

    def show(self, answer: Answer) -> None:
        """Prints one answer."""
        number, outcome = answer.line.number, answer.outcome
        if isinstance(outcome, str):
            self.num_broken += 1
            tqdm.write(f"{self.noun} {number}: {outcome}", file=sys.stderr)
            row = json.dumps({"line": number, "error": outcome}) if self._as_json else ""
        elif self._as_json:
            # Six digits are all that single precision has near 1.
            probabilities = [round(probability, 6) for probability in outcome.probabilities]
            row = json.dumps(
                {
                    "line": number,
                    "label": outcome.label,
                    "score": round(outcome.score, 6),
                    "probabilities": probabilities,
                }
            )
        else:
            text = textwrap.shorten(answer.line.text, _SHOWN_CHARACTERS, placeholder=" ...")
            row = f"{outcome.label:<8}  {outcome.score:.4f}  {text}"
        if row:
            tqdm.write(row, file=sys.stdout)
        self.num_done += 1
        self._bar.update()


def _count_lines(stream: BinaryIO) -> int | None:
    """Returns how many lines a file has, for the progress bar; None for what cannot be read twice."""
    if not stream.seekable():
        return None
    num_lines, last = 0, b"\n"
    while block := stream.read(1 << 20):
        num_lines, last = num_lines + block.count(b"\n"), block[-1:]
    stream.seek(0)
    return num_lines + (last != b"\n")


if __name__ == "__main__":
    sys.exit(main())
