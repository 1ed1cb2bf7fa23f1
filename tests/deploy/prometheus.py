"""A real Prometheus for a test, on a port and with a configuration of its own, and its promtool."""

import asyncio
import contextlib
import json
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.faults.service import free_port

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES, ALERTS = DEPLOY / "prometheus" / "rules.yaml", DEPLOY / "prometheus" / "alerts.yaml"

needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="needs Prometheus: sudo apt install prometheus (deploy/packages.sh)"
)


def promtool(*arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def rules(file: Path) -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(file.read_text())["groups"] for rule in group["rules"]]


class Prometheus:
    """Its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def ask(self, path: str, **parameters: str) -> Any:
        """The ``data`` of an answer; raises for one that is no success."""

        def get() -> Any:
            query = urllib.parse.urlencode(parameters)
            with urllib.request.urlopen(f"{self.url}{path}?{query}", timeout=10) as answer:
                return json.load(answer)

        answer = await asyncio.to_thread(get)
        assert answer["status"] == "success", answer
        return answer["data"]

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query. Raises AssertionError with what Prometheus says against it."""
        try:
            return (await self.ask("/api/v1/query", query=expression))["result"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{expression}: {error.read().decode()}") from None

    async def ready(self) -> bool:
        try:
            await asyncio.to_thread(lambda: urllib.request.urlopen(f"{self.url}/-/ready", timeout=5).close())
        except OSError:
            return False
        return True


@contextlib.asynccontextmanager
async def prometheus(folder: Path, target: str) -> AsyncIterator[Prometheus]:
    """Scrapes ``target`` (host:port) twice a second, under our rules."""
    configuration = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES), str(ALERTS)],
        "scrape_configs": [{"job_name": "tokenbus", "static_configs": [{"targets": [target]}]}],
    }
    file = folder / "prometheus.yaml"
    file.write_text(json.dumps(configuration))
    address = f"127.0.0.1:{free_port()}"
    with (folder / "prometheus.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            "prometheus",
            f"--config.file={file}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address={address}",
            stdout=log,
            stderr=log,
        )
    try:
        running = Prometheus(f"http://{address}")
        async with asyncio.timeout(30):
            while not await running.ready():
                assert process.returncode is None, (folder / "prometheus.log").read_text()
                await asyncio.sleep(0.1)
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
