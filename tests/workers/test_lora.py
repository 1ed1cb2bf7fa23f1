"""LoRA adapters: every row's tokens are what PEFT gives for its own adapter, whatever else is in the batch."""

import copy
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from protocol.plan import Sampling
from scheduler.sampling import seed_of
from tests.workers.adapters import adapt
from tests.workers.engine import LocalEngine
from tests.workers.models import generate, tiny
from workers.adapted import AdaptedLinear
from workers.lora import AdapterRefused, Adapters
from workers.packing import pack

# PEFT asks transformers for something that is on its way out.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ATTENTION = ["q_proj", "v_proj"]
EVERYTHING = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "small": {"r": 2, "lora_alpha": 4, "target_modules": ATTENTION},
    "large": {"r": 8, "lora_alpha": 16, "target_modules": EVERYTHING},
    "rs": {"r": 4, "lora_alpha": 8, "target_modules": ["up_proj"], "use_rslora": True},
}
LENGTH = 24


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny("llama")


@pytest.fixture(scope="module")
def adapted(base, tmp_path_factory) -> dict[str, tuple[Path, PeftModel]]:
    """Adapters on disk, and PEFT's own model with each."""
    folders = {name: tmp_path_factory.mktemp(name) for name in KINDS}
    return {name: (folders[name], adapt(base, folders[name], len(name), **KINDS[name])) for name in KINDS}


def paths(adapted) -> dict[str, Path]:
    return {name: path for name, (path, _) in adapted.items()}


def prompt(number: int) -> list[int]:
    return torch.randint(3, 97, (5 + 3 * number,), generator=torch.Generator().manual_seed(number)).tolist()


@pytest.mark.parametrize("weights", ["plain", "float32"])
@pytest.mark.parametrize("draft", ["ngram", "model"])
def test_drafts_change_no_token_of_an_adapter(base, adapted, draft, weights):
    way = draft if draft == "ngram" else copy.deepcopy(base)
    engine = LocalEngine(copy.deepcopy(base), weights=weights, adapters=paths(adapted), draft=way)
    rows = [(name or "base", name) for name in ("", *KINDS)]
    for id, name in rows:
        engine.submit(id, prompt(1), LENGTH, adapter=name)
    engine.finish(ahead=2)
    for id, name in rows:
        assert engine.outputs[id] == generate(adapted[name][1] if name else base, prompt(1), LENGTH), id
    assert sum(drafted for _, drafted in engine.accepted) > 0


@pytest.mark.parametrize("weights", ["plain", "float32"])
def test_each_row_of_a_mixed_batch_is_what_peft_gives(base, adapted, weights):
    engine = LocalEngine(copy.deepcopy(base), weights=weights, adapters=paths(adapted), prefix_cache=True)
    rows = [(f"{name or 'base'} {number}", name, number) for number in range(3) for name in ("", *KINDS)]
    for id, name, number in rows:
        engine.submit(id, prompt(number), LENGTH, adapter=name)
    engine.finish()
    for id, name, number in rows:
        assert engine.outputs[id] == generate(adapted[name][1] if name else base, prompt(number), LENGTH), id
    assert len({tuple(engine.outputs[id]) for id, _, number in rows if number == 0}) == len(KINDS) + 1


def test_several_texts_of_one_prompt_go_through_its_adapter(base, adapted):
    def texts(choices: int, *seeds: int) -> dict[str, list[int]]:
        engine = LocalEngine(copy.deepcopy(base), adapters=paths(adapted))
        for seed in seeds:
            sampling = Sampling(1.0, seed=seed)
            engine.submit(f"{seed}", prompt(2), LENGTH, sampling, adapter="large", choices=choices)
        return engine.finish()

    together, seeds = texts(3, 5), [seed_of(5, index) for index in range(3)]
    assert list(together.values()) == list(texts(1, *seeds).values())
    assert len({tuple(text) for text in together.values()}) == 3


def test_adapted_layers_stay_fused(base, adapted):
    packed, plain = copy.deepcopy(base), copy.deepcopy(base)
    pack(packed, "float32")
    expected = {type(layer) for layer in packed.modules()}
    assert Adapters(packed, paths(adapted), 1)
    assert {type(layer) for layer in packed.modules()} == expected
    assert Adapters(plain, paths(adapted), 1)
    assert AdaptedLinear in {type(layer) for layer in plain.modules()}


def test_one_place_serves_them_one_after_the_other(base, adapted):
    engine = LocalEngine(copy.deepcopy(base), adapters=paths(adapted), max_adapters=1)
    for number, name in enumerate([*KINDS, *KINDS]):
        engine.submit(f"{name} {number}", prompt(number), LENGTH, adapter=name)
    most = 0
    while engine.step():
        most = max(most, len({sequence.adapter for sequence in engine.batcher.running.values()}))
    assert most == 1
    for number, name in enumerate([*KINDS, *KINDS]):
        assert engine.outputs[f"{name} {number}"] == generate(adapted[name][1], prompt(number), LENGTH)


def change(path: Path, tmp_path: Path, **settings) -> Path:
    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"peft_type": "IA3"}, "type IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"r": 3}, "other shapes"),
    ],
)
def test_what_would_be_served_wrongly_is_refused(base, adapted, tmp_path, settings, reason):
    path, packed = change(adapted["small"][0], tmp_path, **settings), copy.deepcopy(base)
    pack(packed, "float32")
    for module in (copy.deepcopy(base), packed):
        with pytest.raises(AdapterRefused, match=reason):
            Adapters(module, {"bad": path}, 1)


def test_an_adapter_of_another_model_or_none_at_all_is_refused(adapted, tmp_path):
    with pytest.raises(AdapterRefused, match="holds no PEFT adapter"):
        Adapters(tiny("llama"), {"bad": tmp_path}, 1)
    with pytest.raises(AdapterRefused, match="the model has no layer"):
        Adapters(tiny("gpt2"), {"bad": adapted["small"][0]}, 1)
