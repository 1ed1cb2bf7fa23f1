"""The prefix cache: what is found, for whom, and what goes first when blocks are needed."""

import pytest

from protocol.plan import Sampling
from scheduler.core.prefix import PrefixIndex
from tests.scheduler.core.drive import EOS, make, sequence, step

LONG = list(range(100, 120))


def computed(batcher, id: str) -> int:
    """Prompt tokens computed until the first token of a sequence."""
    total = 0
    while True:
        rows, events = step(batcher)
        total += rows.get(id, 0)
        if any(event.id == id for event in events):
            return total


def serve(batcher, id: str, prompt: list[int], max_tokens: int = 1) -> int:
    batcher.submit(sequence(id, prompt, max_tokens))
    count = computed(batcher, id)
    while id in batcher:
        step(batcher)
    return count


def test_a_prompt_that_begins_alike_is_computed_from_where_it_differs():
    batcher = make(cache=True, budget=64)
    assert serve(batcher, "a/1", LONG) == 20
    assert serve(batcher, "a/2", [*LONG[:10], 5, 6]) == 4, "two blocks of four are the same, the third differs"
    assert batcher.counters.cached_tokens == 8


def test_the_last_token_is_always_computed():
    batcher = make(cache=True, budget=64)
    assert [serve(batcher, f"a/{number}", LONG) for number in range(2)] == [20, 4]


def test_the_next_turn_of_a_chat_finds_the_last_answer():
    batcher = make(cache=True, budget=64)
    serve(batcher, "a/1", LONG, 9)
    # 28 positions were computed: the answer's last token never was.
    assert serve(batcher, "a/2", [*LONG, *[7] * 9, 1, 2, 3]) == 32 - 28


def test_a_tenant_finds_nothing_of_anothers():
    batcher = make(cache=True, budget=64)
    serve(batcher, "a/1", LONG)
    assert serve(batcher, "b/1", LONG) == 20
    assert serve(batcher, "a/2", LONG) == serve(batcher, "b/2", LONG) == 4


def test_what_is_public_is_found_by_all_in_whole_blocks():
    batcher = make(cache=True, budget=64)
    batcher.pool.share(LONG[:14])
    serve(batcher, "a/1", LONG)
    assert serve(batcher, "b/1", LONG) == 20 - 12
    assert serve(batcher, "c/1", [*LONG[:9], 1, 2, 3]) == 12 - 8, "of a prefix that differs later, what is the same"
    assert serve(batcher, "b/2", LONG) == 4, "what follows the public part is the tenant's own"


def test_what_a_sequence_would_be_spared_is_told_before_it_is_here():
    batcher = make(cache=True, budget=64)
    batcher.pool.share(LONG[:6])
    serve(batcher, "a/1", LONG)
    for id, prompt in (("a/2", LONG), ("a/3", [*LONG[:9], 1, 2]), ("b/1", LONG), ("a/4", [1, 2, 3, 4, 5])):
        told = batcher.pool.cached_len(sequence(id, prompt, 1))
        assert serve(batcher, id, prompt) == len(prompt) - told
    assert make(budget=64).pool.cached_len(sequence("a/1", LONG, 1)) == 0


@pytest.mark.parametrize(
    ("sampling", "computed"),
    [
        (Sampling(pooling="last"), 4),
        (Sampling(pooling="mean"), 20),
        (Sampling(prompt_logprobs=0), 20),
        (Sampling(prompt_logprobs=0, score_from=13), 8),
        (Sampling(prompt_logprobs=0, score_from=12), 12),
    ],
)
def test_what_is_to_be_told_of_a_prompt_is_computed_whatever_is_cached(sampling, computed):
    """Position 12 is scored by what is computed at 11, which is in the third block of four."""
    batcher = make(cache=True, budget=64)
    serve(batcher, "a/1", LONG)
    one = sequence("a/2", LONG, 0, sampling=sampling)
    assert batcher.pool.cached_len(one) == 20 - computed
    batcher.submit(one)
    (length,) = step(batcher)[0].values()
    assert length == computed
    assert serve(batcher, "a/3", LONG) == 4, "others find it"


def test_without_the_cache_nothing_is_found():
    batcher = make(budget=64)
    assert [serve(batcher, f"a/{number}", LONG) for number in range(2)] == [20, 20]


def test_cached_tokens_cost_nothing():
    batcher = make(cache=True, budget=64)
    serve(batcher, "a/1", LONG)
    before = batcher.queue.counter("a")
    serve(batcher, "a/2", LONG)
    assert batcher.queue.counter("a") - before == 4 + 2


def test_blocks_are_shared_while_both_run_and_counted_once():
    batcher = make(cache=True, budget=64)
    batcher.submit(sequence("a/1", LONG, 8))
    step(batcher)
    batcher.submit(sequence("a/2", LONG, 8))
    step(batcher)
    one, two = batcher.running.values()
    assert one.blocks[:4] == two.blocks[:4]
    assert batcher.pool.num_blocks - batcher.pool.num_free == len(set(one.blocks) | set(two.blocks)) == 7
    batcher.end("a/1")
    assert batcher.pool.num_blocks - batcher.pool.num_free == len(two.blocks)


def test_who_was_preempted_finds_what_it_had_computed():
    batcher = make(cache=True, budget=64, blocks=12, longest=48)
    batcher.submit(sequence("a/1", 16, 16))
    batcher.submit(sequence("a/2", 16, 12))
    while not batcher.counters.preemptions:
        step(batcher)
    while len(batcher):
        step(batcher)
    assert batcher.counters.cached_tokens > 0
    assert batcher.queue.served("a") == 16 + 16 + 2 * (16 + 12), "and pays nothing twice"


def test_the_least_recently_used_goes_first_and_of_a_sequence_its_end():
    batcher = make(cache=True, budget=64, blocks=12, longest=48)
    serve(batcher, "a/1", LONG)
    serve(batcher, "a/2", [*range(200, 220)])
    assert serve(batcher, "a/3", [*LONG[:9], 1]) == 2, "used again"
    serve(batcher, "a/4", [*range(300, 324)])  # six blocks: two free ones, then the end of LONG, then the end of a/2
    assert serve(batcher, "a/5", [*LONG[:9], 2]) == 2
    assert serve(batcher, "a/6", [*range(200, 220)]) > 4


def test_a_lost_worker_takes_the_cache_with_it():
    batcher = make(cache=True, budget=64)
    serve(batcher, "a/1", LONG)
    batcher.restart()
    assert serve(batcher, "a/2", LONG) == 20


def test_a_step_that_failed_leaves_nothing_to_be_found():
    batcher = make(cache=True, budget=64)
    batcher.submit(sequence("a/1", LONG, 4))
    batcher.plan()
    batcher.fail(lost=False)
    batcher.end("a/1")
    assert serve(batcher, "a/2", LONG) == 20


def test_a_sequence_that_ends_early_is_found_up_to_what_was_computed():
    batcher = make(cache=True, budget=64)
    batcher.submit(sequence("a/1", LONG, 8))
    step(batcher, EOS)
    assert batcher.pool.num_free == batcher.pool.num_blocks
    assert batcher.pool.num_kept == 5


def test_equal_hashes_are_told_apart():
    """In CPython hash(-1) == hash(-2), so these keys collide."""
    index = PrefixIndex(4)
    assert hash((0, "", (-1,))) == hash((0, "", (-2,)))
    index.add(0, "", [-1], 3)
    assert index.find(0, "", [-2]) is None
    assert index.find(0, "", [-1]) == 3


def test_a_block_is_not_found_under_a_parent_that_was_evicted():
    batcher = make(cache=True, blocks=3, size=2, longest=6)
    serve(batcher, "a/1", [1, 2, 3, 4, 5])
    serve(batcher, "a/2", [9, 8, 7, 6, 5])
    assert serve(batcher, "a/3", [1, 2, 3, 4, 5]) == 5
