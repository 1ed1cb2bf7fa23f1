"""OpenVINO GenAI's continuous batching, from a GGUF of float16 weights: its reader takes no float32."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.job import Generate, Item, Job, Output, answer

_STEP_TOKENS = 256


@contextmanager
def loaded(job: Job) -> Iterator[Generate]:
    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs = job.max_running
    scheduler.max_num_batched_tokens = _STEP_TOKENS
    properties = {"INFERENCE_NUM_THREADS": job.threads, **job.options}
    pipeline = genai.ContinuousBatchingPipeline(job.model, scheduler, "CPU", properties)

    def generate(items: list[Item]) -> dict[int, Output]:
        prompts = [ov.Tensor(np.array([item.prompt_token_ids], dtype=np.int64)) for item in items]
        done = pipeline.generate(prompts, [_greedy(item) for item in items])
        return {
            item.id: Output(prompt.shape[1], list(result.m_generation_ids[0]))
            for item, prompt, result in zip(items, prompts, done, strict=True)
        }

    yield generate


def _greedy(item: Item) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = item.max_tokens
    config.ignore_eos = True
    config.do_sample = False
    return config


if __name__ == "__main__":
    answer(loaded)
