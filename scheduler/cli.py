"""The command line: ``tokenbus serve | submit | demo | bench``."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import msgspec
from rich.console import Console

from protocol.client import Client, RequestCancelled
from protocol.errors import RequestError
from protocol.request import Message, Request
from protocol.transport import TransportError
from scheduler import config as configuration
from scheduler import demo as demonstration
from scheduler import logs, service
from scheduler.config import Config, ConfigError
from scheduler.mqtt.broker import BrokerFailed, BrokerNotFound
from scheduler.worker import WorkerDied, WorkerRefused

#: What keeps a service from starting, told without a traceback.
_STARTING = (WorkerRefused, WorkerDied, BrokerNotFound, BrokerFailed, TransportError, OSError)
_BENCHMARKS = ("engine", "serve", "ladder", "attention", "contention")


def _settings(context: click.Context, file: Path | None, assignments: tuple[str, ...]) -> Config:
    flags = {}
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals:
            raise click.BadParameter(f"{assignment!r} must look like engine.max_running=32", context)
        flags[path] = value
    try:
        return configuration.load(file, os.environ, flags)
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
    """Serve a model until SIGTERM or Ctrl-C."""
    config = _settings(context, file, assignments)
    logs.configure(config.service.log_level)
    try:
        asyncio.run(_serve(config))
    except* _STARTING as group:
        raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None


async def _serve(config: Config) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with service.running(config):
        await stop.wait()


@main.command()
@click.argument("prompt", required=False)
@click.option("--broker", default="mqtt://127.0.0.1:1883", show_default=True, help="URL of the broker.")
@click.option("--tenant", default="default", show_default=True)
@click.option("--password-file", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--model", default="smollm2", show_default=True)
@click.option("--system", help="A system message before the prompt.")
@click.option("--max-tokens", type=int)
@click.option("--temperature", type=float)
@click.option("--top-p", type=float)
@click.option("--top-k", type=int)
@click.option("--seed", type=int)
@click.option("--stop", multiple=True)
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of streaming text.")
def submit(
    prompt: str | None,
    broker: str,
    tenant: str,
    password_file: Path | None,
    model: str,
    system: str | None,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    stop: tuple[str, ...],
    as_json: bool,
) -> None:
    """Send PROMPT (or stdin) as a chat message and stream the answer."""
    text = sys.stdin.read() if prompt is None or prompt == "-" else prompt
    messages = [Message("user", text)] if system is None else [Message("system", system), Message("user", text)]
    request = Request(
        messages=messages,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=list(stop) or None,
        stream=not as_json,
    )
    password = None if password_file is None else password_file.read_text().strip()
    try:
        asyncio.run(_submit(Client(broker, tenant=tenant, username=tenant, password=password), request, model, as_json))
    except (RequestError, RequestCancelled, TransportError, TimeoutError, ValueError) as error:
        raise click.ClickException(str(error)) from None


async def _submit(client: Client, request: Request, model: str, as_json: bool) -> None:
    async with client:
        stream = client.stream(request, model=model)
        async for chunk in stream:
            if not as_json:
                click.echo(chunk.text, nl=False)
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(stream.result)))
        else:
            click.echo()


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@_config_option
@_set_option
@click.pass_context
def demo(context: click.Context, file: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Three tenants chat with the demo model through an embedded broker; prints a summary."""
    config = _settings(context, file, ("metrics.port=0", *assignments))
    logs.configure("warning")
    try:
        asyncio.run(demonstration.run(config, Console(stderr=as_json), as_json=as_json))
    except* (*_STARTING, RequestError) as group:
        raise click.ClickException("; ".join(str(error) for error in group.exceptions)) from None


@main.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("name", type=click.Choice(_BENCHMARKS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(name: str, arguments: tuple[str, ...]) -> None:
    """Run a benchmark; ``tokenbus bench engine --help`` says more. They may import torch, so they get their own process."""
    raise SystemExit(subprocess.call([sys.executable, "-m", f"benchmarks.{name}", *arguments]))


if __name__ == "__main__":
    main()
