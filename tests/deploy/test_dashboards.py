"""The dashboards are what their script writes, and hold together."""

import json

import pytest

from deploy.grafana import dashboards


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_the_files_are_current(name: str) -> None:
    assert json.loads((dashboards.FOLDER / f"{name}.json").read_text()) == dashboards.dashboard(name)


def test_no_other_files_are_left() -> None:
    assert {file.stem for file in dashboards.FOLDER.iterdir()} == set(dashboards.DASHBOARDS)


@pytest.mark.parametrize("name", dashboards.DASHBOARDS)
def test_panels_lie_side_by_side(name: str) -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboards.dashboard(name)["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells
