"""What is made from the types of the configuration is up to date, and says everything."""

import re

import msgspec
import pytest

from scheduler import settings
from scheduler.config import Config, TenantConfig
from scheduler.sources import load


def test_the_page_is_up_to_date():
    text = settings.PAGE.read_text()
    assert settings.page(text) == text, "run python -m scheduler.settings"


def test_the_charts_schema_is_up_to_date():
    text = settings.VALUES_SCHEMA.read_text()
    assert settings.values_schema(text) == text, "run python -m scheduler.settings"


def test_the_page_has_every_setting_once():
    expected = [
        f"{field.name}.{name}"
        for field in msgspec.structs.fields(Config)
        if field.name != "tenants"
        for name in field.type.__struct_fields__
    ]
    expected += [f"tenants.NAME.{name}" for name in TenantConfig.__struct_fields__]
    assert sorted(re.findall(r"^\| `([\w.]+)` \|", settings.PAGE.read_text(), flags=re.MULTILINE)) == sorted(expected)


@pytest.mark.parametrize(
    ("setting", "words", "default"),
    [
        ("engine.max_running", "integer at least 1", "`64`"),
        ("engine.step_timeout_s", "number over 0", "`60.0`"),
        ("metrics.port", "integer at least 0, at most 65535", "`9464`"),
        ("service.log_level", "`debug`, `error`, `info`, `warning`", '`"info"`'),
        ("limits.requests_per_s", "number at least 1e-05, at most 1000000.0", ""),
        ("engine.shared_prefixes", "list of: string of at least 1 characters", "`[]`"),
    ],
)
def test_a_setting_is_told_in_words(setting, words, default):
    assert f"| `{setting}` | {words} | {default} |" in settings.PAGE.read_text()


def test_the_defaults_on_the_page_are_accepted():
    rows = re.findall(r"^\| `([\w.]+)` \| .* \| `(.+)` \|$", settings.PAGE.read_text(), flags=re.MULTILINE)
    flags = {
        name: value.strip('"') for name, value in rows if not name.startswith("tenants.") and value not in ("[]", "{}")
    }
    assert load(flags=flags) == Config()
