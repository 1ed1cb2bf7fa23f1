"""``tokenbus top``: the console's numbers in a terminal."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import click
import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, CookieJar, TCPConnector
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from scheduler.config import ConfigError, read_password
from scheduler.console.snapshot import Phase, RequestRow, Snapshot, Stage, TenantRow, decode

_TIMEOUT = ClientTimeout(total=10)
#: What the timelines show, up to now.
_SPAN_S = 60.0
_BAR_CELLS = 30
_LINE_CELLS = 48
_MOST_LINES = 20
_COLOURS: dict[Stage, str] = {"waiting": "bright_black", "prefill": "blue", "decode": "green", "preempted": "yellow"}


class ConsoleError(Exception):
    """The console can't be asked, or doesn't answer with numbers; the text says why."""


class Connection:
    """A console over HTTP; use as ``async with connected(...) as connection``."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self._base = f"{url.rstrip('/')}/console"

    async def log_in(self, password: str) -> None:
        """Raises ConsoleError."""
        await self._ask("POST", "login", msgspec.json.encode({"password": password}))

    async def snapshot(self) -> Snapshot:
        """Raises ConsoleError."""
        try:
            return decode(await self._ask("GET", "snapshot"))
        except msgspec.DecodeError as error:
            raise ConsoleError(f"{self._base}: another version's console: {error}") from None

    async def _ask(self, method: str, path: str, body: bytes | None = None) -> bytes:
        try:
            async with self._session.request(method, f"{self._base}/{path}", data=body) as answer:
                content = await answer.read()
        except (ClientError, TimeoutError, ValueError) as error:
            raise ConsoleError(f"{self._base}: {error or 'no answer in time'}") from None
        if answer.status == 404:
            raise ConsoleError(f"{self._base}: there is no console; away from loopback it needs console.password_file")
        if not answer.ok:
            raise ConsoleError(f"{self._base}: {content.decode(errors='replace') or answer.reason}")
        return content


@asynccontextmanager
async def connected(url: str, password: str | None = None, ca_file: str | None = None) -> AsyncIterator[Connection]:
    """Logged in if there is a password. Raises ConsoleError."""
    try:
        trust = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise ConsoleError(f"{ca_file} can't be read: {error}") from None
    # Cookies of hosts without a name too: that is where consoles are.
    jar = CookieJar(unsafe=True)
    async with ClientSession(connector=TCPConnector(ssl=trust), cookie_jar=jar, timeout=_TIMEOUT) as session:
        connection = Connection(session, url)
        if password is not None:
            await connection.log_in(password)
        yield connection


@click.command()
@click.option("--url", default="http://127.0.0.1:9464", show_default=True, help="Where /metrics is served.")
@click.option("--password-file", type=click.Path(path_type=Path), help="The console's password.")
@click.option("--ca-file", type=click.Path(), help="Authorities to trust instead of the system's.")
@click.option("--interval", default=1.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds.")
@click.option("--once", is_flag=True, help="Print one screen and end.")
@click.option("--json", "as_json", is_flag=True, help="Print one snapshot as JSON and end.")
def top(url: str, password_file: Path | None, ca_file: str | None, interval: float, once: bool, as_json: bool) -> None:
    """Watch a running service: batch, queue, KV cache, tenants and requests. Ctrl-C ends it."""
    try:
        password = None if password_file is None else read_password(password_file)
        with suppress(KeyboardInterrupt):
            asyncio.run(_top(url, password, ca_file, interval, once=once, as_json=as_json))
    except (ConfigError, ConsoleError) as error:
        raise click.ClickException(str(error)) from None


async def _top(
    url: str, password: str | None, ca_file: str | None, interval: float, *, once: bool, as_json: bool
) -> None:
    async with connected(url, password, ca_file) as connection:
        snapshot = await connection.snapshot()
        if as_json:
            click.echo(msgspec.json.format(msgspec.json.encode(snapshot)))
        elif once:
            Console().print(screen(snapshot))
        else:
            with Live(screen(snapshot), screen=True, auto_refresh=False) as live:
                while True:
                    await asyncio.sleep(interval)
                    live.update(screen(await connection.snapshot()), refresh=True)


def screen(snapshot: Snapshot) -> RenderableType:
    """A snapshot as it is printed."""
    return Group(_head(snapshot), _gauges(snapshot), _tenants(snapshot), _requests(snapshot))


def _head(snapshot: Snapshot) -> Text:
    failing = [name for name, holds in snapshot.checks.items() if not holds]
    state = ("ready", "bold green") if not failing else (f"not ready: {', '.join(failing)}", "bold red")
    return Text.assemble(("tokenbus ", "bold"), snapshot.model, "  ", state)


def _gauges(snapshot: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2))
    running, room = snapshot.running, snapshot.max_running
    table.add_row("batch", _bar(running / room), f"{running} of {room} running, {snapshot.waiting} waiting")
    used, blocks = snapshot.kv_blocks_used, snapshot.kv_blocks
    table.add_row("KV", _bar(used / blocks), f"{used} of {blocks} blocks, {snapshot.preemptions} preemptions")
    rates = f"{snapshot.decode_tokens_per_s:.1f} generated, {snapshot.prefill_tokens_per_s:.1f} prefilled"
    table.add_row("tokens/s", "", rates)
    steps = f"{snapshot.steps_per_s:.1f} a second, the last of {snapshot.rows} rows in {1000 * snapshot.step_s:.1f} ms"
    table.add_row("steps", "", steps)
    return table


def _bar(share: float) -> Text:
    full = round(_BAR_CELLS * min(share, 1.0))
    return Text.assemble(("█" * full, "cyan"), ("░" * (_BAR_CELLS - full), "bright_black"))


def _tenants(snapshot: Snapshot) -> Table:
    table = Table(title=f"tenants ({snapshot.num_tenants} with requests)", title_justify="left", box=None)
    for heading in ("tenant", "weight", "running", "waiting", "tokens/s", "service"):
        table.add_column(heading, justify="left" if heading == "tenant" else "right")
    for tenant in snapshot.tenants:
        table.add_row(*_tenant(tenant))
    return table


def _tenant(row: TenantRow) -> Iterable[str]:
    yield from (row.tenant, f"{row.weight:g}", str(row.running), str(row.waiting))
    yield from (f"{row.tokens_per_s:.1f}", f"{row.service:,.0f}")


def _requests(snapshot: Snapshot) -> Table:
    legend = Text("requests, last minute: ")
    for stage, colour in _COLOURS.items():
        legend.append_text(Text.assemble(("█ ", colour), f"{stage}  "))
    table = Table(title=legend, title_justify="left", box=None)
    for heading in ("tenant", "request", "prompt", "generated", "", ""):
        table.add_column(heading, justify="right" if heading in {"prompt", "generated"} else "left", no_wrap=True)
    for request in snapshot.requests[:_MOST_LINES]:
        sizes = str(request.prompt_tokens), str(request.generated_tokens)
        standing = request.outcome or request.phases[-1].stage
        table.add_row(request.tenant, request.request_id[:12], *sizes, _line(request, snapshot.at), standing)
    return table


def _line(request: RequestRow, now: float) -> Text:
    """One cell for each stretch of the span, in the colour of the phase at its middle."""
    line = Text()
    for cell in range(_LINE_CELLS):
        at = now - _SPAN_S * (1 - (cell + 0.5) / _LINE_CELLS)
        stage = next((phase.stage for phase in request.phases if _covers(phase, at)), None)
        line.append(" " if stage is None else "█", None if stage is None else _COLOURS[stage])
    return line


def _covers(phase: Phase, at: float) -> bool:
    return phase.since <= at and (phase.until is None or at < phase.until)
