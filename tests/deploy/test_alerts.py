"""Prometheus itself accepts the alerts, and they fire when they should."""

import shutil
import subprocess
from pathlib import Path

import pytest

ALERTS = Path(__file__).parents[2] / "deploy" / "prometheus" / "alerts.yaml"

pytestmark = pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool")

#: The broker's figure, once a minute: it stands still, then grows by one.
SCENARIO = f"""
rule_files: [{ALERTS}]
evaluation_interval: 1m
tests:
  - interval: 1m
    input_series:
      - series: tokenbus_broker_dropped_messages_total
        values: 7x10 8x10
    promql_expr_test:
      - {{expr: count(ALERTS), eval_time: 9m}}
      - {{expr: count(ALERTS), eval_time: 12m, exp_samples: [{{labels: "{{}}", value: 1}}]}}
      - {{expr: count(ALERTS), eval_time: 18m}}
"""


def promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_are_accepted():
    assert "1 rules found" in promtool("check", "rules", str(ALERTS))


def test_the_alert_fires_when_messages_are_dropped_and_ends_when_they_are_not(tmp_path):
    scenario = tmp_path / "scenario.yaml"
    scenario.write_text(SCENARIO)
    promtool("test", "rules", str(scenario))
