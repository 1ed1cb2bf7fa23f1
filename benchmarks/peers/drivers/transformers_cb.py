"""transformers' own continuous batching, every request in flight at once."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.peers.job import Generate, Item, Job, Output, answer

_NO_TOKEN = -1


@contextmanager
def loaded(job: Job) -> Iterator[Generate]:
    torch.set_num_threads(job.threads)
    dtype, device = job.options.get("dtype", "float32"), job.options.get("device", "cpu")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype, attn_implementation="sdpa").eval().to(device)
    config = GenerationConfig(do_sample=False, eos_token_id=_NO_TOKEN)

    with torch.no_grad(), model.continuous_batching_context_manager(generation_config=config) as manager:

        def generate(items: list[Item]) -> dict[int, Output]:
            for item in items:
                manager.add_request(
                    item.prompt_token_ids,
                    request_id=str(item.id),
                    max_new_tokens=item.max_tokens,
                    eos_token_id=_NO_TOKEN,
                )
            outputs: dict[int, Output] = {}
            for result in manager:
                if result.error:
                    raise RuntimeError(result.error)
                outputs[int(result.request_id)] = Output(len(result.prompt_ids), list(result.generated_tokens))
                if len(outputs) == len(items):
                    break
            return outputs

        yield generate


if __name__ == "__main__":
    answer(loaded)
