"""Asks the server for one real prediction: exit status 0 if the answer has a label, 1 with the reason if not.

Triton's own readiness says that models were loaded, not that they answer: before release 26.04 it stayed 200 when the
tokenizer's process had died.
"""

import json
import sys
import time
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/v2/models/sentiment/generate"
TIMEOUT_S = 8.0


def main(url: str = URL) -> int:
    """Sends one review to `url`, each time another, which no response cache knows; returns the exit status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy cannot reach this machine's ports
    request = urllib.request.Request(url, json.dumps({"text": f"A quiet, honest film. {time.time_ns()}"}).encode())
    try:
        with opener.open(request, timeout=TIMEOUT_S) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:  # its text alone tells a refusal from overload: /generate says 400 to all
        print(f"no prediction from {url}: {error}: {error.read().decode(errors='replace').strip()}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"no prediction from {url}: {error}", file=sys.stderr)
        return 1
    if not isinstance(answer, dict) or not answer.get("label"):
        print(f"{url} answered {answer}, expected a label", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
