"""The processes of one worker, each with a share of the model.

Rank 0 is the one that the scheduler knows. It starts the others as ``python -m workers RANK STORE`` and passes on whatever it is
told, so that all run the same steps; their answers nobody reads. None outlives another, for it would wait in the middle of a
step for ever.
"""

import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from protocol import plan

_COMMAND = (sys.executable, "-m", "workers")
#: All are on one machine, and nobody else is to reach them.
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_LAST_WORDS_S = 5.0

logger = logging.getLogger(__name__)


class Ranks:
    """All ``count`` of them, seen from the one with this ``index``. ``store``: the file by which they find each other; rank 0
    makes it. Alone, nothing here does anything."""

    def __init__(self, count: int, index: int = 0, store: Path | None = None) -> None:
        self.count = count
        self.index = index
        self._store = store
        self._pipes: list[IO[bytes]] = []

    def start(self) -> None:
        """Have the others, and end with them."""
        if self.index:
            self._watch(_hung_up)
        elif self.count > 1:
            descriptor, store = tempfile.mkstemp(prefix="tokenbus-ranks-")
            os.close(descriptor)
            self._store = Path(store)
            for index in range(1, self.count):
                self._start(index)

    def tell(self, body: bytes) -> None:
        """Pass on what rank 0 was told, a frame's body."""
        for pipe in self._pipes:
            pipe.write(plan.frame_of(body))
            pipe.flush()

    def join(self, device: torch.device) -> None:
        """Wait until all are here; from then on they compute together. ``device``: this one's own."""
        if self.count == 1:
            return
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            init_method=f"file://{self._store}",
            rank=self.index,
            world_size=self.count,
            device_id=device if on_gpu else None,
        )

    def leave(self, status: int) -> None:
        """End this process at once, for the others to notice."""
        self.forget()
        if self.count > 1:
            os._exit(status)

    def forget(self) -> None:
        """Take the store away, as each does who won't be here for long: the others may be killed before they could."""
        if self._store is not None:
            self._store.unlink(missing_ok=True)

    def _start(self, index: int) -> None:
        process = subprocess.Popen(
            [*_COMMAND, str(index), str(self._store)], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        assert process.stdin is not None
        self._pipes.append(process.stdin)

        def ended() -> None:
            if process.wait() == 0:
                # It refused to start. So does this one, and the scheduler must hear why.
                time.sleep(_LAST_WORDS_S)
            logger.error("rank %d ended with status %d", index, process.returncode)

        self._watch(ended)

    def _watch(self, until: Callable[[], None]) -> None:
        """Leave when this returns."""

        def watch() -> None:
            until()
            self.leave(1)

        threading.Thread(target=watch, name="watch", daemon=True).start()


def _hung_up() -> None:
    """Wait until rank 0 has closed our stdin, whatever is left in it."""
    poll = select.poll()
    poll.register(sys.stdin.fileno(), 0)
    poll.poll()
