"""Our own engine on a job, as ``tokenbus bench engine`` runs it."""

import asyncio
from dataclasses import dataclass
from importlib.metadata import version

import msgspec

from benchmarks import engine
from benchmarks.peers.failure import PeerFailed
from benchmarks.peers.job import Answer, Job, Output
from benchmarks.workload import WorkItem, Workload, config
from protocol.plan import KVDtypeName, WeightsName
from scheduler.worker import WorkerDied, WorkerRefused

_STEP_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Ours:
    """Batcher, loop and worker process, as the service has them; the worker's self-test is its warm-up."""

    weights: WeightsName
    kv_dtype: KVDtypeName = "auto"

    def install(self) -> None:
        """It is."""

    def run(self, job: Job) -> Answer:
        """Raises PeerFailed."""
        worker = msgspec.structs.replace(
            config(job.model, job.max_running, _STEP_TOKENS).worker(),
            weights=self.weights,
            kv_dtype=self.kv_dtype,
            threads=job.threads,
        )
        items = [WorkItem(item.id, item.prompt_token_ids, item.max_tokens) for item in job.items]
        try:
            figures = asyncio.run(engine.run(Workload(items), worker))
        except (WorkerDied, WorkerRefused, RuntimeError) as error:
            raise PeerFailed(str(error)) from error
        outputs = {item.id: Output(len(item.prompt_token_ids), figures.token_ids[str(item.id)]) for item in items}
        return Answer(figures.seconds, outputs, {name: version(name) for name in ("tokenbus", "torch")})
