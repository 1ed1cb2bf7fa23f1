"""The embedded broker: a Mosquitto child on loopback, for when there is none to connect to."""

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from platformdirs import user_cache_path

from protocol.transport import BrokerAddress, BrokerUnreachable, ConnectionRefused, Transport, delays

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
MAX_PACKET_BYTES = 16 * 1024 * 1024

#: Where distributions and Homebrew put Mosquitto outside of the usual PATH.
_MORE_PATHS = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin")
_INSTALL_HINT = (
    "install it (apt install mosquitto, dnf install mosquitto, brew install mosquitto) or name a broker's URL"
)

_START_S = 10.0
_STOP_S = 5.0
#: Having run for this long it counts as well again.
_STEADY_S = 10.0
_FETCH_S = 120.0
_LAST_LINES = 5


class BrokerNotFound(Exception):
    """There is no Mosquitto on this machine and none could be fetched; the text says what to do."""


class BrokerFailed(Exception):
    """Mosquitto didn't come up, or died while coming up; the text ends with its own last words."""


class EmbeddedBroker:
    """A Mosquitto of our own; use as ``async with EmbeddedBroker(...) as broker``, then connect to ``broker.url``.

    Anyone on this machine may connect, unless ``settings`` (more lines for mosquitto.conf) say otherwise. It keeps its
    database and log in ``data_dir`` and dies with this process. ``port`` 0 takes a free one, kept across restarts.
    Should it end by itself it is started again, for ever; ``restarts`` counts the attempts.
    Raises BrokerNotFound or BrokerFailed.
    """

    def __init__(self, *, data_dir: Path, port: int = 0, settings: Sequence[str] = ()) -> None:
        self.host = HOST
        self.port = port or _free_port()
        self._data_dir = data_dir.absolute()
        self._settings = tuple(settings)
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self.restarts = 0

    @property
    def url(self) -> str:
        return f"mqtt://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """None while it isn't running."""
        return self._process.pid if self._process is not None else None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it and wait until it answers a CONNECT; from here on it is kept running."""
        self._keeper = asyncio.create_task(self._keep_running(await self._launch()), name="embedded broker")

    async def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End it: with SIGTERM it saves its sessions and messages first, with SIGKILL it can't."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            await asyncio.wait({keeper})
        await self._end(how)

    async def restart(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop and start again on the same port, with the same data."""
        await self.stop(how)
        await self.start()

    async def _keep_running(self, process: asyncio.subprocess.Process) -> None:
        clock = asyncio.get_running_loop().time
        pauses = delays()
        while True:
            since = clock()
            status = await process.wait()
            self._process = None
            logger.error("the embedded broker ended with status %d: %s", status, self._last_words())
            if clock() - since > _STEADY_S:  # else slow down further: it may end at once each time
                pauses = delays()
            process = await self._launch_again(pauses)

    async def _launch_again(self, pauses: Iterator[float]) -> asyncio.subprocess.Process:
        while True:
            await asyncio.sleep(next(pauses))
            self.restarts += 1
            try:
                return await self._launch()
            except (BrokerNotFound, BrokerFailed, OSError) as error:
                logger.error("the embedded broker isn't back yet: %s", error)

    async def _launch(self) -> asyncio.subprocess.Process:
        """One attempt to start it, after which it answers or isn't there."""
        _check_free(self.port)
        program, environment = await find_mosquitto(user_cache_path("tokenbus") / "mosquitto")
        self._data_dir.mkdir(parents=True, exist_ok=True)
        config = self._data_dir / "mosquitto.conf"
        config.write_text("\n".join([*self._config(), *self._settings, ""]))
        with self._log.open("wb") as log:
            process = self._process = await asyncio.create_subprocess_exec(
                *_tied_to_us(),
                program,
                "-c",
                config,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        try:
            await self._wait_ready(process)
        except BaseException:
            await self._end(signal.SIGTERM)
            raise
        logger.info("embedded broker at %s, data in %s", self.url, self._data_dir)
        return process

    async def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _signal(process, how)
        try:
            async with asyncio.timeout(_STOP_S):
                await process.wait()
        except TimeoutError:
            _signal(process, signal.SIGKILL)
            await process.wait()

    @property
    def _log(self) -> Path:
        return self._data_dir / "mosquitto.log"

    def _config(self) -> list[str]:
        """What a client that doesn't read may cost, and what a crash may lose, as in deploy/mosquitto/mosquitto.conf."""
        lines = [
            f"listener {self.port} {self.host}",
            "allow_anonymous true",
            "set_tcp_nodelay true",
            "max_queued_messages 100000",
            "max_queued_bytes 67108864",
            "max_inflight_messages 1000",
            "max_inflight_bytes 16777216",
            f"max_packet_size {MAX_PACKET_BYTES}",
            "persistence true",
            f"persistence_location {self._data_dir}/",
            "autosave_interval 2",
            "connection_messages false",
            "log_dest stderr",
        ]
        if os.geteuid() == 0:
            lines.append("user root")  # else it becomes user mosquitto, who can't write our directory
        return lines

    async def _wait_ready(self, process: asyncio.subprocess.Process) -> None:
        ready = asyncio.create_task(self._answers(), name="embedded broker ready")
        died = asyncio.create_task(process.wait(), name="embedded broker died")
        try:
            await asyncio.wait({ready, died}, return_when=asyncio.FIRST_COMPLETED)
            if died.done():
                raise BrokerFailed(f"Mosquitto ended with status {died.result()}: {self._last_words()}")
            if not ready.result():
                raise BrokerFailed(
                    f"Mosquitto didn't answer on port {self.port} within {_START_S:g} s: {self._last_words()}"
                )
        finally:
            ready.cancel()
            died.cancel()
            await asyncio.wait({ready, died})

    async def _answers(self) -> bool:
        """Whether a CONNECT is answered in time; a refusal for lack of credentials is an answer too."""
        try:
            async with Transport(BrokerAddress(self.host, self.port), connect_timeout_s=_START_S):
                return True
        except ConnectionRefused:
            return True
        except BrokerUnreachable:
            return False

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError as error:
            return f"(its log can't be read: {error})"
        return " | ".join(lines[-_LAST_LINES:]) or "(it said nothing)"


async def find_mosquitto(cache_dir: Path) -> tuple[str, dict[str, str]]:
    """The program, installed or fetched into the cache, and the environment to run it in. Raises BrokerNotFound."""
    environment = dict(os.environ)
    installed = shutil.which("mosquitto", path=os.pathsep.join([os.environ.get("PATH", ""), *_MORE_PATHS]))
    if installed is not None:
        return installed, environment
    fetched = cache_dir / "root/usr/sbin/mosquitto"
    if not os.access(fetched, os.X_OK):
        await _fetch(cache_dir)
    environment["LD_LIBRARY_PATH"] = _library_path(cache_dir / "root")
    return str(fetched), environment


def _library_path(root: Path) -> str:
    unpacked = [str(folder) for folder in root.glob("usr/lib/*-linux-gnu*")]
    return os.pathsep.join([*unpacked, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])


async def _fetch(cache_dir: Path) -> None:
    """Unpack Debian's packages for Mosquitto and what it needs into the cache: without root, nothing is installed."""
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise BrokerNotFound(f"Mosquitto wasn't found: {_INSTALL_HINT}")
    logger.info("Mosquitto wasn't found; fetching its Debian packages into %s", cache_dir)
    packages = cache_dir / "packages"
    packages.mkdir(parents=True, exist_ok=True)
    # What an installation would bring: only what this machine lacks, under the names of its own release.
    planned = await _run(packages, "apt-get", "install", "--simulate", "--no-install-recommends", "mosquitto")
    names = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    await _run(packages, "apt-get", "download", *names)
    unpacked = cache_dir / "unpacking"
    for package in sorted(packages.glob("*.deb")):
        await _run(packages, "dpkg", "-x", str(package), str(unpacked))
    unpacked.rename(cache_dir / "root")


async def _run(folder: Path, *command: str) -> str:
    """Run a packaging tool; returns its output. Raises BrokerNotFound when it fails."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(_FETCH_S):
            output, errors = await process.communicate()
    except TimeoutError:
        _signal(process, signal.SIGKILL)
        await process.wait()
        raise BrokerNotFound(f"{command[0]} took over {_FETCH_S:g} s to fetch Mosquitto: {_INSTALL_HINT}") from None
    if process.returncode != 0:
        said = errors.decode(errors="replace").strip()
        raise BrokerNotFound(f"Mosquitto wasn't found, and {command[0]} couldn't fetch it ({said}): {_INSTALL_HINT}")
    return output.decode()


def _signal(process: asyncio.subprocess.Process, how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(how)


def _tied_to_us() -> list[str]:
    """Has the kernel end the child when we die, even by SIGKILL; without setpriv (not Linux) it may live on."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM"] if setpriv is not None else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _check_free(port: int) -> None:
    """Else whoever has the port would answer us in our child's place. Raises BrokerFailed."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise BrokerFailed(f"the embedded broker can't have port {port}: {error.strerror}") from None
