"""Who asks for what, and when."""

from collections import Counter
from itertools import islice, pairwise, takewhile
from random import Random
from statistics import mean

import pytest

from scheduler.simulation import arrivals, synthetic, trace
from scheduler.simulation.arrivals import Arrival

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


@pytest.fixture
def write(tmp_path):
    def write(*lines: str):
        file = tmp_path / "trace.csv"
        file.write_text(HEADER + "".join(f"{line}\n" for line in lines))
        return file

    return write


def test_a_trace_begins_at_0_whatever_its_clock_says(write):
    file = write("2023-11-16 23:59:59.6805900,374,44", "2023-11-17 00:00:00.9305900,396,109")
    assert list(trace.read(file)) == [(0.0, 374, 44), (1.25, 396, 109)]


def test_a_trace_can_be_hurried_and_repeated(write):
    file = write("2023-11-16 18:00:00,1,2", "2023-11-16 18:00:02,3,4", "2023-11-16 18:00:08,5,6")
    played = list(trace.read(file, speed=2, repeat=2))
    assert [at for at, _, _ in played] == [0, 1, 4, 6, 7, 10], "after the last one, the mean gap of 2 s"
    assert [(prompt, output) for _, prompt, output in played[3:]] == [(1, 2), (3, 4), (5, 6)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("2023-11-16 18:00:01,5", "2 fields instead of 3"),
        ("2023-11-16 18:00:01,5,x", "'x'"),
        ("yesterday,5,6", "'yesterday'"),
        ("2023-11-16 18:00:01,0,6", "at least one token in and one out, not 0 and 6"),
        ("2023-11-16 17:59:59,5,6", "2023-11-16 17:59:59 is before the line above it"),
        ("2023-11-16 18:00:01+00:00,5,6", "offset"),
    ],
)
def test_a_bad_line_is_named_by_its_number(write, line, said):
    file = write("2023-11-16 18:00:00,1,2", line)
    with pytest.raises(trace.TraceError, match=r"trace.csv, line 3: ") as error:
        list(trace.read(file))
    assert said in str(error.value)


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("time,tokens\n1,2\n")
    with pytest.raises(trace.TraceError, match="line 1: must be TIMESTAMP,ContextTokens,GeneratedTokens"):
        list(trace.read(tmp_path / "other.csv"))


def test_rates_follow_each_other_and_0_is_silence():
    times = synthetic.shifting([2, 0, 1], 3, synthetic.constant)
    assert list(synthetic.until(times, 12)) == [0, 0.5, 1, 1.5, 2, 2.5, 6, 7, 8, 9, 9.5, 10, 10.5, 11, 11.5]
    assert list(synthetic.phases([(2, synthetic.constant(1, 0.5)), (1, synthetic.constant(4))])) == [
        *(0.5, 1.5),
        *(2, 2.25, 2.5, 2.75),
    ]


def test_a_poisson_process_has_its_rate_and_is_as_uneven_as_one():
    times = list(islice(synthetic.poisson(4, Random(1)), 20_000))
    gaps = [after - before for before, after in pairwise(times)]
    assert mean(gaps) == pytest.approx(1 / 4, rel=0.03)
    assert mean(gap**2 for gap in gaps) == pytest.approx(2 / 4**2, rel=0.06)


@pytest.mark.parametrize(
    ("text", "low", "high", "average"),
    [
        ("256", 256, 256, 256),
        ("16-48", 16, 48, 32),
        ("geometric:64", 1, 10_000, 64),
        ("lognormal:128:0.8", 1, 100_000, 128),
    ],
)
def test_lengths_have_their_bounds_and_mean(text, low, high, average):
    draw = synthetic.lengths(text, Random(2))
    drawn = [draw() for _ in range(20_000)]
    assert low <= min(drawn) <= max(drawn) <= high
    assert mean(drawn) == pytest.approx(average, rel=0.03)


@pytest.mark.parametrize("text", ["", "0", "9-3", "geometric:1", "geometric:nan", "lognormal:9", "zipf:3", "1-2-3"])
def test_other_lengths_are_refused(text):
    with pytest.raises(ValueError, match="must look like 256, 16-512"):
        synthetic.lengths(text, Random(3))


def test_tenants_take_turns_or_are_drawn_by_zipf():
    demands = [(float(at), 8, 4) for at in range(6000)]
    turns = list(arrivals.assign(demands, arrivals.round_robin(3)))
    assert Counter(arrival.tenant for arrival in turns) == {"t0": 2000, "t1": 2000, "t2": 2000}
    drawn = Counter(each.tenant for each in arrivals.assign(demands, arrivals.zipf(3, 1.0, Random(4))))
    for tenant, share in {"t0": 6 / 11, "t1": 3 / 11, "t2": 2 / 11}.items():
        assert drawn[tenant] / 6000 == pytest.approx(share, abs=0.02)


def test_what_is_asked_for_is_never_less_than_what_comes():
    asked = arrivals.assign([(0.0, 8, 4), (1.0, 8, 40)], lambda: "a", max_tokens=10)
    assert list(asked) == [Arrival(0.0, "a", 8, 4, 10), Arrival(1.0, "a", 8, 40, 40)]


def test_endless_streams_are_merged_in_time_order():
    def client(name: str, rate: float):
        return (Arrival(at, name, 1, 1, 1) for at in synthetic.constant(rate))

    merged = takewhile(lambda each: each.at < 2, arrivals.merge(client("a", 1), client("b", 2)))
    assert [(each.at, each.tenant) for each in merged] == [
        (0, "a"),
        (0, "b"),
        (0.5, "b"),
        (1, "a"),
        (1, "b"),
        (1.5, "b"),
    ]
