"""What a step costs, and where that comes from."""

from random import Random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.plan import Row, Work
from scheduler.core.draft import Draft
from scheduler.simulation import models
from scheduler.simulation.cost import CostError, CostModel
from scheduler.simulation.fit import TracedStep, fit

TRUE = CostModel(name="", origin="", step_s=0.02, row_s=3e-4, token_s=2e-3, context_s=0.0, attended_s=1e-6)


def steps(count: int, noise: float, model: CostModel = TRUE) -> list[TracedStep]:
    random = Random(5)
    made = []
    for _ in range(count):
        decodes, prefill = random.randint(0, 60), random.randint(1, 200)
        context = decodes * random.randint(10, 500) + prefill
        work = Work(decodes + 1, decodes + prefill, context, context + prefill * (prefill - 1) // 2)
        seconds = model.seconds(work) * random.uniform(1 - noise, 1 + noise)
        made.append(TracedStep(work, prefill, decodes, seconds * 0.9, seconds * 0.1))
    return made


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 40)), min_size=1, max_size=8))
def test_work_counts_what_attention_sees(shapes):
    decodes = [start for start, length in shapes if length == 1]
    rows = [Row(slot, start, length, [], True) for slot, (start, length) in enumerate(shapes) if length > 1]
    seen = [[position + 1 for position in range(start, start + length)] for start, length in shapes]
    draft = Draft(0, 0, decodes=[0] * len(decodes), rows=rows, context=sum(start + 1 for start in decodes))
    assert draft.work == Work(
        rows=len(shapes),
        tokens=sum(length for _, length in shapes),
        context=sum(max(row) for row in seen),
        attended=sum(map(sum, seen)),
    )


def test_a_fit_finds_the_coefficients_behind_the_steps():
    model = fit(steps(300, noise=0.0), name="x", origin="y")
    for term in ("step_s", "row_s", "token_s", "attended_s"):
        assert getattr(model, term) == pytest.approx(getattr(TRUE, term), rel=1e-4), term
    assert model.context_s == pytest.approx(0, abs=1e-9)
    assert model.quality.r_squared == pytest.approx(1)


def test_its_quality_is_that_of_steps_it_was_not_fitted_to():
    slow = [
        msgspec.structs.replace(step, seconds=step.seconds * (2 if number % 5 == 4 else 1), gap_s=0.0)
        for number, step in enumerate(steps(500, noise=0.0))
    ]
    assert fit(slow, name="x", origin="y").quality.median_error == pytest.approx(0.5)
    quality = fit(steps(500, noise=0.2), name="x", origin="y").quality
    assert (quality.steps, quality.held_out) == (500, 100)
    assert quality.median_error == pytest.approx(0.1, abs=0.03), "uniform within 20%"
    assert quality.p95_error == pytest.approx(0.19, abs=0.05)
    assert 0.7 < quality.r_squared < 0.99
    assert abs(quality.total_error) < 0.05


def test_no_coefficient_is_negative():
    random = Random(6)
    falling = [
        TracedStep(Work(rows, rows, 10 * rows, 10 * rows), 0, rows, 1 - rows / 100 + random.uniform(0, 0.01), 0.0)
        for rows in (random.randint(1, 60) for _ in range(100))
    ]
    model = fit(falling, name="x", origin="y")
    assert model.step_s > 0
    assert (model.row_s, model.token_s, model.context_s, model.attended_s) == (0, 0, 0, 0)


def test_too_few_steps_are_refused():
    with pytest.raises(CostError, match="20 steps are too few to fit 5 terms: 50 at least"):
        fit(steps(20, noise=0), name="x", origin="y")


def test_the_derived_machine_is_near_the_one_that_the_papers_authors_measured():
    """VTC-artifact, fair_bench/cost_profile.json: prefill of 512 tokens; 256 decode steps of 19 rows from 256 positions on."""
    model = models.load("a10g-llama-2-7b")
    prefill = model.seconds(Work(19, 19 * 512, 19 * 512, 19 * 512 * 513 // 2)) / 19
    decode = model.seconds(Work(19, 19, 19 * 384, 19 * 384))
    assert 0.75 < prefill / 0.10995 < 1
    assert 0.75 < decode / (0.50112 * 19 / 256) < 1


@pytest.mark.parametrize("name", models.names())
def test_what_comes_with_the_package_says_where_it_is_from(name):
    model = models.load(name)
    assert model.name == name
    assert ("not measured" in model.origin) == (model.quality is None)


def test_a_model_that_is_not_there_is_named_with_those_that_are(tmp_path):
    with pytest.raises(CostError, match=r"no cost model 'h100'.*a10g-llama-2-7b"):
        models.load("h100")
    (tmp_path / "broken.json").write_text('{"name": 3}')
    with pytest.raises(CostError, match=r"broken.json holds no cost model"):
        models.load(str(tmp_path / "broken.json"))
