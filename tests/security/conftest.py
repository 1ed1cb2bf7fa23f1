"""Mosquitto by the shipped files, with keys and passwords by the very commands of docs/security.md; and a service on it."""

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from protocol.transport import BrokerAddress, Incoming, Transport
from scheduler import service
from scheduler.config import BrokerConfig, Config, EngineConfig, MetricsConfig, ModelConfig
from scheduler.service import Service
from tests.workers.models import servable

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Broker:
    """The shipped broker: its keys are in ``keys``, its files under ``root`` instead of ``/``."""

    root: Path
    keys: Path
    password_port: int
    certificate_port: int
    ca_file: str

    def by_password(self, user: str | None, password: str | None = None) -> BrokerAddress:
        """The user's own password, unless another is given."""
        if user is not None and password is None:
            password = (self.keys / f"{user}.password").read_text().strip()
        url = f"mqtts://127.0.0.1:{self.password_port}"
        return BrokerAddress.parse(url, username=user, password=password, ca_file=self.ca_file)

    def by_certificate(self, name: str, *, username: str | None = None) -> BrokerAddress:
        cert, key = self.keys / f"{name}.crt", self.keys / f"{name}.key"
        url = f"mqtts://127.0.0.1:{self.certificate_port}"
        return BrokerAddress.parse(url, username=username, ca_file=self.ca_file, cert_file=str(cert), key_file=str(key))

    def certify(self, name: str, *, authority: str) -> None:
        """Keys ``forged`` in the name of a user, signed by any other certificate that is taken for an authority."""
        key = ["-newkey", "rsa:2048", "-nodes", "-keyout", f"{self.keys}/forged.key", "-subj", f"/CN={name}"]
        sign = ["-CA", f"{self.keys}/{authority}.crt", "-CAkey", f"{self.keys}/{authority}.key", "-CAcreateserial"]
        run(["openssl", "req", *key, "-out", f"{self.keys}/forged.csr"])
        run(["openssl", "x509", "-req", "-in", f"{self.keys}/forged.csr", *sign, "-out", f"{self.keys}/forged.crt"])

    def add_password(self, user: str, password: str) -> None:
        run(["mosquitto_passwd", "-b", str(self.root / "etc/mosquitto/passwords"), user, password])


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    root = tmp_path_factory.mktemp("root")
    made = make_broker(root)
    with running_mosquitto(made):
        yield made


def make_broker(root: Path) -> Broker:
    """Set it up as docs/security.md says, but for the name of the host and for where ``/`` is."""
    for folder in (
        "etc/mosquitto/certs",
        "etc/mosquitto/ca_certificates",
        "var/lib/mosquitto",
        "var/log/mosquitto",
        "keys",
    ):
        (root / folder).mkdir(parents=True)
    keys = root / "keys"
    (keys / "deploy").symlink_to(ROOT / "deploy")
    page = (ROOT / "docs" / "security.md").read_text()
    commands = page.split("```sh\n")[1].split("```")[0].replace("/etc/", f"{root}/etc/")
    commands = commands.replace("DNS:broker.example.com", "IP:127.0.0.1")
    commands = commands.replace("-o mosquitto ", "").replace("systemctl restart mosquitto\n", "")
    run(["sh", "-euc", commands], cwd=keys)
    config = root / "etc/mosquitto/mosquitto.conf"
    ports = free_port(), free_port()
    lines = re.sub(r"(?<= )/(etc|var)/", rf"{root}/\1/", config.read_text())
    lines = lines.replace("listener 8883", f"listener {ports[0]} 127.0.0.1").replace(
        "listener 8884", f"listener {ports[1]} 127.0.0.1"
    )
    if os.geteuid() == 0:
        lines += "user root\n"  # else it becomes user mosquitto, who can't read our directory
    config.write_text(lines)
    return Broker(root, keys, *ports, str(root / "etc/mosquitto/ca_certificates/tokenbus.crt"))


@contextlib.contextmanager
def running_mosquitto(broker: Broker) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("mosquitto", path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))
    process = subprocess.Popen([program, "-c", broker.root / "etc/mosquitto/mosquitto.conf"])
    try:
        wait_for_port(broker.certificate_port, process)
        yield process
    finally:
        process.terminate()
        process.wait(10)


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        assert process.poll() is None, "Mosquitto refused the shipped configuration"
        with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    pytest.fail("Mosquitto didn't come up")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Service]:
    """A whole service with a tiny model, at the broker by its own certificate."""
    folder = servable(tmp_path_factory.mktemp("model"))
    address = broker.by_certificate("_service")
    config = Config(
        model=ModelConfig(alias="tiny", path=str(folder), threads=1),
        engine=EngineConfig(block_size=8, num_blocks=600),
        broker=BrokerConfig(
            url=f"mqtts://127.0.0.1:{address.port}",
            data_dir=str(tmp_path_factory.mktemp("data")),
            ca_file=address.ca_file,
            cert_file=address.cert_file,
            key_file=address.key_file,
        ),
        metrics=MetricsConfig(port=0),
    )
    async with service.running(config) as service_:
        yield service_


@contextlib.asynccontextmanager
async def connected(address: BrokerAddress, *filters: str, identifier: str | None = None) -> AsyncIterator[Transport]:
    """A bare MQTT client, given up on at once when it is refused."""
    subscriptions = [(name, 1) for name in filters]
    async with Transport(address, subscriptions=subscriptions, identifier=identifier, connect_timeout_s=2) as transport:
        yield transport


async def heard(transport: Transport, within_s: float = 0.3) -> list[Incoming]:
    """Everything that arrives, until it has been quiet for so long."""
    messages = []
    with contextlib.suppress(TimeoutError):
        while True:
            async with asyncio.timeout(within_s):
                messages.append(await anext(transport.messages()))
                transport.acknowledge(messages[-1])
    return messages


def run(command: list[str], cwd: Path | None = None) -> None:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
