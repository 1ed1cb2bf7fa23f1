"""llama.cpp's batch interface, float32 weights and KV cache, driven as its server drives it.

Every step holds a token of each sequence that decodes, and as much of the prompts as fits beside them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import llama_cpp as llama
import numpy as np

from benchmarks.peers.job import Generate, Item, Job, Output, answer

#: The context of a sequence is a multiple of this many cells.
_CELLS = 256


@dataclass(slots=True)
class _Sequence:
    item: Item
    slot: int
    computed: int = 0
    output: list[int] = field(default_factory=list)

    @property
    def pending(self) -> list[int]:
        """Tokens that are known and not computed."""
        prompt = self.item.prompt_token_ids
        known = len(prompt)
        return prompt[self.computed :] if self.computed < known else self.output[self.computed - known :]

    @property
    def done(self) -> bool:
        return len(self.output) == self.item.max_tokens


class _Engine:
    def __init__(self, job: Job) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(job.model.encode(), llama.llama_model_default_params())
        if not self._model:
            raise RuntimeError("llama.cpp could not load the model")
        parameters = llama.llama_context_default_params()
        parameters.n_seq_max = job.max_running
        parameters.n_ctx = job.max_running * -(-job.longest // _CELLS) * _CELLS
        parameters.n_threads = parameters.n_threads_batch = job.threads
        parameters.type_k = parameters.type_v = llama.GGML_TYPE_F32
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._room = llama.llama_n_batch(self._context)
        self._batch = llama.llama_batch_init(self._room, 0, 1)
        self._slots = job.max_running

    def generate(self, items: list[Item]) -> dict[int, Output]:
        waiting, running, free = items[::-1], list[_Sequence](), list(range(self._slots))
        outputs = {}
        while waiting or running:
            while waiting and free:
                running.append(_Sequence(waiting.pop(), free.pop()))
            self._step(running)
            for sequence in [each for each in running if each.done]:
                running.remove(sequence)
                free.append(sequence.slot)
                llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), sequence.slot, -1, -1)
                # The last token is never computed.
                prompt_tokens = sequence.computed - len(sequence.output) + 1
                outputs[sequence.item.id] = Output(prompt_tokens, sequence.output)
        return outputs

    def _step(self, running: list[_Sequence]) -> None:
        batch, sampled = self._batch, dict[int, _Sequence]()
        batch.n_tokens = 0
        # Those that decode come first; a stable sort keeps the order of arrival.
        for sequence in sorted(running, key=lambda each: not each.output):
            pending = sequence.pending
            taken = pending[: self._room - batch.n_tokens]
            for token in taken:
                self._put(token, sequence)
            if taken and len(taken) == len(pending):
                batch.logits[batch.n_tokens - 1] = True
                sampled[batch.n_tokens - 1] = sequence
        if status := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode ended with status {status}")
        for row, sequence in sampled.items():
            logits = llama.llama_get_logits_ith(self._context, row)
            sequence.output.append(int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax()))

    def _put(self, token: int, sequence: _Sequence) -> None:
        batch, row = self._batch, self._batch.n_tokens
        batch.token[row], batch.pos[row] = token, sequence.computed
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence.slot
        batch.logits[row] = False
        batch.n_tokens += 1
        sequence.computed += 1


@contextmanager
def loaded(job: Job) -> Iterator[Generate]:
    yield _Engine(job).generate


if __name__ == "__main__":
    answer(loaded)
