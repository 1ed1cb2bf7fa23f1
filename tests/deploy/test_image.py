"""The container image without a container engine: its install steps run, and what they made serves by the image's commands."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from protocol.client import Client
from protocol.request import Request
from tests.deploy.conftest import ROOT, mounted
from tests.security.conftest import free_port
from tests.workers.models import servable

pytestmark = pytest.mark.timeout(180)

HOME = "/var/lib/tokenbus"
PREFIX = "/opt/tokenbus"


def instructions() -> list[tuple[str, str]]:
    """The Containerfile's, as ``(RUN, its arguments)``."""
    text = re.sub(r"^#.*\n", "", (ROOT / "deploy/Containerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def argument(name: str) -> str:
    """Of the instruction that there is only one of."""
    (found,) = (arguments for instruction, arguments in instructions() if instruction == name)
    return found


def sources() -> list[str]:
    return [
        source
        for instruction, arguments in instructions()
        if instruction == "COPY" and "--from" not in arguments
        for source in arguments.split()[:-1]
    ]


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that is installed here but tokenbus: torch alone would be minutes of downloading."""
    folder = tmp_path_factory.mktemp("packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if "tokenbus" not in path.name and path.suffix != ".pth":
            (folder / path.name).symlink_to(path)
    return folder


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory, packages: Path) -> Path:
    """Installed by deploy/install.sh from what the image's build sees; then nobody may write to it."""
    context, prefix = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("opt") / "tokenbus"
    for source in sources():
        (context / source).parent.mkdir(exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, context / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, context / source)
    # With no index, pip fails if what constraints.txt pins isn't what is installed here. And "no" says no twice: no isolation.
    environment = os.environ | {"PYTHONPATH": str(packages), "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "no"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    run([context / "deploy/install.sh", prefix, "cpu"], env=environment | {"PATH": path})
    for folder, _, _ in os.walk(prefix):
        Path(folder).chmod(0o555)
    return prefix


def run(command: list[str | Path], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def as_user(command: list[str | Path]) -> list[str | Path]:
    """By the image's user where this is root; else whoever this is isn't root either."""
    user, group = argument("USER").split(":")
    return (
        ["unshare", "--user", f"--map-user={user}", f"--map-group={group}", *command] if os.geteuid() == 0 else command
    )


@pytest.fixture
def environment(tmp_path: Path, prefix: Path, packages: Path) -> dict[str, str]:
    """What the image sets, in other folders."""
    (tmp_path / "home").mkdir()
    values = dict(pair.split("=", 1) for pair in argument("ENV").split())
    values = {name: value.replace(PREFIX, str(prefix)) for name, value in values.items()}
    values = {name: value.replace(HOME, str(tmp_path / "home")) for name, value in values.items()}
    values["PATH"] = values["PATH"].replace("$PATH", os.environ["PATH"])
    return values | {"PYTHONPATH": str(packages)}


def test_the_installation_holds_every_file_of_the_packages(prefix):
    (installed,) = prefix.glob("lib/python*/site-packages")
    for package in ("protocol", "scheduler", "workers", "benchmarks"):
        assert files(installed, package) == files(ROOT, package)


def files(root: Path, package: str) -> set[Path]:
    found = (path.relative_to(root) for path in (root / package).rglob("*") if path.is_file())
    return {path for path in found if "__pycache__" not in path.parts}


def test_what_is_copied_reaches_the_build():
    kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), flags=re.MULTILINE)
    assert kept == sources()


def test_an_unknown_device_is_refused(tmp_path):
    done = subprocess.run(
        [ROOT / "deploy/install.sh", tmp_path / "prefix", "tpu"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "DEVICE must be cpu or cuda, not 'tpu'" in done.stderr


def test_the_command_tells_its_version_to_a_user_that_is_not_root(environment):
    assert run(as_user(["id", "-u"]), env=environment).strip() != "0"
    assert "0.1.0" in run(as_user(["tokenbus", "--version"]), env=environment)


async def test_it_serves_as_the_compose_file_has_it_and_not_as_root(environment, services, compose_broker, tmp_path):
    """By the image's own commands, in the compose file's mounts, at its broker, until a tenant has an answer."""
    root = mounted(services["tokenbus"], tmp_path / "service")
    settings = root / "etc/tokenbus/tokenbus.toml"
    settings.write_text(settings.read_text().replace('"/etc/', f'"{root}/etc/'))
    port = str(free_port())
    environment |= {
        "TOKENBUS_BROKER_URL": f"mqtts://127.0.0.1:{compose_broker.certificate_port}",
        "TOKENBUS_METRICS_PORT": port,
        "TOKENBUS_MODEL_ALIAS": "tiny",
        "TOKENBUS_MODEL_PATH": str(servable(tmp_path / "model")),
        "TOKENBUS_MODEL_ATTENTION": "reference",
        "TOKENBUS_ENGINE_NUM_BLOCKS": "100",
    }
    command = [word.replace("/etc/", f"{root}/etc/") for word in json.loads(argument("CMD"))]
    check = json.loads(argument("HEALTHCHECK").partition("CMD ")[2])
    check = as_user([word.replace("9464", port) for word in check])
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            *as_user([*json.loads(argument("ENTRYPOINT")), *command]), stderr=output, env=environment
        )
    try:
        async with Client(
            f"mqtts://127.0.0.1:{compose_broker.password_port}",
            tenant="alice",
            username="alice",
            password=compose_broker.by_password("alice").password,
            ca_file=compose_broker.ca_file,
            accept_timeout_s=100,
        ) as alice:
            result = await alice.complete(Request(prompt=[5, 6, 7], max_tokens=4, stream=False), model="tiny")
        run(check, env=environment)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0, log.read_text()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert result.usage.completion_tokens > 0
    assert (tmp_path / "home/journal.sqlite3").exists()
    with pytest.raises(AssertionError, match="Connection refused"):
        run(check, env=environment)


@pytest.mark.parametrize("script", [*ROOT.glob("deploy/**/*.sh")], ids=lambda script: script.name)
def test_scripts_are_sound(script):
    run(["shellcheck", script], env=with_tools())


def test_the_containerfile_is_sound():
    run(["hadolint", ROOT / "deploy/Containerfile"], env=with_tools())


def with_tools() -> dict[str, str]:
    """Those of the development environment, activated or not."""
    return os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
