"""``tokenbus top`` against a console, and what it draws."""

import re

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from click.testing import CliRunner
from rich.console import Console

from scheduler.cli import main
from scheduler.console.top import ConsoleError, connected, screen
from tests.scheduler.console.reports import Bench
from tests.scheduler.console.serving import PASSWORD, serving
from tests.scheduler.core.drive import make


def drawn(bench: Bench, **checks: bool) -> list[str]:
    console = Console(width=120)
    with console.capture() as captured:
        console.print(screen(bench.activity.snapshot(checks)))
    return captured.get().splitlines()


def test_a_screen_tells_all_that_a_snapshot_holds():
    bench = Bench(make(running=1, blocks=16, weights={"bob": 2.0}))
    bench.submit("alice/one", prompt=10, max_tokens=30)
    bench.submit("bob/other", prompt=4)
    for _ in range(20):
        bench.step()
    lines = drawn(bench, worker=True, broker=False)
    text = "\n".join(lines)
    for told in ("tiny", "not ready: broker", "1 of 1 running, 1 waiting", "of 16 blocks", "1.0 a second"):
        assert told in text
    assert re.search(r"alice +1 +1 +0 +1\.0 ", text)
    assert re.search(r"bob +2 +0 +1 +0\.0 ", text)
    (one,) = [line for line in lines if " one " in line]
    assert re.search(r"alice +one +10 +20 +█+ +decode", one)


def test_a_bar_is_as_long_as_its_share_of_the_last_minute():
    bench = Bench(make(running=1))
    bench.submit("alice/one", prompt=4)
    bench.now += 30
    assert max(line.count("█") for line in drawn(bench) if " one " in line) == 24
    bench.now += 3600
    assert max(line.count("█") for line in drawn(bench) if " one " in line) == 48


async def test_it_logs_in(protected, bench):
    async with serving(protected, bench) as client:
        url = str(client._base_url)
        async with connected(url, PASSWORD) as connection:
            assert (await connection.snapshot()).waiting == 1
        async with connected(url) as connection:
            with pytest.raises(ConsoleError, match=r"/console: log in first$"):
                await connection.snapshot()
        with pytest.raises(ConsoleError, match=r"/console: that isn't the password$"):
            async with connected(url, "guess"):
                pass


async def test_what_is_no_console_is_told():
    async def other(_request: web.Request) -> web.Response:
        return web.Response(text='{"at": "noon"}')

    application = web.Application()
    application.add_routes([web.get("/old/console/snapshot", other)])
    async with TestServer(application) as server:
        async with connected(str(server.make_url("/old"))) as connection:
            with pytest.raises(ConsoleError, match=r"another version's console: .*at"):
                await connection.snapshot()
        async with connected(str(server.make_url("/"))) as connection:
            with pytest.raises(ConsoleError, match=r"there is no console; .* console\.password_file"):
                await connection.snapshot()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--url", "http://127.0.0.1:1"), "Cannot connect to host 127.0.0.1:1"),
        (("--url", "nonsense"), "nonsense/console: "),
        (("--url", "http://[::1"), "http://[::1/console: "),
        (("--ca-file", "none.pem"), "none.pem can't be read"),
        (("--password-file", "none"), "password file none: No such file"),
    ],
)
def test_what_cannot_be_used_is_told_without_a_traceback(arguments, told):
    result = CliRunner().invoke(main, ["top", "--once", *arguments])
    assert result.exit_code == 1
    assert told in result.output
    assert "Traceback" not in result.output
