"""What the compose file says, as Compose reads it, and its mounts and broker without containers."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.security.conftest import Broker, free_port, run, running_mosquitto

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/, with secrets made by its script."""
    folder = tmp_path_factory.mktemp("compose") / "deploy"
    shutil.copytree(ROOT / "deploy", folder, ignore=shutil.ignore_patterns("secrets"))
    run(["sh", str(folder / "compose/secrets.sh")])
    return folder


@pytest.fixture(scope="module")
def services(deploy: Path) -> dict:
    """By name."""
    compose = Path(sys.executable).with_name("docker-compose")
    command = [compose, "--file", deploy / "compose/compose.yaml", "config", "--format", "json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)["services"]


def mounted(service: dict, root: Path) -> Path:
    """Its files under ``root`` instead of ``/``, and empty folders for its volumes."""
    for mount in service["volumes"]:
        target = root / mount["target"].lstrip("/")
        if mount["type"] == "bind":
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(mount["source"], target)
        else:
            target.mkdir(parents=True)
    return root


@pytest.fixture
def compose_broker(services: dict, deploy: Path, tmp_path: Path) -> Iterator[Broker]:
    """The broker's container, running, but for its ports and for who it becomes."""
    root = mounted(services["broker"], tmp_path / "broker")
    ports = free_port(), free_port()
    config = root / "etc/mosquitto/mosquitto.conf"
    lines = re.sub(r"(?<= )/(etc|var)/", rf"{root}/\1/", config.read_text())
    for port, inside in zip(ports, (8883, 8884), strict=True):
        assert str(inside) in {mapping["published"] for mapping in services["broker"]["ports"]}
        lines = lines.replace(f"listener {inside}", f"listener {port} 127.0.0.1")
    config.write_text(lines + ("user root\n" if os.geteuid() == 0 else ""))
    secrets = deploy / "compose/secrets"
    broker = Broker(root, secrets, *ports, str(secrets / "ca.crt"))
    with running_mosquitto(broker):
        yield broker
