"""Batcher and runner in one process, so that a test decides what comes when."""

import random
from pathlib import Path

import torch
from transformers import PreTrainedModel

from protocol.plan import Sampling
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.policies import PolicyName
from scheduler.core.sequence import Sequence
from workers.attention import choose
from workers.grammar import Grammars
from workers.model import adopt
from workers.packing import pack
from workers.runner import Runner


class LocalEngine:
    def __init__(
        self,
        module: PreTrainedModel,
        *,
        attention: str = "auto",
        weights: str = "auto",
        running: int = 8,
        budget: int = 24,
        blocks: int = 64,
        block_size: int = 8,
        longest: int = 128,
        policy: PolicyName = "fair",
        prefix_cache: bool = False,
        tokenizer: Path = Path(),
    ) -> None:
        model = adopt(module, Path())
        device = torch.device("cpu")
        kind = choose(
            attention, device, torch.float32, model.layers, block_size=block_size, attributes=model.attributes
        )
        pack(model.module, weights)
        backend = kind(model.layers, blocks, block_size, torch.float32, device)
        pool = BlockPool(blocks, block_size, prefix_cache=prefix_cache)
        self.batcher = Batcher(Limits(running, budget, longest), pool, policies.create(policy))
        grammars = Grammars(tokenizer, model.vocab_size, model.eos_ids)
        self.runner = Runner(
            model.module, backend, grammars=grammars, max_running=running, max_model_len=longest
        )  # fmt: skip
        self.outputs: dict[str, list[int]] = {}

    def submit(
        self, id: str, prompt: list[int], length: int, sampling: Sampling | None = None, stop=frozenset()
    ) -> None:
        self.outputs[id] = []
        self.batcher.submit(Sequence(id, prompt, max_tokens=length, stop_ids=stop, sampling=sampling or Sampling()))

    def step(self) -> bool:
        plan = self.batcher.plan()
        if plan is None:
            return False
        result = self.runner.step(plan)
        for event in self.batcher.apply(result.step, result.tokens):
            self.outputs[event.id].append(event.token)
        return True

    def finish(self) -> dict[str, list[int]]:
        while self.step():
            pass
        assert self.batcher.pool.num_free == self.batcher.pool.num_blocks
        return self.outputs


def workload(seed: int, count: int, vocab: int, longest_prompt: int = 40, longest_output: int = 24):
    """Random prompts and output lengths: ``[(prompt, length), …]``."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, vocab) for _ in range(draw.randint(1, longest_prompt))], draw.randint(1, longest_output))
        for _ in range(count)
    ]
