"""A worker of two processes, seen from the scheduler: it says what one of one process says, and ends whole."""

import asyncio
import os
import signal

import psutil
import pytest
from transformers import PreTrainedModel

from protocol.plan import Admission, Row, Sampling, StepPlan, StepResult
from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.worker import Worker, WorkerRefused
from tests.workers.models import generate, save, tiny
from workers.attention import AttentionBackend
from workers.model import adopt

BLOCK = 8
PROMPT = [5, 6, 7]
LENGTH = 12


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path, monkeypatch):
    left = tmp_path / "left"
    left.mkdir()
    monkeypatch.setenv("TMPDIR", str(left))
    yield
    assert list(left.iterdir()) == []


def config(model: PreTrainedModel, folder) -> Config:
    return Config(
        model=ModelConfig(path=str(save(model, folder / "model")), threads=2, tensor_parallel=2),
        engine=EngineConfig(block_size=BLOCK),
    )


async def test_it_says_the_same_with_half_the_memory_each_and_leaves_nobody_behind_when_killed(tmp_path):
    model = tiny("gemma2")
    expected = generate(model, PROMPT, LENGTH)
    async with Worker(config(model, tmp_path).worker(), patience_s=60) as worker:
        (peer,) = psutil.Process(worker.pid).children()
        worker.send(StepPlan(0, [Admission(0, PROMPT, Sampling(), 3)], [], [Row(0, 0, 3, [0, 1], sample=True)]))
        for number in range(1, LENGTH):
            worker.send(StepPlan(number, [], [0], []))
        answers = [await worker.receive() for _ in range(LENGTH)]
        assert all(isinstance(answer, StepResult) for answer in answers)
        assert [token for answer in answers for token in answer.tokens] == expected
        whole = AttentionBackend.bytes_per_block(adopt(model, tmp_path).layers, BLOCK, model.dtype)
        assert worker.info.kv_bytes_per_block == whole / 2

        worker.send(StepPlan(LENGTH, [], [0], []))
        os.kill(worker.pid, signal.SIGKILL)
        assert psutil.wait_procs([peer], timeout=10)[1] == []


async def test_the_scheduler_hears_why_a_model_cannot_be_shared(tmp_path):
    with pytest.raises(WorkerRefused, match="gpt2: transformers has no tensor-parallel plan for it"):
        async with Worker(config(tiny("gpt2"), tmp_path).worker(), patience_s=60):
            await asyncio.Event().wait()
