"""The planning figures on a small trace, and what is written about them."""

import subprocess
import sys

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import scale, scale_text
from benchmarks.accept import AcceptFigures
from benchmarks.planning import Case, Micros, PlanningFigures
from benchmarks.scale import ScaleFigures
from scheduler.core import policies

TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2023-11-16 18:15:{second:02}.5000000,{300 + 70 * (second % 7)},{40 + 11 * (second % 9)}\n" for second in range(60)
)


def run(*arguments: str, status: int = 0) -> str:
    result = CliRunner().invoke(scale.main, arguments)
    assert result.exit_code == status, result.output
    return result.stdout if status == 0 else result.output


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("scale") / "trace.csv"
    file.write_text(TRACE)
    return str(file)


@pytest.fixture(scope="module")
def figures(file) -> ScaleFigures:
    shown = run("--trace", file, "--requests", "50", "--at-once", "40", "--pace", "8", "--pace", "1", "--json")
    return msgspec.json.decode(shown, type=ScaleFigures)


def test_hurried_requests_need_more_replicas(figures):
    slow, fast = figures.paces
    assert (slow.pace, fast.pace) == (1, 8)
    assert fast.requests_per_s == pytest.approx(8 * slow.requests_per_s)
    assert slow.figures.needed < fast.figures.needed
    assert fast.figures.tried[0].replicas == slow.figures.needed, "fewer were known to be too few"


def test_every_policy_has_the_same_work(figures):
    assert list(figures.shared) == [run.policy for run in figures.at_once] == list(policies.NAMES)
    assert {fleet.replicas for fleet in figures.shared.values()} == {figures.paces[0].figures.needed}
    assert {fleet.output_tokens for fleet in figures.shared.values()} == {50 * figures.load.output_tokens}
    assert {run.requests for run in figures.at_once} == {40}
    # Reserved for 1000 tokens and used for a hundred.
    waste = {run.policy: run.kv_waste_ratio for run in figures.at_once}
    assert waste["prefill_first"] < 0.04
    assert waste["orca"] > 0.3


def test_the_tables_say_what_was_simulated(figures):
    replicas, tried, shared, at_once, directions = (
        write(figures).splitlines()
        for write in (
            scale_text.replicas_table,
            scale_text.tried_table,
            scale_text.shared_table,
            scale_text.at_once_table,
            scale_text.directions_table,
        )
    )
    for table, rows in ((replicas, 2), (tried, len(figures.paces[0].figures.tried)), (shared, 5), (at_once, 5)):
        assert [line.count("|") for line in table] == [table[0].count("|")] * (2 + rows)
    assert f"| **{figures.paces[1].figures.needed}** |" in replicas[-1]
    assert "TTFT p99 ≤ 2 s" in replicas[0]
    by_policy = {run.policy: run for run in figures.at_once}
    assert f"{by_policy['orca'].kv_waste_ratio:.1%}" in directions[3]
    assert f"bound {by_policy['fair'].service_gap_bound:,.0f}" in directions[5]
    assert "The first 50 requests of `trace.csv`" in scale_text.load_text(figures)


def test_what_a_scheduler_carries_follows_from_what_a_step_costs_it(figures):
    quick, slow = (Micros(micros / 2, micros) for micros in (100, 500))
    planning = PlanningFigures(
        256,
        1,
        1,
        [
            Case("fair", 100, 1_000, quick, quick, quick),
            Case("fair", 10_000, 100_000, quick, quick, slow),
            Case("chunked", 10_000, 100_000, quick, quick, quick),
        ],
    )
    text = scale_text.carry_text(figures, planning, AcceptFigures(16, 4000, 3, 2000.0, 0.0, 0.0))
    assert "takes 250 µs (p99 500 µs) with 256 running and 100,000 waiting, of 10,000 tenants" in text
    assert "| none at all: the scheduler alone | 4,000 | 1,024,000 | 100.0% |" in text
    assert "| 1 ms | 1,000 | 256,000 | 25.0% |" in text
    assert f"work for {2000 * figures.load.output_tokens:,.0f} tokens/s" in text


def test_it_is_shown_as_tables_too(file):
    command = [
        sys.executable,
        "-m",
        "scheduler.cli",
        "bench",
        "scale",
        "--trace",
        file,
        "--requests",
        "20",
        "--pace",
        "1",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "1x the pace" in shown
    assert "needed" in shown


def test_what_can_not_be_planned_is_said_in_a_line(file, tmp_path):
    (tmp_path / "one.csv").write_text(TRACE[: TRACE.index("\n", 50) + 1])
    assert "no two requests at different times" in run("--trace", str(tmp_path / "one.csv"), status=1)
    (tmp_path / "other.csv").write_text("time\n")
    assert "line 1: must be TIMESTAMP" in run("--trace", str(tmp_path / "other.csv"), status=1)
    impossible = ("--requests", "3", "--ttft-p99", "0.001")
    assert "at 1 times the pace, 3 replicas don't hold the target" in run("--trace", file, *impossible, status=1)
