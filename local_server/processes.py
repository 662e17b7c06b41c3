"""What /proc says about processes."""

import contextlib
import glob
import os
from pathlib import Path


def listeners(port: int) -> list[int]:
    """Returns the processes that listen on `port`, on whatever address, as far as this user may see them."""
    sockets = [line.split() for file in glob.glob("/proc/net/tcp*") for line in Path(file).read_text().splitlines()]
    listening = {f"socket:[{s[9]}]" for s in sockets if s[3] == "0A" and s[1].endswith(f":{port:04X}")}
    found = set()
    for handle in glob.glob("/proc/[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(handle) in listening:
                found.add(int(handle.split("/")[2]))
    return sorted(found)


def name_of(process: int) -> str:
    """Returns the name of `process`, "" if it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text(errors="replace").strip()
    except OSError:
        return ""


def children(process: int) -> list[int]:
    """Returns the processes that `process` started and that have not been waited for."""
    found = [int(Path(folder).name) for folder in glob.glob("/proc/[0-9]*")]
    return [one for one in found if _state_and_parent(one)[1] == str(process)]


def has_ended(process: int) -> bool:
    """Returns whether `process` runs no more, waited for or not."""
    return _state_and_parent(process)[0] in "ZX"


def _state_and_parent(process: int) -> list[str]:
    try:  # any user's process has its name in there, which may be cut off within a character
        return Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
    except OSError:
        return ["X", "0"]
