"""The engine with a real worker process and the demo model."""

import asyncio
import os
import random
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scheduler.config import Config, EngineConfig, ModelConfig
from scheduler.core.sequence import Sequence
from scheduler.loop import Engine
from scheduler.metrics.series import Metrics
from scheduler.worker import Worker, WorkerRefused
from tests.leads import AtOnce, Never
from tests.workers.models import generate, save, tiny
from workers.weights import demo_model

pytestmark = pytest.mark.timeout(600)

_SUBJECTS = (
    "The old bus driver",
    "A small model",
    "Nobody in Paris",
    "The sea",
    "My neighbour's cat",
    "Every scheduler",
)
_VERBS = ("went to the market because", "never understood why", "was told that", "looked at the sky and")


def mixed_prompts(tokenizer, count: int) -> list[tuple[list[int], int]]:
    """Sentences of very different lengths, and output lengths."""
    draw = random.Random(17)
    requests = []
    for _ in range(count):
        sentences = [f"{draw.choice(_SUBJECTS)} {draw.choice(_VERBS)}" for _ in range(draw.choice((1, 1, 2, 5, 12)))]
        requests.append((tokenizer.encode(". ".join(sentences)), draw.randint(4, 16)))
    return requests


async def collect(engine: Engine, ids: set[str], on_report=None) -> dict[str, list[int]]:
    """Run until all of these have ended; their tokens."""
    outputs: dict[str, list[int]] = {id: [] for id in ids}
    loop = asyncio.create_task(engine.run(), name="loop")
    left = set(ids)
    try:
        while left:
            report = await engine.reports.get()
            assert not report.given_up
            for event in report.events:
                outputs[event.id].append(event.token)
                if event.finish:
                    left.remove(event.id)
            if on_report:
                on_report(report)
    finally:
        loop.cancel()
    assert engine.batcher.pool.num_free == engine.batcher.pool.num_blocks
    return outputs


async def test_64_mixed_prompts_are_token_identical_to_generate():
    path = demo_model()
    requests = mixed_prompts(AutoTokenizer.from_pretrained(path), 64)
    config = Config(engine=EngineConfig(max_running=24, max_batch_tokens=96, num_blocks=160))
    async with Engine(config.worker()) as engine:
        for index, (prompt, length) in enumerate(requests):
            engine.submit(Sequence(str(index), prompt, max_tokens=length))
        outputs = await collect(engine, {str(index) for index in range(64)})
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for index, (prompt, length) in enumerate(requests):
        assert outputs[str(index)] == generate(model, prompt, length), f"prompt {index}"


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return str(save(tiny("llama"), tmp_path_factory.mktemp("tiny")))


def tiny_config(path: str, **engine) -> Config:
    return Config(model=ModelConfig(path=path, threads=1), engine=EngineConfig(block_size=8, **engine))


@pytest.mark.parametrize(("lead", "distance"), [(Never(), 1), (AtOnce(), 2)])
async def test_in_a_trace_of_a_real_run_eos_lets_a_waiting_one_into_the_next_step_planned(tiny_model, lead, distance):
    """Sequences end at a token that stops them; the first step planned after one has ended holds one that was waiting."""
    draw = random.Random(3)
    prompts = {str(index): [draw.randrange(3, 97) for _ in range(6)] for index in range(12)}
    stop_ids = frozenset(range(3, 40))
    reports = []
    config = tiny_config(tiny_model, max_running=2, max_batch_tokens=64, num_blocks=64)
    async with Engine(config.worker(), lead=lead) as engine:
        for id, prompt in prompts.items():
            engine.submit(Sequence(id, prompt, max_tokens=30, stop_ids=stop_ids))
        outputs = await collect(engine, set(prompts), reports.append)
    seen: set[str] = set()
    handovers = 0
    for number, report in enumerate(reports[:-distance]):
        stopped = [event for event in report.events if event.finish == "stop"]
        seen.update(report.rows)
        if stopped and report.waiting:
            # Planning at once still comes too late where the answer is there at once.
            newcomers = set().union(*(later.rows for later in reports[number + 1 : number + 1 + distance])) - seen
            assert len(newcomers) >= min(len(stopped), report.waiting)
            handovers += 1
    assert handovers >= 5
    assert (reports[-1].late_tokens > 0) == (distance == 2)
    for id, prompt in prompts.items():
        alone = generate(tiny("llama"), prompt, 30)
        end = next((number for number, token in enumerate(alone, 1) if token in stop_ids), 30)
        assert outputs[id] == alone[:end]


async def test_a_killed_worker_with_two_steps_in_its_pipe_costs_nobody_a_token(tiny_model):
    draw = random.Random(4)
    prompts = {str(index): [draw.randrange(3, 97) for _ in range(10)] for index in range(6)}

    async def run(killing: bool) -> dict[str, list[int]]:
        steps = 0

        def kill_once(report) -> None:
            nonlocal steps
            steps += 1
            if killing and steps == 15:
                os.kill(engine.worker_pid, signal.SIGKILL)

        async with Engine(tiny_config(tiny_model, max_running=4, num_blocks=64).worker(), lead=AtOnce()) as engine:
            for id, prompt in prompts.items():
                engine.submit(Sequence(id, prompt, max_tokens=40))
            outputs = await collect(engine, set(prompts), kill_once)
            assert engine.worker_restarts == int(killing)
        return outputs

    assert await run(killing=True) == await run(killing=False)


@pytest.mark.parametrize("way", ["ngram", "a draft model"])
async def test_drafts_change_no_token_and_are_counted(tiny_model, way):
    """With two steps in the pipe, one of which dies with its worker; the model is its own draft model."""
    draw = random.Random(7)
    prompts = {str(index): [draw.randrange(3, 97) for _ in range(10)] for index in range(4)}
    metrics, reports = Metrics(), []

    def kill_once(report) -> None:
        metrics.observe_step(report)
        reports.append(report)
        if len(reports) == 9:
            os.kill(engine.worker_pid, signal.SIGKILL)

    speculation = tiny_model if way == "a draft model" else way
    config = tiny_config(tiny_model, max_running=3, num_blocks=64, speculation=speculation)
    async with Engine(config.worker(), lead=AtOnce(), speculation=config.speculation()) as engine:
        for id, prompt in prompts.items():
            engine.submit(Sequence(id, prompt, max_tokens=60))
        outputs = await collect(engine, set(prompts), kill_once)
        assert engine.worker_restarts == 1
    for id, prompt in prompts.items():
        assert outputs[id] == generate(tiny("llama"), prompt, 60)
    verified = [accepted for report in reports for accepted in report.accepted]
    assert sum(verified) > 0

    def sample(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"tokenbus_{name}", labels)

    assert sample("accepted_draft_tokens_count") == len(verified)
    assert sample("accepted_draft_tokens_sum") == sum(verified)
    assert sample("wasted_tokens_total", reason="speculation") == engine.batcher.counters.rejected_tokens


async def answers(engine: Engine, prompts: dict[str, list[int]]) -> tuple[dict[str, list[int]], int]:
    """Outputs of sequences named ``tenant/number``, all at once, and how many prompt tokens were computed for them."""
    reports = []
    for id, prompt in prompts.items():
        engine.submit(Sequence(id, prompt, max_tokens=12, tenant=id.partition("/")[0]))
    outputs = await collect(engine, set(prompts), reports.append)
    return outputs, sum(report.prefill_tokens for report in reports)


async def test_a_cached_prompt_is_not_computed_again_but_for_another_tenant_all_of_it(tiny_model):
    draw = random.Random(5)
    prompt = [draw.randrange(3, 97) for _ in range(40)]
    computed, texts = {}, []
    async with Engine(tiny_config(tiny_model, max_running=2, num_blocks=64).worker()) as engine:
        for id in ("a/cold", "a/warm", "b/after", "b/warm"):
            outputs, computed[id] = await answers(engine, {id: prompt})
            texts.append(outputs[id])
    assert computed == {"a/cold": 40, "a/warm": 8, "b/after": 40, "b/warm": 8}
    assert texts == texts[:1] * 4


async def test_the_prefix_cache_changes_no_token(tiny_model):
    """Prompts that share nothing, a part, or all but a token, then next turns; blocks are scarce enough to be evicted."""
    draw = random.Random(6)
    shared = [draw.randrange(3, 97) for _ in range(44)]
    firsts = {
        f"{'ab'[number % 2]}/{number}": [*shared[: 11 * (number % 5)], *draw.choices(range(3, 97), k=1 + number)]
        for number in range(20)
    }

    async def run(*, cache: bool) -> tuple[dict[str, list[int]], int]:
        worker = tiny_config(tiny_model, max_running=6, max_batch_tokens=32, num_blocks=48).worker()
        async with Engine(worker, prefix_cache=cache) as engine:
            outputs, first = await answers(engine, firsts)
            turns = {f"{id}/next": [*firsts[id], *outputs[id], 5, 6] for id in firsts}
            more, second = await answers(engine, turns)
            assert engine.batcher.counters.cached_tokens > 0 or not cache
        return outputs | more, first + second

    with_cache, without = await run(cache=True), await run(cache=False)
    assert with_cache[0] == without[0]
    assert with_cache[1] < without[1]


async def test_a_worker_refuses_with_the_reason(tmp_path):
    save(tiny("mamba"), tmp_path)
    with pytest.raises(WorkerRefused, match=r"mamba .*(recurrent state|layers of type)"):
        async with Worker(tiny_config(str(tmp_path)).worker(), patience_s=60):
            pass
