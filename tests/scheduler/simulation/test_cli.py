"""The commands: equal bytes for equal seeds, files, pictures, and errors without a traceback."""

import json
import sys

import msgspec
import pytest
from click.testing import CliRunner

from scheduler.cli import main
from scheduler.core import policies
from tests.scheduler.simulation.test_cost import steps

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5000000,{20 + 7 * second},{5 + second % 9}\n" for second in range(40)
)


def simulate(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(main, ["simulate", *arguments])
    assert result.exit_code == status, result.output
    return result.output


@pytest.fixture
def trace(tmp_path) -> str:
    (tmp_path / "trace.csv").write_text(TRACE)
    return str(tmp_path / "trace.csv")


MADE_UP = ("--json", "--requests", "60", "--rate", "4,0", "--period", "5", "--tenants", "5", "--zipf", "1.2")
LENGTHS = ("--prompt-tokens", "lognormal:60:0.7", "--output-tokens", "geometric:20", "--prefix-tokens", "16")


def test_equal_seeds_give_equal_bytes_and_others_do_not():
    first, again, other = (simulate(*MADE_UP, *LENGTHS, "--seed", seed) for seed in ("7", "7", "8"))
    assert first == again != other
    assert json.loads(first)["requests"] == 60


def test_a_trace_file_is_replayed_and_its_figures_written(trace, tmp_path):
    shown = simulate(
        "--trace", trace, "--tenants", "2", "--weight", "t1=2", "--output", str(tmp_path / "out.json"), "--json"
    )
    figures = json.loads((tmp_path / "out.json").read_text())
    assert figures == json.loads(shown)
    assert figures["output_tokens"] == sum(5 + second % 9 for second in range(40))
    assert {"policy", "seconds", "output_tokens_per_s", "kv_waste_ratio", "preemptions"} < set(figures)
    assert set(figures["ttft_s"]) == set(figures["tenants"]["t1"]["e2e_s"]) == {"p50", "p95", "p99"}


def test_all_policies_are_compared_on_the_same_requests(trace):
    compared = json.loads(simulate("--compare", "--trace", trace, "--speed", "20", "--max-running", "4", "--json"))
    assert [run["policy"] for run in compared["runs"]] == list(policies.NAMES)
    assert {run["output_tokens"] for run in compared["runs"]} == {sum(5 + second % 9 for second in range(40))}
    assert compared["throughput_over_static"]["static"] == 1
    assert compared["throughput_over_static"]["chunked"] > 1


def test_tables_name_what_they_show(trace):
    assert "fair" in simulate("--trace", trace)
    compared = simulate("--trace", trace, "--compare")
    assert all(name in compared for name in ("orca", "static", "KV"))


def test_the_replicas_that_a_trace_needs_are_counted(trace, tmp_path):
    asked = ("replicas", "--trace", trace, "--speed", "20", "--max-running", "4")
    file = tmp_path / "out.json"
    shown = simulate(*asked, "--ttft-p99", "2", "--itl-p99", "5", "--output", str(file), "--json")
    figures = json.loads(shown)
    assert figures == json.loads(file.read_text())
    assert figures["targets"] == {"ttft_p99_s": 2, "itl_p99_s": 5}
    needed = figures["needed"]
    assert needed > 1
    held = {fleet["replicas"]: fleet["ttft_s"]["p99"] <= 2 for fleet in figures["tried"]}
    assert (held[needed], held[needed - 1]) == (True, False)
    assert f"TTFT p99 2 s, ITL p99 5 s: {needed} needed" in simulate(*asked, "--ttft-p99", "2", "--itl-p99", "5")


def test_a_target_that_no_number_of_replicas_holds_is_said_to_be_one(trace):
    asked = ("replicas", "--trace", trace, "--requests", "4", "--ttft-p99", "0.001")
    assert "no number of replicas holds it" in " ".join(simulate(*asked).split())
    assert "not held by 3 replicas, the most that were allowed" in " ".join(simulate(*asked, "--most", "3").split())
    assert json.loads(simulate(*asked, "--json"))["needed"] is None


def test_pictures_are_drawn(trace, tmp_path):
    simulate("--trace", trace, "--compare", "--tenants", "3", "--plot", str(tmp_path / "runs.png"))
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(trace, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = simulate("--trace", trace, "--plot", str(tmp_path / "runs.png"), status=1)
    assert "Error: pictures need matplotlib: pip install 'tokenbus[bench]'" in said


def test_a_model_is_fitted_and_used(trace, tmp_path):
    measured, model = tmp_path / "steps.jsonl", tmp_path / "model.json"
    measured.write_bytes(msgspec.json.Encoder().encode_lines(steps(200, noise=0.1)))
    said = simulate("fit", str(measured), "--name", "here", "--origin", "this machine", "--output", str(model))
    assert "held out" in said
    assert json.loads(model.read_text())["origin"] == "this machine"
    figures = json.loads(simulate("--trace", trace, "--cost", str(model), "--json"))
    assert figures["cost_model"] == "here"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--trace", "nowhere.csv"), "nowhere.csv"),
        (("--rate", "0"), "--rate 0 must be requests per second"),
        (("--rate", "fast"), "--rate fast must be requests per second"),
        (("--prompt-tokens", "many"), "'many' must look like 256"),
        (("--weight", "t0"), "--weight t0 must look like t0=2"),
        (("--tenants", "0"), "`$.tenants`"),
        (("--max-running", "300"), "max_batch_tokens (256) must be at least max_running (300)"),
        (("--cost", "nothing"), "no cost model 'nothing'"),
        (("fit", "nowhere.jsonl"), "nowhere.jsonl"),
        (("replicas", "--ttft-p99", "1", "--trace", "nowhere.csv"), "nowhere.csv"),
        (("replicas", "--ttft-p99", "0"), "`$.ttft_p99_s`"),
    ],
)
def test_what_can_not_be_done_is_said_in_a_line(arguments, said):
    output = simulate(*arguments, status=1)
    assert output.startswith("Error: ")
    assert said in output
