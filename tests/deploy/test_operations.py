"""What the operations pages tell to do can be done."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from helm_python.chart import Chart

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs/operations").glob("*.md"))
INSTALL = ROOT / "docs/operations/install.md"


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [line.partition("    #")[0] for line in "".join(blocks).splitlines()]


def told(start: str) -> list[str]:
    """The one command of the install page that starts so."""
    (found,) = (command for command in commands(INSTALL) if command.startswith(start))
    return shlex.split(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_commands_exist(page):
    named = re.findall(r"\bdeploy/[\w./-]+", " ".join([*commands(page), *re.findall(r"`([^`\n]+)`", page.read_text())]))
    made = "deploy/compose/secrets/"
    assert {name for name in named if not name.startswith(made) and not (ROOT / name).exists()} == set()


def test_files_are_installed_where_the_unit_looks_for_them(tmp_path):
    for folder in ("etc/systemd/system", "etc/tokenbus"):
        (tmp_path / folder).mkdir(parents=True)
    for command in commands(INSTALL):
        if command.startswith("install "):
            subprocess.run(
                shlex.split(command.replace(" /etc/", f" {tmp_path}/etc/")), cwd=ROOT, check=True, timeout=10
            )
    unit = (tmp_path / "etc/systemd/system/tokenbus.service").read_text()
    (settings,) = re.findall(r"--config (\S+)", unit)
    assert (tmp_path / settings.lstrip("/")).exists()


def test_the_chart_is_installed_as_told():
    values: dict = {}
    words = told("helm install")
    for assignment in (words[index + 1] for index, word in enumerate(words) if word == "--set"):
        path, _, value = assignment.partition("=")
        *parents, last = path.split(".")
        target = values
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    rendered = Chart.load(ROOT / words[3]).render(values, name=words[2])
    assert values["settings"]["broker"]["url"] in rendered["tokenbus/templates/configmap.yaml"]
    stateful_set = yaml.safe_load(rendered["tokenbus/templates/statefulset.yaml"])
    secrets = [
        volume["secret"]["secretName"]
        for volume in stateful_set["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    ]
    made = told("kubectl create secret generic")
    assert secrets == [made[4]]
    keys = {word.removeprefix("--from-file=").partition("=")[0] for word in made[5:]}
    settings = Chart.load(ROOT / words[3]).values["settings"]["broker"]
    assert keys == {Path(settings[name]).name for name in ("ca_file", "cert_file", "key_file")}
