"""Compiles a C++ kernel with the system compiler at first use and keeps the library in the user's cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

COMPILERS = ("g++", "c++", "clang++")
FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    # Every multiply-add is fused: GCC's tuning for some CPUs unfuses those that form a single chain, and the same sum
    # would then round differently in one instance of a template than in another.
    "-ffp-contract=fast",
    "--param=avoid-fma-max-bits=0",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
COMPILE_TIMEOUT_S = 120

logger = logging.getLogger(__name__)


class CompileError(Exception):
    """The kernel could not be compiled or loaded; the message says why."""


def load_library(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """The library compiled from `source` and the headers beside it.

    Taken from the cache when the same text, flags, compiler and CPU made it before.
    Raises CompileError.
    """
    flags = (*FLAGS, *(f"-D{define}" for define in defines))
    try:
        compiler = _compiler()
        version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
        texts = [path.read_text() for path in (source, *sorted(source.parent.glob("*.h")))]
        identity = "\0".join((*texts, compiler, version.stdout.decode(), *flags, _cpu()))
        library = _cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.so"
        if not library.exists():
            _compile([compiler, *flags, str(source)], library)
        return ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        raise CompileError(f"the compiler failed: {error.stderr.decode(errors='replace')[-500:]}") from error
    except (OSError, RuntimeError, subprocess.TimeoutExpired) as error:
        raise CompileError(str(error)) from error


def address_of(function: Any) -> int | None:
    """Of a library's function, for another one that is to call it."""
    return ctypes.cast(function, ctypes.c_void_p).value


def _compiler() -> str:
    """Raises CompileError when there is none."""
    for name in COMPILERS:
        if path := shutil.which(name):
            return path
    raise CompileError(f"no C++ compiler ({', '.join(COMPILERS)}) in PATH")


def _compile(command: Sequence[str], library: Path) -> None:
    """Processes may compile the same library at once: each writes its own file, and a rename is atomic."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run([*command, "-o", str(built)], check=True, capture_output=True, timeout=COMPILE_TIMEOUT_S)
        built.rename(library)
    logger.info("compiled %s", library)


def _cache_folder() -> Path:
    """Private to the user, since what lies here is loaded as code. Raises OSError, or RuntimeError without a home."""
    folder = user_cache_path("tokenbus") / "kernels"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@cache
def _cpu() -> str:
    """What -march=native depends on: a cache folder may be shared between unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    kept = ("flags", "features", "model", "model name", "cpu part")
    return "\n".join(sorted({line for line in lines if line.split(":")[0].strip().lower() in kept}))
