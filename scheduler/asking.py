"""What a tenant asks from the command line: ``tokenbus embed | score``, and what these have in common with ``submit``."""

import asyncio
import functools
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import click
import msgspec

from protocol.client import Client, RequestStopped
from protocol.errors import RequestError
from protocol.plan import Pooling
from protocol.prefill import EmbeddingRequest, ScoreRequest
from protocol.transport import TransportError
from scheduler.config import ConfigError, read_password

_OPTIONS = (
    click.option("--broker", default="mqtt://127.0.0.1:1883", show_default=True, help="URL of the broker."),
    click.option("--tenant", default="default", show_default=True),
    click.option("--username", help="The user to log in as.  [default: the tenant]"),
    click.option("--password-file", type=click.Path(path_type=Path)),
    click.option("--ca-file", type=click.Path(), help="Authorities to trust instead of the system's."),
    click.option("--cert-file", type=click.Path(), help="The tenant's own certificate."),
    click.option("--key-file", type=click.Path(), help="Its key, unencrypted."),
    click.option("--model", default="smollm2", show_default=True),
    click.option("--priority", type=int, default=0, help="Within the tenant a higher one goes first."),
    click.option("--deadline-ms", type=int, help="Milliseconds after which it ends, done or not."),
)


def connected(command: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A command that is given a connected ``client``; how to connect and what every request may say are options of it."""

    @functools.wraps(command)
    def run(
        broker: str,
        tenant: str,
        username: str | None,
        password_file: Path | None,
        ca_file: str | None,
        cert_file: str | None,
        key_file: str | None,
        **given: Any,
    ) -> None:
        try:
            client = Client(
                broker,
                tenant=tenant,
                username=username or tenant,
                password=None if password_file is None else read_password(password_file),
                ca_file=ca_file,
                cert_file=cert_file,
                key_file=key_file,
            )
            asyncio.run(_within(client, command, given))
        except (ConfigError, RequestError, RequestStopped, TransportError, TimeoutError, ValueError) as error:
            raise click.ClickException(str(error)) from None

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


async def _within(client: Client, command: Callable[..., Coroutine[Any, Any, None]], given: dict[str, Any]) -> None:
    async with client:
        await command(client=client, **given)


def text_or_stdin(_context: click.Context, _parameter: click.Parameter, given: str | None) -> str:
    """The callback of an argument: read before there is a connection that would have to wait."""
    return sys.stdin.read() if given is None or given == "-" else given


def texts_or_stdin(_context: click.Context, _parameter: click.Parameter, given: tuple[str, ...]) -> list[str]:
    """The same for several."""
    return list(given) or [sys.stdin.read()]


def show(whole: object) -> None:
    """As JSON to be read."""
    click.echo(msgspec.json.format(msgspec.json.encode(whole)))


@click.command()
@click.argument("texts", nargs=-1, callback=texts_or_stdin)
@click.option("--pooling", type=click.Choice(["last", "mean"]), default="last", show_default=True)
@click.option("--normalize/--no-normalize", default=True, show_default=True, help="Make each vector 1 long.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of a vector a line.")
@connected
async def embed(
    client: Client, texts: list[str], model: str, pooling: Pooling, normalize: bool, as_json: bool, **turn: Any
) -> None:
    """Embed each of TEXTS (or stdin)."""
    request = EmbeddingRequest(input=[*texts], pooling=pooling, normalize=normalize, **turn)
    result = await client.complete(request, model=model)
    if as_json:
        show(result)
    else:
        for vector in result.embeddings:
            click.echo(msgspec.json.encode(vector))


@click.command()
@click.argument("text", required=False, callback=text_or_stdin)
@click.option("--context", help="What comes before the text.")
@click.option("--logprobs", type=int, default=0, metavar="K", help="With --json: the K likeliest tokens in each place.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole result as JSON instead of the sum.")
@connected
async def score(
    client: Client, text: str, model: str, context: str | None, logprobs: int, as_json: bool, **turn: Any
) -> None:
    """Print the log probability of TEXT (or stdin)."""
    request = ScoreRequest(text=text, context=context, logprobs=logprobs, **turn)
    result = await client.complete(request, model=model)
    if as_json:
        show(result)
    else:
        click.echo(result.score.cumulative_logprob)
