"""Another engine on a job: its driver in a process of its own, under an interpreter of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

import benchmarks
from benchmarks.peers import gguf_file
from benchmarks.peers.environment import Environment
from benchmarks.peers.failure import PeerFailed, last_lines
from benchmarks.peers.gguf_file import GgufType
from benchmarks.peers.job import Answer, Job

#: An engine that takes longer over one run hangs.
_LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True)
class Foreign:
    """``driver``: a module of `drivers`. Without an ``environment`` it runs under our interpreter, which has transformers.

    ``gguf``: what the model is converted to. ``options`` are the driver's, ``variables`` its process's.
    """

    driver: str
    environment: Environment | None = None
    distributions: tuple[str, ...] = ()
    gguf: GgufType | None = None
    options: dict[str, str] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)

    def install(self) -> None:
        """Raises PeerFailed."""
        if self.environment is not None:
            self.environment.install()

    def run(self, job: Job) -> Answer:
        """Raises PeerFailed."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            # The driver starts here and finds this package beside its own environment's, and no other of ours.
            (folder / "benchmarks").symlink_to(Path(benchmarks.__file__).parent)
            model = self._model(Path(job.model), folder)
            asked = msgspec.structs.replace(
                job, model=str(model), options=self.options, distributions=list(self.distributions)
            )
            (folder / "job.json").write_bytes(msgspec.json.encode(asked))
            self._drive(folder, job.threads)
            return msgspec.json.decode((folder / "answer.json").read_bytes(), type=Answer)

    def _model(self, model: Path, folder: Path) -> Path:
        if self.gguf is None:
            return model
        target = folder / "model.gguf"
        gguf_file.write(model, self.gguf, target)
        return target

    def _drive(self, folder: Path, threads: int) -> None:
        python = sys.executable if self.environment is None else self.environment.python
        log = folder / "log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, "-m", f"benchmarks.peers.drivers.{self.driver}", "job.json", "answer.json"],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": str(threads)} | self.variables,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(_LONGEST_S)
            except subprocess.TimeoutExpired as error:
                raise PeerFailed(f"not done after {_LONGEST_S:.0f} s") from error
            finally:
                # Some have processes of their own, which may outlive the driver.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if status:
            raise PeerFailed(f"ended with status {status}: {last_lines(log.read_text(errors='replace'))}")
