"""The pages name things that exist."""

import re
from pathlib import Path

import click
import pytest

from scheduler.cli import main
from scheduler.config import TenantConfig
from scheduler.sources import load

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_code_spans_exist(page):
    for name in re.findall(
        r"`((?:protocol|scheduler|workers|benchmarks|deploy|docs|tests)/[\w./-]*)`", page.read_text()
    ):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL))
    for line in re.findall(r"^(tokenbus [^#\n]*)", blocks, flags=re.MULTILINE):
        words = line.split()
        command = main.commands[words[1]]
        if isinstance(command, click.Group):
            command = command.commands.get(words[2], command)
        known = {
            option for parameter in command.params if isinstance(parameter, click.Option) for option in parameter.opts
        }
        if words[1] != "bench":
            assert {word for word in words if word.startswith("--")} <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configurations_can_be_loaded(page, tmp_path):
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL):
        file = tmp_path / "tokenbus.toml"
        file.write_text(block)
        load(file)


def test_every_setting_of_a_tenant_is_explained():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "docs/tenants.md").read_text(), flags=re.MULTILINE)
    assert rows == list(TenantConfig.__struct_fields__)
