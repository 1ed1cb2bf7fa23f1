"""A PostgreSQL cluster of one's own, for as long as a benchmark or a test runs."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg


class ProgramNotFound(Exception):
    """PostgreSQL isn't installed; the text says how it is."""


@contextlib.contextmanager
def cluster(*settings: str) -> Iterator[str]:
    """The URL of one that runs, on a socket of its own, with such further settings; all of it is gone afterwards.

    Raises ProgramNotFound, or CalledProcessError when it can't be made.
    """
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir="/tmp"))  # the path of a socket must be short
    as_other = _other_user()
    if as_other:
        shutil.chown(folder, as_other["user"], as_other["group"])
    data = folder / "data"
    try:
        subprocess.run(
            [_program("initdb"), "-D", data, "-U", "tokenbus", "-A", "trust", "-N", "-E", "UTF8", "--locale=C"],
            check=True,
            capture_output=True,
            cwd=folder,
            **as_other,
        )
        with (folder / "log").open("wb") as log:
            given = [
                f"-c{setting}" for setting in ("listen_addresses=", f"unix_socket_directories={folder}", *settings)
            ]
            server = subprocess.Popen(
                [_program("postgres"), "-D", data, *given], stdout=log, stderr=log, cwd=folder, **as_other
            )
        try:
            url = f"postgresql://tokenbus@/postgres?host={folder}"
            _wait_up(url, server, folder / "log")
            yield url
        finally:
            server.send_signal(signal.SIGQUIT)
            server.wait()
    finally:
        shutil.rmtree(folder)


def _program(name: str) -> str:
    """On the path, or where Debian keeps it, of the newest version there."""
    found = shutil.which(name) or max(map(str, Path("/usr/lib/postgresql").glob(f"*/bin/{name}")), default=None)
    if found is None:
        raise ProgramNotFound(f"PostgreSQL's {name} isn't here: deploy/packages.sh installs it (Debian: postgresql)")
    return found


def _other_user() -> dict[str, Any]:
    """PostgreSQL refuses to run as root."""
    return {"user": "nobody", "group": "nogroup", "extra_groups": ()} if os.geteuid() == 0 else {}


def _wait_up(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    while True:
        if server.poll() is not None:
            raise subprocess.CalledProcessError(server.returncode, "postgres", log.read_bytes())
        with contextlib.suppress(psycopg.OperationalError), psycopg.connect(url):
            return
