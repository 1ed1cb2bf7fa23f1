"""The command line: ``tokenbus serve | submit | embed | score | demo | top | bench | simulate``."""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from protocol.client import Client
from protocol.errors import RequestError
from protocol.request import Message, Request
from protocol.transport import TransportError
from scheduler import demo as demonstration
from scheduler import logs, service, sources
from scheduler.asking import connected, embed, score, show, text_or_stdin
from scheduler.config import Config, ConfigError
from scheduler.console.top import top
from scheduler.journal.entry import JournalError
from scheduler.mqtt.broker import BrokerFailed, BrokerNotFound
from scheduler.simulation.cli import simulate
from scheduler.worker import WorkerDied, WorkerRefused

logger = logging.getLogger(__name__)

#: What keeps a service from starting, told without a traceback.
_STARTING = (
    ConfigError,
    WorkerRefused,
    WorkerDied,
    JournalError,
    BrokerNotFound,
    BrokerFailed,
    TransportError,
    OSError,
)
#: Exit status of a service that was stopped before everything it had accepted was answered.
_UNANSWERED = 3
_BENCHMARKS = (
    "engine",
    "floor",
    "gpu",
    "peers",
    "serve",
    "accept",
    "ladder",
    "attention",
    "linears",
    "blocks",
    "contention",
    "structured",
    "slow_reader",
    "planning",
    "fairness",
    "prefix",
    "scale",
    "overlap",
    "overhead",
    "speculation",
    "adapters",
    "determinism",
    "startup",
    "tracing",
    "scrape",
    "replicas",
)


#: Reads the settings anew, from where they came at first. Raises ConfigError.
Read = Callable[[], Config]


def _reader(context: click.Context, file: Path | None, assignments: tuple[str, ...]) -> Read:
    flags = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"{assignment!r} must look like engine.max_running=32", context)
        flags[path] = value
    return lambda: sources.load(file, os.environ, flags)


def _settings(read: Read) -> Config:
    try:
        return read()
    except ConfigError as error:
        raise click.ClickException(str(error)) from None


_config_option = click.option(
    "--config", "file", type=click.Path(path_type=Path, dir_okay=False), help="TOML file with settings by section."
)
_set_option = click.option("--set", "assignments", multiple=True, metavar="SECTION.KEY=VALUE", help="One setting.")


@click.group()
@click.version_option(package_name="tokenbus")
def main() -> None:
    """Continuous batching for many tenants, over MQTT."""


@main.command()
@_config_option
@_set_option
@click.pass_context
def serve(context: click.Context, file: Path | None, assignments: tuple[str, ...]) -> None:
    """Serve a model until SIGTERM or Ctrl-C.

    The first signal drains: nothing new is taken up, what runs may finish for service.drain_s. A second one stops at once.
    SIGHUP reads the settings again and takes over the tenants and the limits; a change of any other needs a restart.
    Exit status: 0 when every accepted request was answered, or it was stopped while starting; 3 when some are left in the
    journal for the next start; 1 when it couldn't start or go on; 2 for wrong usage.
    """
    read = _reader(context, file, assignments)
    config = _settings(read)
    logs.configure(config.service.log_level)
    try:
        unanswered = asyncio.run(_serve(config, read))
    except* _STARTING as group:
        raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None
    context.exit(_UNANSWERED if unanswered else 0)


async def _serve(config: Config, read: Read) -> int:
    """Returns how many accepted requests are left unanswered."""
    left = 0
    serving = asyncio.current_task()
    assert serving is not None
    _on_signals(serving.cancel)  # while it starts there is nothing to drain
    hung_up = asyncio.Event()  # nor anything to reload into, but the file may be newer than what was read
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hung_up.set)
    with contextlib.suppress(asyncio.CancelledError):
        async with service.running(config) as running:
            told = asyncio.Semaphore(0)
            _on_signals(told.release)
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, _reload, running, read)
            if hung_up.is_set():
                _reload(running, read)
            await told.acquire()
            await _drain(running, told)
            left = running.unanswered
    return left


def _on_signals(act: Callable[[], object]) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, act)


def _reload(running: service.Service, read: Read) -> None:
    try:
        config = read()
    except ConfigError as error:
        logger.error("the settings were not reloaded, the old ones hold: %s", error)
    else:
        running.reload(config)


async def _drain(running: service.Service, told: asyncio.Semaphore) -> None:
    """Let it drain, unless told to stop once more."""
    waits: set[asyncio.Task[object]] = {
        asyncio.create_task(running.drain(), name="drain"),
        asyncio.create_task(told.acquire(), name="second signal"),
    }
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()


@main.command()
@click.argument("prompt", required=False, callback=text_or_stdin)
@click.option("--system", help="A system message before the prompt.")
@click.option("--max-tokens", type=int)
@click.option("--min-tokens", type=int)
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--min-p", type=float)
@click.option("--repetition-penalty", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--frequency-penalty", type=float)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True)
@click.option(
    "--n", type=int, help="So many answers, told when all have ended, with a line of three dashes between them."
)
@click.option("--best-of", type=int, help="Generate so many, and tell the likeliest.")
@click.option(
    "--logprobs", type=int, metavar="K", help="With --json: each token's log probability and the K likeliest."
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of streaming text.")
@connected
async def submit(
    client: Client,
    prompt: str,
    model: str,
    system: str | None,
    stop: tuple[str, ...],
    logprobs: int | None,
    as_json: bool,
    **fields: Any,
) -> None:
    """Send PROMPT (or stdin) as a chat message and stream the answer."""
    question = Message("user", prompt)
    messages = [question] if system is None else [Message("system", system), question]
    given = {name: value for name, value in fields.items() if value is not None}  # these options are named as fields
    request = Request(
        messages=messages,
        stop=list(stop) or None,
        logprobs=None if logprobs is None else True,
        top_logprobs=logprobs,
        stream=not as_json and not {"n", "best_of"} & given.keys(),
        **given,
    )
    stream = client.stream(request, model=model)
    async for chunk in stream:
        if request.stream:
            click.echo(chunk.text, nl=False)
    if as_json:
        show(stream.result)
    elif request.stream:
        click.echo()
    else:
        click.echo("\n---\n".join(stream.result.texts))


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_config_option
@_set_option
@click.pass_context
def demo(context: click.Context, file: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Three tenants chat with the demo model through an embedded broker; prints a summary."""
    config = _settings(_reader(context, file, ("metrics.port=0", *assignments)))
    logs.configure("warning")
    try:
        asyncio.run(demonstration.run(config, Console(stderr=as_json), as_json=as_json))
    except* (*_STARTING, RequestError) as group:
        raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None


@main.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.argument("name", type=click.Choice(_BENCHMARKS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> None:
    """Run a benchmark; ``tokenbus bench engine --help`` says more. They may import torch, so they get their own process."""
    raise SystemExit(subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *arguments]))


main.add_command(embed)
main.add_command(score)
main.add_command(simulate)
main.add_command(top)


if __name__ == "__main__":
    main()
