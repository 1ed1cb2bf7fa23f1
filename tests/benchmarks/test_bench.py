"""The benchmarks run, count right and agree with each other; their figures are looked at by people, not by tests."""

import asyncio
import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks import determinism, engine_text, floor, report, startup, startup_parts
from benchmarks.bare import Bare
from benchmarks.blocks import BlocksFigures
from benchmarks.determinism import ConditionFigures, DeterminismFigures, WayFigures
from benchmarks.fairness import FairnessFigures
from benchmarks.planning import PlanningFigures
from benchmarks.prefix import PrefixFigures
from benchmarks.speculation import SpeculationFigures
from benchmarks.startup import StartupFigures
from benchmarks.startup_parts import timed
from benchmarks.tracing import TracingFigures
from benchmarks.workload import load, mixed
from scheduler.config import Config, EngineConfig, ModelConfig
from tests.workers.models import save, servable, tiny
from tests.workers.test_grammar import EOS, TOKENIZER, VOCAB
from workers.linear import PackedLinear
from workers.packing import pack
from workers.weights import demo_model

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    workload = mixed(6, prompt=(3, 12), output=(2, 9), seed=2, vocab=97)
    (folder / "workload.json").write_bytes(msgspec.json.encode(workload))
    return folder / "workload.json", save(tiny("llama"), folder / "model")


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> str:
    return str(servable(tmp_path_factory.mktemp("servable")))


def bench(name: str, *arguments: str) -> dict:
    return call(name, "--max-running", "4", *arguments)


def call(name: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "scheduler.cli", "bench", name, "--json", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("arguments", "told"), [(["--help"], "ladder"), (["blocks", "--help"], "--requests")])
def test_help_is_of_the_command_or_of_the_benchmark(arguments, told):
    command = [sys.executable, "-m", "scheduler.cli", "bench", *arguments]
    assert told in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_engine_and_ladder_count_the_same_tokens(files, tmp_path):
    workload, model = files
    wanted = {str(item.id): item.max_tokens for item in load(workload).requests}
    trace = tmp_path / "steps.jsonl"
    engine = bench("engine", "--workload", str(workload), "--model", str(model), "--trace", str(trace))
    assert {id: len(tokens) for id, tokens in engine["token_ids"].items()} == wanted
    assert engine["output_tokens"] == sum(wanted.values())
    assert engine["prompt_tokens"] == sum(len(item.prompt_token_ids) for item in load(workload).requests)
    assert engine["steps"] >= max(wanted.values())
    assert 1 < engine["mean_running"] <= 4
    steps = [json.loads(line) for line in trace.read_text().splitlines()]
    assert len(steps) == engine["steps"]
    # The last token of each request is never computed.
    computed = engine["prompt_tokens"] + engine["output_tokens"] - len(wanted)
    assert sum(step["work"]["tokens"] for step in steps) == computed
    assert sum(step["prefill_tokens"] + step["decode_tokens"] for step in steps) == computed
    picture = tmp_path / "ladder.png"
    ladder = bench(
        "ladder", "--workload", str(workload), "--model", str(model), "--slow-first", "2", "--plot", str(picture)
    )
    assert [rung["name"] for rung in ladder["rungs"]] == ["naive", "cached", "static", "continuous"]
    assert [rung["requests"] for rung in ladder["rungs"]] == [2, 2, 6, 6]
    assert all(rung["equal_tokens"] == 1 for rung in ladder["rungs"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_adapters_runs_every_way(files):
    workload, model = files
    figures = bench(
        "adapters",
        "--workload",
        str(workload),
        "--model",
        str(model),
        "--adapters",
        "2",
        "--rank",
        "2",
        "--rounds",
        "1",
    )
    assert figures["adapters"] == 2
    for way in ("unused", "used"):
        assert figures[f"{way}_share"] == pytest.approx(figures[way] / figures["base"])


def test_the_floor_is_part_of_the_steps(files):
    workload, model = files
    figures = bench("engine", "--workload", str(workload), "--model", str(model), "--weights", "int8", "--floor")
    assert figures["floor_ratio"] > 0


def test_the_floor_is_a_share_of_the_steps_time():
    """Medians of the rounds' own shares: a round is compared to the products that were timed beside it."""
    times = [Bare(products_s=products, weight_bytes=30, read_bytes_per_s=10) for products in (1.0, 9.0, 6.0)]
    rounds = [floor.Round(steps=steps, seconds=12, bare=each) for steps, each in zip((2, 1, 3), times, strict=True)]
    assert floor.summary(4, "auto", rounds) == floor.BatchFloor(
        batch=4, kv_dtype="auto", steps=6, step_s=6, floor_ratio=0.5, bandwidth_ratio=0.5
    )


def test_the_floor_of_decodes_looks_at_full_batches_only(files):
    _, model = files
    sizes = ("--prompt-tokens", "9", "--output-tokens", "40", "--vocab", "97", "--rounds", "1")
    figures = bench("floor", "--model", str(model), *sizes)
    of = [(batch["batch"], batch["kv_dtype"]) for batch in figures["batches"]]
    assert of == [(1, "auto"), (1, "float16"), (4, "auto"), (4, "float16")]
    steps = [batch["steps"] for batch in figures["batches"]]
    assert steps[:2] == [39, 39], "all but the first token, which the prompt gives"
    assert all(1 < each <= 39 for each in steps[2:])
    # Two layers, 32 wide, and the head; panels are padded and each has scales and biases.
    weights = 4 * (2 * 32 * (32 + 16 + 16 + 32 + 3 * 48) + 32 * 97)
    packed = tiny("llama")
    pack(packed, "float32")
    assert weights < figures["weight_bytes"]
    assert figures["weight_bytes"] == sum(each.nbytes for each in packed.modules() if isinstance(each, PackedLinear))
    for batch in figures["batches"]:
        assert batch["floor_ratio"] > 0
        assert batch["bandwidth_ratio"] > 0


def test_slow_reader_measures_both_ways(served):
    # Enough tokens that no stream comes in a single chunk: the tiny model is faster than the flushes.
    sizes = ("--rounds", "1", "--flood", "4", "--tokens", "200", "--vocab", "97")
    figures = bench("slow_reader", "--model", served, *sizes)
    assert figures["rounds"] == 1
    assert figures["p99_ratio"] == figures["stopped_s"]["p99"] / figures["reading_s"]["p99"] > 0


def test_tracing_counts_the_spans_of_every_request(served, tmp_path):
    workload = mixed(6, prompt=(3, 12), output=(200, 210), seed=2, vocab=97)
    (tmp_path / "workload.json").write_bytes(msgspec.json.encode(workload))
    sizes = ("--workload", str(tmp_path / "workload.json"), "--rounds", "2", "--tenants", "2")
    figures = bench("tracing", "--model", served, *sizes)
    assert figures["requests"] == 2 * 6
    assert figures["spans"] == 5 * figures["requests"], "one for the request, four within it"
    assert figures["share"] == figures["on_output_tokens_per_s"] / figures["off_output_tokens_per_s"] > 0
    line = engine_text.tracing_line(msgspec.convert(figures, TracingFigures))
    assert "60 spans of 12 requests" in line


def test_planning_times_every_case(tmp_path):
    picture = tmp_path / "planning.png"
    sizes = ("--waiting", "5", "--waiting", "50", "--tenants", "3", "--rounds", "2", "--steps", "20")
    figures = bench("planning", *sizes, "--plot", str(picture))
    cases = figures["cases"]
    assert [(case["policy"], case["waiting"]) for case in cases] == [
        (policy, waiting) for policy in ("fair", "chunked") for waiting in (5, 50)
    ]
    assert all(case[part]["p99"] >= case[part]["p50"] > 0 for case in cases for part in ("plan_us", "apply_us"))
    assert all(case["step_us"]["p50"] > case["plan_us"]["p50"] for case in cases)
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = report.planning_table(msgspec.convert(figures, PlanningFigures)).splitlines()
    assert [line.count("|") for line in table] == [4] * 4, "two rows and a heading, two columns and a name"


def test_fairness_serves_both_policies_the_same_arrivals_and_sees_the_difference(served, tmp_path):
    picture = tmp_path / "fairness.png"
    sizes = ("--prompt-tokens", "16", "--output-tokens", "48", "--vocab", "97", "--num-blocks", "16")
    figures = bench(
        "fairness", "--model", served, *sizes, "--minutes", "0.05", "--rate", "6000", "--plot", str(picture)
    )
    assert figures["bound"] == 2 * 2 * 16 * 16
    ours, theirs = figures["runs"]
    for run in ours, theirs:
        slow, fast = run["tenants"]
        assert fast["sent"] > 1.5 * slow["sent"] > 0
        assert slow["sent"] > slow["begun"] >= slow["ended"] > 0, "it was overloaded"
        assert run["curve"][0][1] == 0
        assert run["largest_change"] >= run["largest_gap"]
    assert ours["largest_change"] <= figures["bound"]
    assert ours["largest_gap"] < theirs["largest_gap"]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert f"the bound is {figures['bound']:,.0f}." in report.fairness_text(msgspec.convert(figures, FairnessFigures))


def test_speculation_writes_the_same_tokens_in_fewer_steps(tmp_path):
    model = servable(tmp_path, vocab_size=49152, initializer_range=0.02)
    shutil.copy(demo_model() / "chat_template.jinja", model)
    # Greedy texts of a random model go round in circles sooner or later, whatever the prompts say.
    sizes = ("--batch", "1", "--single", "2", "--output-tokens", "160", "--rounds", "1")
    figures = call("speculation", "--model", str(model), *sizes)
    (case,) = figures["batches"]
    off, on = case["off"], case["on"]
    assert (case["batch"], case["requests"]) == (1, 2)
    assert case["same_tokens"]
    assert off["output_tokens"] == on["output_tokens"] > 0
    assert off["drafted_tokens"] == 0 < on["drafted_tokens"]
    assert case["step_ratio"] == off["steps"] / on["steps"]
    assert case["rate_ratio"] == on["output_tokens_per_s"] / off["output_tokens_per_s"]
    table = engine_text.speculation_table(msgspec.convert(figures, SpeculationFigures)).splitlines()
    assert [line.count("|") for line in table[:3]] == [7] * 3


def test_linears_are_timed_in_every_format(files):
    _, model = files
    figures = call("linears", "--model", str(model), "--rounds", "1", "--threads", "1")
    assert (figures["threads"], figures["rounds"]) == (1, 1)
    cases = [(step["weights"], step["rows"]) for step in figures["steps"]]
    assert len(set(cases)) == len(cases) == 4 * 6
    assert all(step["ms"] > 0 for step in figures["steps"])


def test_larger_blocks_leave_more_empty():
    figures = call("blocks", "--requests", "60", "--rounds", "1", "--steps", "1")
    sizes = figures["sizes"]
    assert [size["block_size"] for size in sizes] == [8, 16, 32, 64, 128]
    wastes = [size["waste"] for size in sizes]
    assert wastes == sorted(wastes)
    assert wastes[0] > 0
    assert engine_text.blocks_table(msgspec.convert(figures, BlocksFigures).sizes).count("\n") == 6


async def test_determinism_finds_every_request_equal(served):
    settings = Config(
        model=ModelConfig(path=served, weights="plain"),
        engine=EngineConfig(max_running=6, prefix_cache=False, batch_invariant=True),
    )
    found = await determinism.matrix(determinism.requests(6, 40, 97), settings, ("preempted",))
    assert found == [ConditionFigures("preempted", greedy=3, sampled=3, bits=6, happened=found[0].happened)]
    assert found[0].happened > 0
    figures = DeterminismFigures(3, 3, 300, 240, 1, [WayFigures("plain-invariant", 9.0, found)])
    table = report.determinism_table(figures).splitlines()
    assert [line.count("|") for line in table[:4]] == [4] * 4
    assert "| 6; 6 to the bit |" in table[2]


async def test_a_start_is_timed_and_so_are_its_parts(tmp_path):
    model = servable(tmp_path, vocab_size=49152)
    shutil.copy(demo_model() / "chat_template.jinja", model)
    start = await startup.start(str(model), "Hi")
    assert 0 < start.broker_s < start.online_s < start.first_token_s
    worker = await asyncio.to_thread(timed, startup_parts.worker(str(model)))
    service = await asyncio.to_thread(timed, startup_parts.service(str(model)))
    assert min(*worker.values(), *service.values()) > 0
    table = engine_text.startup_text(StartupFigures(1, start, 9.0, worker, service)).splitlines()[2:]
    assert [line.count("|") for line in table] == [5] * (2 + len(worker))


def test_prefix_counts_what_is_computed_and_of_whom(served):
    sizes = ("--requests", "6", "--shared-tokens", "64", "--own-tokens", "10", "--output-tokens", "4", "--vocab", "97")
    figures = bench("prefix", "--model", served, *sizes, "--rounds", "1", "--prompts", "2")
    assert figures["uncached"]["computed_prompt_tokens"] == 6 * 74
    computed = figures["cached"]["computed_prompt_tokens"]
    # Those that begin before the first one's result is there find nothing of each other: the 4 that run at most.
    assert computed in [6 * 10 + 64 * at_once for at_once in (1, 2, 3, 4)]
    assert figures["saved"] == 1 - computed / 444
    isolation = figures["isolation"]
    assert [isolation[name]["computed_prompt_tokens"] for name in ("cold", "warm", "other")] == [74, 74 - 64, 74]
    assert "computes 74 of 74 tokens" in report.prefix_line(msgspec.convert(figures, PrefixFigures))


def test_scrape_counts_every_series():
    figures = call("scrape", "--tenants", "20", "--rounds", "1")
    assert figures["tenants"] == 20
    assert 300 < figures["series"] < 3000
    assert figures["bytes"] > 10 * figures["series"]
    assert figures["scrape_s"] <= figures["longest_scrape_s"]


def test_replicas_serve_together_with_workers_that_sleep(served):
    times = ("--warm-s", "1", "--seconds", "2", "--rounds", "1")
    figures = bench("replicas", "--model", served, "--step-ms", "100", "--output-tokens", "16", *times)
    assert figures["one_tokens_per_s"] > 0
    assert figures["two_tokens_per_s"] > 0
    assert len(figures["shares"]) == 2
    assert sum(figures["shares"]) == pytest.approx(1)
    assert min(figures["shares"]) > 0, "both had their part"


def test_structured_output_is_of_its_schema_and_its_cost_is_told(tmp_path):
    folder = save(tiny("llama", vocab_size=VOCAB, eos_token_id=EOS), tmp_path)
    TOKENIZER.save(str(folder / "tokenizer.json"))
    figures = bench("structured", "--model", str(folder), "--limit", "12", "--length", "60", "--rounds", "1")
    assert figures["schemas"] == 12
    assert figures["refused"] + figures["cut"] + figures["valid"] == 12
    assert (figures["invalid"], figures["lost"], figures["rows"]) == ([], [], 4)
    assert figures["valid"]
    assert min(figures["free_step_s"], figures["structured_step_s"]) > 0
