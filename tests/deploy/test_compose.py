"""The compose file's own parts, put where it mounts them, work together: a tenant asks and is answered."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from protocol.client import Client
from protocol.request import Request
from scheduler import service
from scheduler.config import Config, load
from tests.security.conftest import Broker, free_port, run, running_mosquitto
from tests.workers.models import servable

pytestmark = pytest.mark.timeout(60)

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture(scope="module")
def deploy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of deploy/, with secrets made by its script."""
    folder = tmp_path_factory.mktemp("compose") / "deploy"
    shutil.copytree(DEPLOY, folder, ignore=shutil.ignore_patterns("secrets"))
    run(["sh", str(folder / "compose/secrets.sh")])
    return folder


@pytest.fixture(scope="module")
def services(deploy: Path) -> dict:
    """As Compose itself reads the file."""
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
def broker(services: dict, deploy: Path, tmp_path: Path) -> Broker:
    """The broker's container, but for its ports and for who it becomes."""
    root = mounted(services["broker"], tmp_path / "broker")
    ports = free_port(), free_port()
    config = root / "etc/mosquitto/mosquitto.conf"
    lines = re.sub(r"(?<= )/(etc|var)/", rf"{root}/\1/", config.read_text())
    for port, inside in zip(ports, (8883, 8884), strict=True):
        assert str(inside) in {mapping["published"] for mapping in services["broker"]["ports"]}
        lines = lines.replace(f"listener {inside}", f"listener {port} 127.0.0.1")
    config.write_text(lines + "user root\n")
    return Broker(root, deploy / "compose/secrets", *ports, str(deploy / "compose/secrets/ca.crt"))


def settings(services: dict, root: Path) -> Config:
    mounted(services["tokenbus"], root)
    text = (root / "etc/tokenbus/tokenbus.toml").read_text()
    file = root / "tokenbus.toml"
    file.write_text(text.replace('"/etc/', f'"{root}/etc/'))
    return load(file)


async def test_a_tenant_is_answered(services, broker, tmp_path):
    config = settings(services, tmp_path / "service")
    assert config.broker.url == "mqtts://broker:8884"
    assert "alice" in config.tenants
    flags = {
        "model.alias": "tiny",
        "model.path": str(servable(tmp_path / "model")),
        "model.attention": "reference",
        "engine.num_blocks": "100",
        "broker.url": f"mqtts://127.0.0.1:{broker.certificate_port}",
        "broker.data_dir": str(tmp_path / "service/var/lib/tokenbus"),
        "metrics.port": "0",
    }
    config = load(tmp_path / "service/tokenbus.toml", flags=flags)
    alice = broker.by_password("alice")
    client = Client(
        f"mqtts://127.0.0.1:{broker.password_port}",
        tenant="alice",
        username="alice",
        password=alice.password,
        ca_file=alice.ca_file,
    )
    with running_mosquitto(broker):
        async with service.running(config), client:
            result = await client.complete(Request(prompt=[5, 6, 7], max_tokens=3, stream=False), model="tiny")
    assert result.usage.completion_tokens > 0


def test_the_service_has_time_to_drain(services, tmp_path):
    config = settings(services, tmp_path / "service")
    assert float(services["tokenbus"]["stop_grace_period"].rstrip("s")) > config.service.drain_s


def test_the_image_is_built_from_the_containerfile(services, deploy):
    build = services["tokenbus"]["build"]
    assert Path(build["context"]) == deploy.parent
    assert build["dockerfile"] == "deploy/Containerfile"
    assert build["args"] == {"DEVICE": "cpu"}


def test_secrets_are_kept_from_others_and_are_never_made_anew(deploy):
    assert (deploy / "compose/secrets").stat().st_mode & 0o077 == 0
    with pytest.raises(AssertionError, match="File exists"):
        run(["sh", str(deploy / "compose/secrets.sh")])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")
def test_prometheus_accepts_its_configuration_and_watches_the_service(services, tmp_path):
    files = {mount["target"]: mount["source"] for mount in services["prometheus"]["volumes"]}
    folder = tmp_path / "prometheus"
    shutil.copytree(files["/etc/prometheus/rules"], folder / "rules")
    shutil.copy(files["/etc/prometheus/prometheus.yml"], folder / "prometheus.yml")
    command = ["promtool", "check", "config", folder / "prometheus.yml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert "rules/alerts.yaml" in done.stdout
    text = (folder / "prometheus.yml").read_text()
    assert f"tokenbus:{load().metrics.port}" in text
