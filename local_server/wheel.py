"""What the wheel has, put together as Triton looks for it."""

import ctypes
import importlib.util
import os
import re
import sys
import sysconfig
from pathlib import Path

from local_server.errors import ServeError

SHELL_SPECIAL = re.compile(r"[^A-Za-z0-9._/@%+=:,-]")
"""A character that no path may have: Triton starts the process of a Python model through a shell, unquoted."""


def package() -> Path:
    """Returns the folder of the installed package pytriton; `preflight.check` says what to do if there is none."""
    spec = importlib.util.find_spec("pytriton")
    assert spec is not None and spec.origin is not None  # noqa: PT018
    return Path(spec.origin).parent


def libpython_folder() -> str:
    """Returns where this Python's shared library lies, "" if the system's loader finds it without help.

    Raises:
        ServeError: there is none, as with a Python built without --enable-shared.
    """
    version = "{}.{}".format(*sys.version_info)
    name = f"libpython{version}.so.1.0"
    for folder in (sysconfig.get_config_var("LIBDIR"), f"{sys.base_prefix}/lib"):
        if folder and os.path.exists(f"{folder}/{name}"):
            return str(folder)
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise ServeError(
            f"{name} was not found, which Triton's Python backend loads; {sys.executable} was built without it. Run "
            f"`apt-get install libpython{version}` (Debian, Ubuntu), `PYTHON_CONFIGURE_OPTS=--enable-shared pyenv "
            f"install --force {version}`, or take conda's or uv's Python: `rm -rf .venv-serve && make serve PYTHON=...`"
        ) from error
    return ""


def environment() -> dict[str, str]:
    """Returns the environment variables that Triton starts with."""
    libraries = [libpython_folder(), f"{package().parent}/nvidia_pytriton.libs", os.environ.get("LD_LIBRARY_PATH")]
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(filter(None, libraries)),
        # The python3 found first decides which packages the models see.
        "PATH": f"{sys.exec_prefix}/bin:{os.environ.get('PATH', os.defpath)}",
        "ORT_DISABLE_TELEMETRY": "1",  # else ONNX Runtime 1.32 writes a device id and a database to ~/.cache
    }


def link_python_backend(folder: Path) -> None:
    """Links the Python backend and its stub for this Python together in `folder`; the wheel keeps them apart."""
    folder.mkdir()
    server, version = package() / "tritonserver", "{}.{}".format(*sys.version_info)
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    for file in (stub, *(server / "backends" / "python").glob("*.*")):
        (folder / file.name).symlink_to(file)


def plain_path(repository: Path, folder: Path) -> Path:
    """Returns `repository`, or a link to it in `folder` if its path has what a shell reads otherwise."""
    if not SHELL_SPECIAL.search(str(repository)):
        return repository
    link = folder / "models"
    link.symlink_to(repository.absolute(), target_is_directory=True)
    return link
