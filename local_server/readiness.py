"""Whether the server answers, and when it no longer can."""

import json
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

from local_server.errors import ServeError
from local_server.processes import children, has_ended, listeners
from local_server.signals import interruptible

SAMPLE = {"text": "A moving and beautifully acted film. I loved every minute of it."}
START_TIMEOUT_S = 60
WATCH_INTERVAL_S = 0.5


def first_answer(server: subprocess.Popen[bytes], url: str) -> str:
    """Returns the JSON answer to the first review, once Triton gives one, and no other server in its place.

    Raises:
        ServeError: Triton ended, answered with an error, or took more than `START_TIMEOUT_S`.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's ports
    request = urllib.request.Request(url, json.dumps(SAMPLE).encode())
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        if server.poll() is not None:
            raise ServeError(f"Triton ended while starting, {_ending(server)}")
        try:
            with interruptible(), opener.open(request, timeout=START_TIMEOUT_S) as response:
                answer = str(response.read().decode())
            if _is_ours(server, url):
                return answer
            with interruptible():  # a server that took the port meanwhile: Triton is about to end for it
                time.sleep(0.05)
        except urllib.error.HTTPError as error:
            raise ServeError(f"Triton started but cannot predict: {error.read().decode()}") from error
        except OSError:
            with interruptible():
                time.sleep(0.05)
    raise ServeError(f"Triton gave no answer within {START_TIMEOUT_S} s")


def _is_ours(server: subprocess.Popen[bytes], url: str) -> bool:
    """Returns whether `server` listens on the port of `url`, or nobody can be seen to."""
    found = listeners(urllib.parse.urlsplit(url).port or 80)
    return server.pid in found or not found


def wait_for_death(server: subprocess.Popen[bytes]) -> str:
    """Returns how Triton ended; the death of a model's process counts, since Triton goes on without noticing."""
    models = children(server.pid)
    while server.poll() is None:
        if any(has_ended(model) for model in models):
            return "the process of a model ended, so no request can be answered any more"
        with interruptible():
            time.sleep(WATCH_INTERVAL_S)
    return f"Triton ended, {_ending(server)}"


def _ending(server: subprocess.Popen[bytes]) -> str:
    code = server.returncode
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
