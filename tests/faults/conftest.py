"""A tiny model with the demo model's tokenizer, whose ids reach far beyond the tiny vocabulary."""

import shutil
from pathlib import Path

import pytest

from tests.workers.models import save, tiny
from workers.weights import demo_model


def make_model(folder: Path) -> Path:
    save(tiny("llama", max_position_embeddings=4096), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo_model() / name, folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("faults") / "model")
