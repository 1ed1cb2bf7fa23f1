import pytest

from benchmarks import report


@pytest.mark.parametrize("page", report.PAGES)
def test_the_pages_hold_the_measured_figures(page):
    assert report.render(page) == (report.ROOT / page).read_text()
