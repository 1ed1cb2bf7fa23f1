"""The benchmarks run, count right and agree with each other; their figures are looked at by people, not by tests."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from benchmarks.workload import load, mixed
from tests.workers.models import save, tiny
from workers.weights import demo_model

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    workload = mixed(6, prompt=(3, 12), output=(2, 9), seed=2, vocab=97)
    (folder / "workload.json").write_bytes(msgspec.json.encode(workload))
    return folder / "workload.json", save(tiny("llama"), folder / "model")


def bench(name: str, *arguments: str) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "scheduler.cli", "bench", name, "--json", "--max-running", "4", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_engine_and_ladder_count_the_same_tokens(files, tmp_path):
    workload, model = files
    wanted = {str(item.id): item.max_tokens for item in load(workload).requests}
    engine = bench("engine", "--workload", str(workload), "--model", str(model))
    assert {id: len(tokens) for id, tokens in engine["token_ids"].items()} == wanted
    assert engine["output_tokens"] == sum(wanted.values())
    assert engine["prompt_tokens"] == sum(len(item.prompt_token_ids) for item in load(workload).requests)
    assert engine["steps"] >= max(wanted.values())
    assert 1 < engine["mean_running"] <= 4
    picture = tmp_path / "ladder.png"
    ladder = bench(
        "ladder", "--workload", str(workload), "--model", str(model), "--slow-first", "2", "--plot", str(picture)
    )
    assert [rung["name"] for rung in ladder["rungs"]] == ["naive", "cached", "static", "continuous"]
    assert [rung["requests"] for rung in ladder["rungs"]] == [2, 2, 6, 6]
    assert all(rung["equal_tokens"] == 1 for rung in ladder["rungs"])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_floor_is_part_of_the_steps(files):
    workload, model = files
    figures = bench("engine", "--workload", str(workload), "--model", str(model), "--weights", "int8", "--floor")
    assert 0 < figures["floor_ratio"] < 1


def test_slow_reader_measures_both_ways(files):
    _, model = files
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, model)
    sizes = ("--rounds", "1", "--flood", "4", "--tokens", "8", "--vocab", "97")
    figures = bench("slow_reader", "--model", str(model), *sizes)
    assert figures["rounds"] == 1
    assert figures["p99_ratio"] == figures["stopped_s"]["p99"] / figures["reading_s"]["p99"] > 0
