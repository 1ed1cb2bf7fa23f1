"""What every benchmark's command line shares."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

_OPTIONS = (
    click.option("--model", default="smollm2", show_default=True, help="Directory of safetensors, or the demo model."),
    click.option("--max-running", default=64, show_default=True),
    click.option("--max-batch-tokens", default=256, show_default=True),
    click.option("--json", "as_json", is_flag=True, help="Print JSON."),
)

workload_option = click.option(
    "--workload", "file", required=True, type=click.Path(path_type=Path, exists=True, dir_okay=False)
)


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the common options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def show(figures: msgspec.Struct, as_json: bool, *, hidden: tuple[str, ...] = ()) -> None:
    """Print figures as JSON, or as a table without the ``hidden`` long ones."""
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(figures)).decode())
        return
    table = Table(show_header=False)
    for name, value in msgspec.structs.asdict(figures).items():
        if name not in hidden:
            table.add_row(name, f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)
