"""Log probabilities: the model's own, whatever is drawn with, and whatever the batch does meanwhile."""

import math

import pytest
import torch

from protocol.plan import Sampling
from tests.workers.engine import LocalEngine, workload
from tests.workers.models import tiny
from workers.scores import score

SAMPLING = Sampling(0.9, top_k=30, seed=3, repetition_penalty=1.2, logprobs=3, prompt_logprobs=2)


def reference(model, tokens: list[int]) -> torch.Tensor:
    """Log probabilities ``[T, V]`` of what comes after each token, by the plain forward pass."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def check(scored, logprobs: torch.Tensor, most: int) -> None:
    assert scored.logprob == pytest.approx(logprobs[scored.token].item(), abs=1e-4)
    assert scored.rank == pytest.approx(1 + (logprobs > logprobs[scored.token]).sum().item(), abs=1)
    values, _ = logprobs.topk(most)
    assert [value for _, value in scored.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert [value for _, value in scored.top] == pytest.approx(
        [logprobs[token].item() for token, _ in scored.top], abs=1e-4
    )


@pytest.mark.parametrize(
    "limits",
    [{"running": 12, "budget": 256}, {"running": 6, "budget": 12, "blocks": 14, "longest": 100, "prefix_cache": True}],
    ids=["together", "preempted in chunks with a prefix cache"],
)
def test_each_token_of_prompt_and_output_is_scored_as_the_plain_forward_pass_does(limits):
    plain = tiny("llama")
    requests = workload(seed=4, count=12, vocab=97, longest_prompt=24, longest_output=24)
    requests = [(([1, 2] * 12)[: len(prompt)] + prompt[-1:], length) for prompt, length in requests]
    engine = LocalEngine(tiny("llama"), **limits)
    for index, request in enumerate(requests):
        engine.submit(str(index), *request, SAMPLING if index % 3 else Sampling())
    outputs = engine.finish()
    if "blocks" in limits:
        assert engine.batcher.counters.preemptions > 0
        assert engine.batcher.counters.cached_tokens > 0
    assert set(engine.scored) == {str(index) for index in range(12) if index % 3}
    for id, scored in engine.scored.items():
        prompt, output = requests[int(id)][0], outputs[id]
        assert [each.token for each in scored] == output
        expected = reference(plain, prompt + output)
        for position, each in enumerate(scored, start=len(prompt)):
            check(each, expected[position - 1], 3)
        if len(prompt) > 1:
            assert sorted(engine.prompts[id]) == list(range(1, len(prompt)))
            for position, each in engine.prompts[id].items():
                assert each.token == prompt[position]
                check(each, expected[position - 1], 2)


def test_each_row_gets_as_many_as_it_asks_for_and_never_what_json_cannot_say():
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, -torch.inf, 1.0], [torch.nan, 0.0, 1.0]])
    first, second, third = score(logits, torch.tensor([2, 1, 1]), [0, 5, 2])
    assert (first.token, first.rank, first.top) == (2, 2, [])
    assert first.logprob == pytest.approx(logits[0].log_softmax(-1)[2].item())
    assert (second.logprob, second.rank, len(second.top)) == (-9999.0, 3, 3)
    assert all(math.isfinite(value) for each in (second, third) for _, value in each.top)
