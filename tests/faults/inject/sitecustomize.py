"""Faults, put into the processes of a service under test by way of PYTHONPATH: the code itself has no hooks for them.

``FAULT`` names one of the functions below; ``FAULT_FILE`` is created when it strikes, and a fault that is to strike once
doesn't if that is there already.
"""

import os
import signal
import sys
from pathlib import Path

#: A prompt with this token in second place is poison.
POISON = 96


def struck() -> bool:
    """Whether this is not the first time."""
    try:
        Path(os.environ["FAULT_FILE"]).touch(exist_ok=False)
    except FileExistsError:
        return True
    return False


def on_poison(strike) -> None:
    """Whenever a poisonous prompt is in the worker's step."""
    from workers.runner import Runner

    step = Runner.step

    def poisoned(self, plan):
        admitted = {admission.slot: admission.tokens for admission in plan.admissions}
        if any(row.start == 0 and admitted.get(row.slot, [])[1:2] == [POISON] for row in plan.rows):
            strike()
        return step(self, plan)

    Runner.step = poisoned


def fail() -> None:
    raise RuntimeError("an injected failure")


def run_out_of_memory() -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory (injected)")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang_once() -> None:
    if not struck():
        signal.pause()


def die_with_service() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    die()


def die_before_closing() -> None:
    """The service, once, when a result is published and the journal doesn't know it yet."""
    from scheduler.journal.sqlite import SqliteJournal

    delivered = SqliteJournal.delivered

    def dying(self, id):
        if not struck():
            die()
        return delivered(self, id)

    SqliteJournal.delivered = dying


fault = os.environ.get("FAULT")
if fault == "die_before_closing":
    if "scheduler.cli" in sys.orig_argv:
        die_before_closing()
elif fault is not None and "workers" in sys.orig_argv:
    on_poison(globals()[fault])
