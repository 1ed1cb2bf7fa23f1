"""Whose deadline passes next, on a clock of the test's own."""

import asyncio
import random

from scheduler.deadlines import Deadlines


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_they_pass_in_order_and_not_before():
    clock = Clock()
    deadlines = Deadlines(clock)
    times = random.Random(3).sample(range(1, 101), 100)
    for at in times:
        deadlines.add(f"r{at}", float(at))
    for at in range(1, 101):
        clock.now = at - 0.5
        waiting = asyncio.create_task(deadlines.passed())
        await asyncio.sleep(0)
        assert not waiting.done()
        waiting.cancel()
        clock.now = float(at)
        assert await deadlines.passed() == f"r{at}"
    assert len(deadlines) == 0


async def test_one_that_comes_later_and_is_due_sooner_is_waited_for():
    """The first one is an hour away on the real clock, too."""
    clock = Clock()
    deadlines = Deadlines(clock)
    deadlines.add("later", 3600.0)
    waiting = asyncio.create_task(deadlines.passed())
    await asyncio.sleep(0)
    deadlines.add("sooner", -1.0)
    async with asyncio.timeout(10):
        assert await waiting == "sooner"


async def test_the_real_clock_wakes_it():
    deadlines = Deadlines(lambda: asyncio.get_running_loop().time())
    deadlines.add("a", asyncio.get_running_loop().time() + 0.05)
    async with asyncio.timeout(10):
        assert await deadlines.passed() == "a"


async def test_what_was_dropped_never_passes_and_takes_no_room():
    clock = Clock()
    deadlines = Deadlines(clock)
    for number in range(1000):
        deadlines.add(f"r{number}", float(number % 7))
    for number in range(1000):
        if number != 500:
            deadlines.drop(f"r{number}", float(number % 7))
    assert len(deadlines) == 1
    clock.now = 10.0
    assert await deadlines.passed() == "r500"
    deadlines.drop("r500", float(500 % 7))
