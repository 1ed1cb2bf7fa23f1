"""Pictures of simulated runs. matplotlib is an extra, imported when a picture is wanted."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scheduler.simulation.figures import Percentiles
from scheduler.simulation.run import Outcome

#: More tenants than this wouldn't be told apart.
_MOST_TENANTS = 16


class PictureError(Exception):
    """No picture can be drawn; the text says what is missing."""


def draw(runs: Mapping[str, Sequence[Outcome]], file: Path) -> None:
    """A row for each entry, of runs on the same arrivals: the percentiles by tenant, and the service gap over time.

    Raises PictureError, OSError.
    """
    try:
        import matplotlib as mpl  # noqa: PLC0415 - an extra

        mpl.use("Agg")
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError:
        raise PictureError("pictures need matplotlib: pip install 'tokenbus[bench]'") from None
    figure, axes = plt.subplots(len(runs), 2, figsize=(12, 3.5 * len(runs)), squeeze=False)
    for (title, outcomes), (left, right) in zip(runs.items(), axes, strict=True):
        _draw_percentiles(left, outcomes)
        _draw_gap(right, outcomes)
        left.set_title(title)
    figure.tight_layout()
    try:
        figure.savefig(file, dpi=130)
    except ValueError as error:
        raise PictureError(str(error)) from None
    finally:
        plt.close(figure)


def _draw_percentiles(axes: Any, outcomes: Sequence[Outcome]) -> None:
    """A mark at the median of the time to the first token, a line up to p99, with a tick at p95."""
    names = sorted(outcomes[0].figures.tenants)[:_MOST_TENANTS]
    width = 0.8 / len(outcomes)
    for number, outcome in enumerate(outcomes):
        known = {
            index: times
            for index, name in enumerate(names)
            if isinstance(times := outcome.figures.tenants[name].ttft_s, Percentiles)
        }
        places = [index + (number - (len(outcomes) - 1) / 2) * width for index in known]
        color = f"C{number}"
        axes.vlines(places, [t.p50 for t in known.values()], [t.p99 for t in known.values()], color=color)
        axes.plot(places, [t.p95 for t in known.values()], "_", color=color)
        axes.plot(places, [t.p50 for t in known.values()], "o", color=color, label=outcome.figures.policy)
    axes.set_xticks(range(len(names)), names, rotation=45 if len(names) > 4 else 0)
    axes.set_yscale("log")
    axes.set_ylabel("time to first token (s): p50, p95, p99")
    axes.legend()


def _draw_gap(axes: Any, outcomes: Sequence[Outcome]) -> None:
    for number, outcome in enumerate(outcomes):
        times = [at for at, _ in outcome.gap_history]
        axes.plot(times, [gap for _, gap in outcome.gap_history], color=f"C{number}", label=outcome.figures.policy)
    axes.axhline(outcomes[0].figures.service_gap_bound, color="black", linestyle="--", label="bound")
    axes.set_yscale("symlog", linthresh=1000)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("service apart while both wait")
    axes.legend()
