"""A service in a process of its own, as it would be."""

import asyncio
import contextlib
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

from protocol.client import Client

_UP_S = 120.0
_USER, _SYSTEM = 13, 14


@contextlib.asynccontextmanager
async def serving(
    folder: Path, url: str, settings: dict[str, object], module: str = "scheduler.cli"
) -> AsyncIterator[int]:
    """Its process id; it is online inside the block and killed after it. ``settings`` may say where metrics are served.

    ``module`` is run with the arguments of ``tokenbus``.
    """
    settings = {"broker.url": url, "broker.data_dir": folder, "metrics.port": 0, **settings}
    arguments = [f"--set={name}={value}" for name, value in settings.items()]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, "serve", "--set=service.log_level=warning", *arguments)
    )
    try:
        async with asyncio.timeout(_UP_S), Client(url, tenant="probe") as client:
            await client.wait_online()
        yield process.pid
    finally:
        process.kill()
        await process.wait()


def cpu_s(pid: int) -> float:
    """CPU time a process has used so far, in user and system mode, without its children's: proc(5), ``/proc/pid/stat``."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(fields[number - 2]) for number in (_USER, _SYSTEM)) / os.sysconf("SC_CLK_TCK")
