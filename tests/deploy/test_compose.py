"""The compose file fits the image, the service's settings and Prometheus. That a tenant is answered is in test_image.py."""

import shutil
import subprocess
from pathlib import Path

import pytest

from scheduler.config import Config
from scheduler.sources import load
from tests.deploy.conftest import mounted
from tests.security.conftest import run

pytestmark = pytest.mark.timeout(60)


def settings(services: dict, root: Path) -> Config:
    file = mounted(services["tokenbus"], root) / "etc/tokenbus/tokenbus.toml"
    file.write_text(file.read_text().replace('"/etc/', f'"{root}/etc/'))
    return load(file)


def test_the_settings_find_the_broker_and_the_secrets(services, tmp_path):
    config = settings(services, tmp_path)
    host, _, port = config.broker.url.removeprefix("mqtts://").partition(":")
    assert port in {str(mapping["target"]) for mapping in services[host]["ports"]}
    for file in (config.broker.ca_file, config.broker.cert_file, config.broker.key_file):
        assert Path(file).read_text().startswith("-----BEGIN")


def test_the_service_has_time_to_drain(services, tmp_path):
    config = settings(services, tmp_path)
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
