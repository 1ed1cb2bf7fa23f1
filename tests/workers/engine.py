"""Batcher and runner in one process, so that a test decides what comes when."""

import random
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from transformers import PreTrainedModel

from protocol.plan import Sampling, Scored, StepResult
from scheduler.core import policies
from scheduler.core.batch import Limits
from scheduler.core.batcher import Batcher
from scheduler.core.blocks import BlockPool
from scheduler.core.policies import PolicyName
from scheduler.core.sequence import Sequence
from scheduler.core.speculation import Speculation
from scheduler.journal.entry import sequence_id
from scheduler.sampling import seed_of
from workers import tensor_parallel
from workers.attention import choose
from workers.draft_model import DraftModel
from workers.drafts import Drafter, NGram
from workers.grammar import Grammars
from workers.invariant import fix_shapes, one_by_one
from workers.lora import Adapters
from workers.model import Model, adopt
from workers.packing import pack
from workers.ranks import Ranks
from workers.runner import Runner


class LocalEngine:
    """``draft``: ``ngram``, or a draft model; then at most ``max_draft`` tokens are drafted, in steps of less than ``cheap``.

    ``ranks``: of these only this one's share; all of them must be told the same.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        *,
        attention: str = "auto",
        weights: str = "auto",
        kv_dtype: torch.dtype | None = None,
        running: int = 8,
        budget: int = 24,
        blocks: int = 64,
        block_size: int = 8,
        longest: int = 128,
        policy: PolicyName = "fair",
        prefix_cache: bool = False,
        tokenizer: Path = Path(),
        draft: str | PreTrainedModel | None = None,
        max_draft: int = 5,
        cheap: int = 64,
        adapters: Mapping[str, Path] | None = None,
        max_adapters: int = 8,
        batch_invariant: bool = False,
        ranks: Ranks | None = None,
        graphs: bool = False,
    ) -> None:
        def backend(model: Model):
            kind = choose(
                attention, model.device, model.dtype, model.layers, block_size=block_size, attributes=model.attributes
            )
            if batch_invariant:
                kind = one_by_one(kind)
            return kind(model.layers, blocks, block_size, model.dtype, model.device, kv_dtype)

        model = adopt(module, Path())
        agree = None
        if ranks is not None:
            model, agree = tensor_parallel.share(model, ranks, model.device), tensor_parallel.agree
        pack(model.module, weights)
        loaded = Adapters(model.module, adapters or {}, max_adapters)
        if batch_invariant:
            fix_shapes(model.module)
        drafter: Drafter | None = NGram() if draft == "ngram" else None
        if isinstance(draft, PreTrainedModel):
            guessing = adopt(draft, Path())
            drafter = DraftModel(guessing, backend(guessing), agree=agree)
        pool = BlockPool(blocks, block_size, prefix_cache=prefix_cache)
        speculation = Speculation(max_draft, cheap) if drafter else None
        limits = Limits(running, budget, longest, max_adapters)
        self.batcher = Batcher(limits, pool, policies.create(policy), speculation)
        self.runner = Runner(
            model.module,
            backend(model),
            hidden=model.hidden,
            grammars=Grammars(tokenizer, model.vocab_size, model.eos_ids),
            max_running=running,
            max_model_len=longest,
            adapters=loaded,
            drafter=drafter,
            agree=agree,
        )
        if graphs:
            self.runner.capture()
        self.outputs: dict[str, list[int]] = {}
        self.scored: dict[str, list[Scored]] = {}
        self.prompts: dict[str, dict[int, Scored]] = {}
        self.pooled: dict[str, list[tuple[int, bytes]]] = {}
        self.completed: list[str] = []
        self.accepted: list[tuple[int, int]] = []

    def submit(
        self,
        id: str,
        prompt: list[int],
        length: int,
        sampling: Sampling | None = None,
        stop=frozenset(),
        *,
        adapter: str = "",
        choices: int = 1,
        priority: int = 0,
    ) -> None:
        sampling = sampling or Sampling()
        sequences = [
            Sequence(
                sequence_id(id, index),
                prompt,
                max_tokens=length,
                stop_ids=stop,
                sampling=msgspec.structs.replace(sampling, seed=seed_of(sampling.seed, index)),
                adapter=adapter,
                priority=priority,
            )
            for index in range(choices)
        ]
        self.outputs |= {sequence.id: [] for sequence in sequences}
        self.batcher.submit(*sequences)

    def step(self) -> bool:
        result = self.run_next()
        if result is None:
            return False
        self.apply(result)
        return True

    def run_next(self) -> StepResult | None:
        """Plan a step and run it; its result may be applied later."""
        plan = self.batcher.plan()
        return None if plan is None else self.runner.step(plan)

    def apply(self, result: StepResult) -> None:
        draft = self.batcher.draft_of(result)
        for index, scored in result.scored.items():
            self.scored.setdefault(draft.samplers[index].id, []).append(scored)
        for index, part in result.prompts.items():
            sequence, _ = draft.owners[index]
            self.prompts.setdefault(sequence.id, {}).update(enumerate(part, start=draft.first_scored(index)))
        for index, part in result.pooled.items():
            self.pooled.setdefault(draft.owners[index][0].id, []).append((draft.rows[index].start, part))
        self.accepted += [(verdict.accepted, verdict.drafted) for verdict in result.verdicts]
        for event in self.batcher.apply(result.step, result.tokens, result.verdicts):
            self.outputs[event.id].append(event.token)
        self.completed += [sequence.id for sequence in draft.prefills]

    def finish(self, *, ahead: int = 1) -> dict[str, list[int]]:
        """Until all have ended, with so many steps planned before the first one's result is known."""
        results: deque[StepResult] = deque()
        while True:
            while len(results) < ahead and (result := self.run_next()) is not None:
                results.append(result)
            if not results:
                break
            self.apply(results.popleft())
        assert self.batcher.pool.num_free == self.batcher.pool.num_blocks
        return self.outputs


def workload(seed: int, count: int, vocab: int, longest_prompt: int = 40, longest_output: int = 24):
    """Random prompts and output lengths: ``[(prompt, length), …]``."""
    draw = random.Random(seed)
    return [
        ([draw.randrange(3, vocab) for _ in range(draw.randint(1, longest_prompt))], draw.randint(1, longest_output))
        for _ in range(count)
    ]
