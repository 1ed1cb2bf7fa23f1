"""Two processes that share a model say what one says, whatever shares the batch; what can't be shared is refused."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from protocol.plan import Sampling
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import SERVED, tiny
from workers.model import ModelRefused, adopt
from workers.ranks import Ranks
from workers.tensor_parallel import check, share

PLANLESS = {"gpt2", "gpt_oss"}
_here: list[Ranks] = []


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Calls a function with its rank's `Ranks` in two gloo processes, and returns what it returned in each."""
    context = multiprocessing.get_context("spawn")
    indices = context.SimpleQueue()
    for index in range(2):
        indices.put(index)
    store = tmp_path_factory.mktemp("ranks") / "store"
    with ProcessPoolExecutor(2, context, initializer=_join, initargs=(indices, store)) as pool:
        # Whatever is called waits for the other rank, so neither is given both calls.
        yield lambda function, *arguments: list(pool.map(_call, [(function, *arguments)] * 2))


def _join(indices, store: Path) -> None:
    torch.set_num_threads(1)
    _here.append(Ranks(2, indices.get(), store))
    _here[0].join(torch.device("cpu"))


def _call(call: tuple[Callable, ...]):
    function, *arguments = call
    return function(_here[0], *arguments)


def answers(ranks: Ranks | None, kind: str, draft: str | None) -> dict[str, list[int]]:
    """Greedy and drawn, two texts of one prompt among them, with chunks and preemptions."""
    drafter = tiny(kind, num_hidden_layers=1) if draft == "model" else draft
    engine = LocalEngine(tiny(kind), ranks=ranks, running=6, budget=13, blocks=14, longest=100, draft=drafter)
    for index, (prompt, length) in enumerate(workload(seed=5, count=8, vocab=97, longest_prompt=24, longest_output=40)):
        sampling = Sampling(temperature=1.0, seed=index, top_k=20) if index % 2 else Sampling()
        engine.submit(str(index), prompt, length, sampling, choices=2 if index == 1 else 1)
    return engine.finish(ahead=2)


def unlike_the_whole(ranks: Ranks) -> str:
    """What is said to a plan that gives every summand's sum twice."""
    module = tiny("llama")
    module.tp_plan["model.norm"] = "moe_tp_experts"
    try:
        share(adopt(module, Path()), ranks, module.device)
    except ModelRefused as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", sorted(SERVED.keys() - PLANLESS))
def test_two_ranks_say_what_one_process_says(both, kind):
    draft = {"llama": "model", "qwen2": "ngram"}.get(kind)
    expected = answers(None, kind, draft)
    assert both(answers, kind, draft) == [expected, expected]


def test_a_plan_that_computes_something_else_is_refused_by_every_rank(both):
    for told in both(unlike_the_whole):
        assert "llama: logits of its shares differ from a plain forward by" in told


@pytest.mark.parametrize(
    ("kind", "count", "reason"),
    [
        ("gpt2", 2, "gpt2: transformers has no tensor-parallel plan for it"),
        ("gpt_oss", 2, "gpt_oss: transformers has no tensor-parallel plan for it"),
        ("llama", 3, "llama: num_attention_heads = 4 must be a multiple of model.tensor_parallel = 3"),
        ("llama", 4, "llama: num_key_value_heads = 2 must be a multiple of model.tensor_parallel = 4"),
    ],
)
def test_models_that_cannot_be_shared_are_refused(kind, count, reason):
    with pytest.raises(ModelRefused, match=reason):
        check(adopt(tiny(kind), Path()), Ranks(count))


def test_a_style_that_is_not_known_is_refused():
    module = tiny("llama")
    module.tp_plan["model.layers.*.mlp.down_proj"] = "packed_colwise"
    with pytest.raises(ModelRefused, match=r"says 'packed_colwise' of model\.layers\.0\.mlp\.down_proj, a Linear"):
        check(adopt(module, Path()), Ranks(2))
