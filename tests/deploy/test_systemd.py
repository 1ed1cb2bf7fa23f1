"""systemd accepts the unit, finds it closed enough, and it fits the settings beside it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scheduler.sources import load

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")

FOLDER = Path(__file__).parents[2] / "deploy/systemd"
UNIT = FOLDER / "tokenbus.service"


def analyze(*arguments: str | Path) -> str:
    done = subprocess.run(["systemd-analyze", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def values(key: str) -> list[str]:
    lines = UNIT.read_text().splitlines()
    return [value for name, equals, value in (line.partition("=") for line in lines) if equals and name == key]


def test_systemd_accepts_it(tmp_path):
    unit = tmp_path / UNIT.name
    program = Path(sys.executable).with_name("tokenbus")
    unit.write_text(UNIT.read_text().replace("/opt/tokenbus/bin/tokenbus", str(program)))
    assert analyze("verify", unit) == ""


def test_it_may_do_little():
    """Of 100 points of exposure."""
    analyze("security", "--offline=true", "--threshold=20", UNIT)


def test_the_settings_fit_it():
    config = load(FOLDER / "tokenbus.toml")
    assert float(values("TimeoutStopSec")[0]) > config.service.drain_s
    assert config.broker.data_dir == f"/var/lib/{values('StateDirectory')[0]}"
    credentials = [f"/run/credentials/{UNIT.name}/{value.partition(':')[0]}" for value in values("LoadCredential")]
    assert credentials == [config.broker.ca_file, config.broker.cert_file, config.broker.key_file]
