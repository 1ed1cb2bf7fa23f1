"""What a model says of how its tokens are drawn."""

from pathlib import Path

import pytest
from transformers import GenerationConfig

from protocol.plan import Sampling
from tests.workers.models import save, tiny
from workers.model import adopt, load


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (GenerationConfig(), Sampling(1.0)),
        (GenerationConfig(do_sample=True, temperature=0.6, top_k=20, top_p=0.95), Sampling(0.6, 20, 0.95)),
        (
            GenerationConfig(do_sample=True, min_p=0.1, typical_p=0.9, repetition_penalty=1.05),
            Sampling(1.0, 0, 1.0, 0.1, typical_p=0.9, repetition_penalty=1.05),
        ),
    ],
)
def test_defaults_come_from_generation_config(config, sampling, tmp_path):
    model = tiny("llama")
    model.generation_config = config
    assert load(str(save(model, tmp_path)), "float32", "cpu").sampling == sampling


def test_a_model_without_one_has_openai_s_defaults():
    model = tiny("llama")
    model.generation_config = None
    assert adopt(model, Path()).sampling == Sampling(1.0)
