"""The commands as people type them."""

import asyncio
import json
import os
import re
import signal
import sys

import pytest

pytestmark = pytest.mark.timeout(240)

TOKENBUS = [sys.executable, "-m", "scheduler.cli"]


async def run(*arguments: str, stdin: bytes = b"", **environment: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *TOKENBUS,
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | environment,
    )
    out, err = await process.communicate(stdin)
    return process.returncode, out.decode(), err.decode()


async def test_serve_submit_and_stop(tmp_path):
    serving = await asyncio.create_subprocess_exec(
        *TOKENBUS,
        "serve",
        "--set",
        f"broker.data_dir={tmp_path}",
        "--set",
        "metrics.port=0",
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"TOKENBUS_ENGINE_MAX_RUNNING": "4", "TOKENBUS_ENGINE_KV_MEMORY_MB": "128"},
    )
    try:
        url = None
        lines = []
        while url is None:
            line = (await serving.stderr.readline()).decode()
            assert line, f"ended early: {lines}"
            lines.append(line)
            found = re.search(r"serving smollm2 at (\S+), metrics at", line)
            url = found and found[1]
        common = ("--broker", url, "--max-tokens", "8", "--temperature", "0")
        code, out, err = await run("submit", *common, "What is the capital of France?")
        assert (code, err) == (0, "")
        assert "Paris" in out
        code, again, _ = await run("submit", *common, "-", stdin=b"What is the capital of France?")
        assert (code, again) == (0, out)
        code, body, _ = await run("submit", *common, "--json", "What is the capital of France?")
        assert code == 0
        assert json.loads(body)["data"]["choices"][0]["message"]["content"] == out.removesuffix("\n")
        code, _, err = await run("submit", *common, "--model", "gpt-4", "Hello")
        assert (code, err) == (1, "Error: model: gpt-4 is not served here, smollm2 is\n")
        drawn = ("--min-tokens", "8", "--repetition-penalty", "1.2", "--frequency-penalty", "0.5", "--logprobs", "2")
        code, body, _ = await run("submit", *common, *drawn, "--json", "Hello")
        assert code == 0
        told = json.loads(body)["data"]["choices"][0]["logprobs"]["content"]
        assert [len(token["top_logprobs"]) for token in told] == [2] * 8
        code, several, _ = await run("submit", *common, "--n", "2", "What is the capital of France?")
        assert (code, several) == (0, f"{out}---\n{out}"), "greedy, so they are equal"
        code, _, err = await run("submit", *common, "--presence-penalty", "3", "Hello")
        assert (code, err) == (1, "Error: presence_penalty: Expected `float` <= 2.0\n")
        code, _, err = await run("submit", *common, "--priority", "101", "Hello")
        assert (code, err) == (1, "Error: priority: Expected `int` <= 100\n")
        code, _, err = await run("submit", *common, "--deadline-ms", "1", "What is the capital of France?")
        assert code == 1
        assert re.fullmatch(r"Error: request \w+ expired after 0 tokens\n", err)
    finally:
        serving.send_signal(signal.SIGTERM)
        rest = (await serving.stderr.read()).decode()
        code = await serving.wait()
    assert code == 0, rest
    ended = [line for line in "".join([*lines, rest]).splitlines() if "request ended" in line]
    expired = [line for line in ended if 'outcome="expired"' in line]
    assert len(expired) == 1
    ended = [line for line in ended if line not in expired]
    assert len(ended) == 5
    assert all("outcome=" in line and "ttft_s=" in line and "Paris" not in line for line in ended)


async def test_demo_runs_and_reports(tmp_path):
    code, out, err = await run("demo", "--json", "--set", f"broker.data_dir={tmp_path}")
    assert code == 0, err
    assert re.search(r"console\s+http://127\.0\.0\.1:\d+/console/", err)
    summary = json.loads(out)
    assert summary["requests"] == 6
    assert summary["mean_batch"] > 2
    assert summary["output_tokens"] > 100
    for tenant in ("alice", "bob", "carol"):
        assert tenant in err


async def test_what_keeps_it_from_starting_is_told_without_a_traceback(tmp_path):
    for arguments, message in (
        (("--set", "engine.max_runing=4"), "unknown field `max_runing`"),
        (("--set", f"model.path={tmp_path}", "--set", f"broker.data_dir={tmp_path}"), "config.json"),
        (("--config", str(tmp_path / "none.toml")), "none.toml"),
        (("--set", "broker.url=mqtt://svc:hunter2@host"), "broker.url: give the password apart"),
    ):
        code, _, err = await run("serve", "--set", "metrics.port=0", *arguments)
        assert code == 1
        assert message in err.splitlines()[-1]
        assert "Traceback" not in err
        assert "hunter2" not in err


async def test_credentials_that_cannot_be_used_are_told_without_a_traceback(tmp_path):
    none = str(tmp_path / "none")
    for arguments, message in (
        (("--password-file", none), f"password file {none}: No such file"),
        (("--broker", "mqtts://host", "--ca-file", none), f"{none} can't be read"),
        (("--broker", "mqtts://host", "--key-file", none), "a key file needs its certificate file"),
        (("--cert-file", none), "must begin with mqtts://"),
        (("--tenant", "+"), "tenant: must be 1 to 64 characters"),
    ):
        code, _, err = await run("submit", *arguments, "Hello")
        assert code == 1
        assert message in err
        assert "Traceback" not in err
