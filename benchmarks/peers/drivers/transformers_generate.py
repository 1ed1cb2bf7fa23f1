"""transformers' `generate` on static batches, as in the ladder."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM

from benchmarks.baselines import static_batches
from benchmarks.peers.job import Generate, Item, Job, Output, answer
from benchmarks.workload import WorkItem


@contextmanager
def loaded(job: Job) -> Iterator[Generate]:
    torch.set_num_threads(job.threads)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype="float32").eval()

    def generate(items: list[Item]) -> dict[int, Output]:
        outputs = static_batches(model, [WorkItem(item.id, item.prompt_token_ids, item.max_tokens) for item in items])
        return {item.id: Output(len(item.prompt_token_ids), outputs[str(item.id)]) for item in items}

    with torch.inference_mode():
        yield generate


if __name__ == "__main__":
    answer(loaded)
