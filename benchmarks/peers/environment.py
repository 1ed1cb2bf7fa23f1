"""The virtual environments of peers, under the user's cache folder: made once for each set of pinned packages."""

import hashlib
import subprocess
import sys
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from platformdirs import user_cache_path

from benchmarks.peers.failure import PeerFailed, last_lines

_DONE = ".installed"


@dataclass(frozen=True, slots=True)
class Environment:
    """``packages`` are requirements that pin a version; ``removed`` come with them and are in the way."""

    name: str
    packages: tuple[str, ...]
    removed: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        made_of = repr((sys.version, self._requirements, self.removed))
        digest = hashlib.sha256(made_of.encode()).hexdigest()[:12]
        return user_cache_path("tokenbus") / "peers" / f"{self.name}-{digest}"

    @property
    def python(self) -> Path:
        """Its interpreter, once it is installed."""
        return self.folder / "bin" / "python"

    def install(self) -> None:
        """Unless it is installed. Raises PeerFailed."""
        done = self.folder / _DONE
        if done.exists():
            return
        try:
            venv.create(self.folder, clear=True, with_pip=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise PeerFailed(f"no virtual environment could be made: {error}") from error
        self._pip("install", *self._requirements)
        if self.removed:
            self._pip("uninstall", "--yes", *self.removed)
        done.touch()

    @property
    def _requirements(self) -> tuple[str, ...]:
        """Besides the peer what job and answer are written with."""
        return (*self.packages, f"msgspec=={version('msgspec')}")

    def _pip(self, *arguments: str) -> None:
        done = subprocess.run(
            [self.python, "-m", "pip", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            raise PeerFailed(f"pip {arguments[0]} failed: {last_lines(done.stdout)}")
