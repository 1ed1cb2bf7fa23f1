"""vLLM on the CPU, float32."""

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.peers.job import Generate, Item, Job, Output, answer

_KV_BYTES = 2 << 30


@contextmanager
def loaded(job: Job) -> Iterator[Generate]:
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - its own processes import this file, too

    llm = LLM(
        model=job.model,
        dtype="float32",
        max_num_seqs=job.max_running,
        max_model_len=job.longest,
        kv_cache_memory_bytes=_KV_BYTES,
        enforce_eager=job.options["compile"] == "no",
    )

    def generate(items: list[Item]) -> dict[int, Output]:
        done = llm.generate(
            [{"prompt_token_ids": item.prompt_token_ids} for item in items],
            [
                SamplingParams(temperature=0, max_tokens=item.max_tokens, ignore_eos=True, detokenize=False)
                for item in items
            ],
            use_tqdm=False,
        )
        return {
            item.id: Output(len(request.prompt_token_ids), list(request.outputs[0].token_ids))
            for item, request in zip(items, done, strict=True)
        }

    yield generate


if __name__ == "__main__":
    answer(loaded)
