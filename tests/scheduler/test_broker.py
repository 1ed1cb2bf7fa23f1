"""The embedded broker: its life, its end, and where it comes from."""

import asyncio
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import pytest

from protocol.transport import BrokerAddress, Transport
from scheduler.mqtt import broker as broker_module
from scheduler.mqtt.broker import BrokerFailed, BrokerNotFound, EmbeddedBroker, find_mosquitto
from tests.brokers import send_signal

PARENT = """
import asyncio, pathlib, sys
from scheduler.mqtt.broker import EmbeddedBroker

async def main():
    async with EmbeddedBroker(data_dir=pathlib.Path(sys.argv[1])) as broker:
        print(broker.port, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def until_gone(port: int) -> None:
    async with asyncio.timeout(10):
        while listening(port):
            await asyncio.sleep(0.02)


async def test_listens_on_loopback_while_entered(tmp_path: Path) -> None:
    async with EmbeddedBroker(data_dir=tmp_path / "new" / "folder") as broker:
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        assert broker.pid is not None
        assert listening(broker.port)
        async with Transport(BrokerAddress.parse(broker.url)) as transport:
            assert await transport.publish("nowhere", b"x") == 16
    assert broker.pid is None
    assert not listening(broker.port)


async def test_keeps_the_port_it_is_given(tmp_path: Path) -> None:
    port = EmbeddedBroker(data_dir=tmp_path).port
    async with EmbeddedBroker(data_dir=tmp_path, port=port) as broker:
        assert broker.port == port
        assert listening(port)


async def test_restart_keeps_port_and_data(broker: EmbeddedBroker) -> None:
    port, pid = broker.port, broker.pid
    async with Transport(BrokerAddress.parse(broker.url)) as transport:
        await transport.publish("state", b"kept", retain=True)
    await broker.restart()
    assert broker.port == port
    assert broker.pid != pid
    async with Transport(BrokerAddress.parse(broker.url), subscriptions=[("state", 1)]) as transport:
        assert (await anext(transport.messages())).payload == b"kept"


async def killed(broker: EmbeddedBroker, transport: Transport, how: signal.Signals) -> None:
    """Kill the child behind our back; the transport must be connected again within 5 s."""
    async with asyncio.timeout(5):
        reconnected = asyncio.create_task(transport.wait_reconnected())
        await asyncio.sleep(0)
        send_signal(broker, how)
        await reconnected


async def test_killed_child_is_replaced_and_found_again_within_5_s(
    broker: EmbeddedBroker, address: BrokerAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async with Transport(address, subscriptions=[("in", 1)]) as transport:
        for round in range(1, 4):
            pid = broker.pid
            await killed(broker, transport, signal.SIGKILL)
            assert broker.pid != pid
            assert broker.restarts == round
            assert await transport.publish("in", b"%d" % round) == 0
            assert (await anext(transport.messages())).payload == b"%d" % round
    assert caplog.text.count("ended with status -9: ") == 3  # by the keeper, or in the middle of a start


async def test_child_that_ended_in_order_comes_back_with_its_sessions(
    broker: EmbeddedBroker, address: BrokerAddress
) -> None:
    """As when someone stops it by hand."""

    def service() -> Transport:
        return Transport(address, identifier="service", subscriptions=[("in", 1)], session_expiry_s=60)

    async with service():
        pass
    async with Transport(address) as tenant:
        assert await tenant.publish("in", b"queued") == 0
        await killed(broker, tenant, signal.SIGTERM)
    async with service() as back:
        assert (await anext(back.messages())).payload == b"queued"


async def test_crash_loop_is_told_and_outlived(
    broker: EmbeddedBroker, address: BrokerAddress, caplog: pytest.LogCaptureFixture
) -> None:
    async with Transport(address) as transport, asyncio.timeout(15):
        reconnected = asyncio.create_task(transport.wait_reconnected())
        broker._settings = ("no_such_setting 1",)
        send_signal(broker, signal.SIGKILL)
        while caplog.text.count("isn't back yet") < 2:
            await asyncio.sleep(0.02)
        assert "isn't back yet: Mosquitto ended with status 3: " in caplog.text
        assert "no_such_setting" in caplog.text
        broker._settings = ()
        await reconnected
        assert broker.restarts == caplog.text.count("isn't back yet") + 1


@pytest.mark.parametrize("turns", [0, 1, 10, 100])
async def test_stop_during_a_comeback_is_final(broker: EmbeddedBroker, turns: int) -> None:
    send_signal(broker, signal.SIGKILL)
    for _ in range(turns):
        await asyncio.sleep(0.002)
    await broker.stop()
    assert broker.pid is None
    assert not listening(broker.port)
    assert "embedded broker" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_restart_during_a_comeback_leaves_one_broker(broker: EmbeddedBroker, address: BrokerAddress) -> None:
    pids = {broker.pid}
    for _ in range(3):
        send_signal(broker, signal.SIGKILL)
        await broker.restart()
        pids.add(broker.pid)
    assert len(pids) == 4
    async with Transport(address) as transport:
        assert await transport.publish("nowhere", b"x") == 16
    await broker.stop()
    assert not listening(broker.port)


async def test_takes_no_password_from_anyone_when_told_so(tmp_path: Path) -> None:
    """It counts as up although it refuses us."""
    async with EmbeddedBroker(data_dir=tmp_path, settings=["allow_anonymous false"]) as broker:
        assert listening(broker.port)


async def test_failed_start_tells_mosquittos_own_reason(tmp_path: Path) -> None:
    with pytest.raises(BrokerFailed, match=r"status \d+: .*no_such_setting"):
        await EmbeddedBroker(data_dir=tmp_path, settings=["no_such_setting 1"]).start()


async def test_taken_port_is_told(broker: EmbeddedBroker, tmp_path: Path) -> None:
    other = EmbeddedBroker(data_dir=tmp_path / "other", port=broker.port)
    with pytest.raises(BrokerFailed, match=f"port {broker.port}: Address already in use"):
        await other.start()
    assert other.pid is None
    assert listening(broker.port)


async def test_broker_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because it listens elsewhere."""
    monkeypatch.setattr(broker_module, "_START_S", 0.3)
    elsewhere = EmbeddedBroker(data_dir=tmp_path).port
    silent = EmbeddedBroker(data_dir=tmp_path)
    monkeypatch.setattr(silent, "_config", lambda: [f"listener {elsewhere} 127.0.0.1"])
    with pytest.raises(BrokerFailed, match=r"didn't answer .*within 0\.3 s"):
        await silent.start()
    assert not listening(elsewhere)


async def test_deaf_broker_is_killed(broker: EmbeddedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broker_module, "_STOP_S", 0.2)
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    await broker.stop()
    assert not listening(broker.port)


async def test_dies_with_a_killed_parent(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PARENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    port = int(await parent.stdout.readline())
    assert listening(port)
    parent.kill()
    await parent.wait()
    await until_gone(port)


@pytest.fixture
def bare_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH with nothing on it, to put programs on."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(broker_module, "_MORE_PATHS", ())
    return programs


async def test_without_mosquitto_or_apt_the_way_out_is_told(bare_machine: Path, tmp_path: Path) -> None:
    with pytest.raises(BrokerNotFound, match="apt install mosquitto"):
        await EmbeddedBroker(data_dir=tmp_path / "data").start()


INSTALLED = shutil.which("mosquitto", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin"]))
APT_GET = """#!/bin/sh
# A package source of one package, in apt-get's own form.
case "$1" in
install) echo "Reading package lists..."; echo "Inst mosquitto (2 Debian:12/stable [all])"; echo "Conf mosquitto (2)" ;;
download) test "$2" = mosquitto && /bin/cp {package} mosquitto_2_any.deb ;;
esac
"""


async def test_packages_are_fetched_once_and_run_from_the_cache(
    bare_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert INSTALLED is not None
    tree, package = tmp_path / "tree", tmp_path / "built.deb"
    (tree / "usr/sbin").mkdir(parents=True)
    shutil.copy(INSTALLED, tree / "usr/sbin/mosquitto")
    (tree / "usr/lib/x86_64-linux-gnu").mkdir(parents=True)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: mosquitto\nVersion: 2\nArchitecture: all\nMaintainer: t <t@example.org>\nDescription: t\n"
    )
    build = await asyncio.create_subprocess_exec(
        "/usr/bin/dpkg-deb", "-b", tree, package, stdout=asyncio.subprocess.DEVNULL, env={"PATH": "/usr/bin:/bin"}
    )
    assert await build.wait() == 0
    apt_get = bare_machine / "apt-get"
    apt_get.write_text(APT_GET.format(package=package))
    apt_get.chmod(0o755)
    for program in ["dpkg", "dpkg-deb", "tar", "rm"]:
        found = shutil.which(program, path="/usr/bin:/bin")
        assert found is not None
        (bare_machine / program).symlink_to(found)

    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    async with EmbeddedBroker(data_dir=tmp_path / "data") as broker:
        assert listening(broker.port)
    apt_get.unlink()
    program, environment = await find_mosquitto(cache / "tokenbus/mosquitto")
    assert program == str(cache / "tokenbus/mosquitto/root/usr/sbin/mosquitto")
    assert environment["LD_LIBRARY_PATH"].startswith(str(cache / "tokenbus/mosquitto/root/usr/lib/x86_64-linux-gnu"))


async def test_failed_fetch_tells_why(bare_machine: Path, tmp_path: Path) -> None:
    for program in ["apt-get", "dpkg"]:
        (bare_machine / program).write_text("#!/bin/sh\necho E: no network >&2\nexit 100\n")
        (bare_machine / program).chmod(0o755)
    with pytest.raises(BrokerNotFound, match=r"E: no network.*install it"):
        await find_mosquitto(tmp_path / "cache")
