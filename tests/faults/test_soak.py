"""The short soak; ``python -m tests.faults.soak --minutes 20`` is the long one."""

import pytest

from tests.faults.soak import FAULTS, run

pytestmark = pytest.mark.timeout(240)


async def test_a_minute_of_mixed_load_while_everything_is_killed(tmp_path, model):
    figures = await run(tmp_path, model, minutes=1)
    assert figures.lost == 0
    assert figures.wrong_texts == 0
    assert set(figures.faults) == set(FAULTS)
    assert set(figures.outcomes) == {"length", "cancelled", "invalid_request"}
    assert figures.outcomes["length"] > 100
