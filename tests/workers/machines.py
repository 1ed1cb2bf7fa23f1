"""Kernels compiled for other CPUs than this one, of which it can do all that they do."""

import platform
from pathlib import Path

import pytest

from workers.kernels import compiler


def compile_for(machine: str, needs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on; ``machine``: what the compiler calls it, and more of its options. ``needs``: one of the CPU's flags. Skips the
    test where that is missing."""
    if platform.machine() != "x86_64":
        pytest.skip("compiles for x86-64")
    if needs not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"no {needs}")
    flags = [flag for flag in compiler.FLAGS if not flag.startswith("-march=")] + f"-march={machine}".split()
    monkeypatch.setattr(compiler, "FLAGS", flags)
