"""Who goes first, and that no turn is lost."""

from __future__ import annotations

import asyncio
import random

from ingest.turns import Turns


async def finished_in(turns: Turns, ranks: list[int]) -> list[int]:
    """Let one hold the only turn while the others queue up; the places in the order in which they had theirs."""
    order: list[int] = []
    release = asyncio.Event()

    async def holder() -> None:
        async with turns.turn(0):
            await release.wait()

    async def waiter(place: int, rank: int) -> None:
        async with turns.turn(rank):
            order.append(place)

    async with asyncio.TaskGroup() as group:
        group.create_task(holder())
        await asyncio.sleep(0)
        for place, rank in enumerate(ranks):
            group.create_task(waiter(place, rank))
            await asyncio.sleep(0)
        release.set()
    return order


async def test_the_lowest_rank_is_next_and_of_one_rank_who_came_first() -> None:
    assert await finished_in(Turns(1), [1, 1, 0, 1, 0]) == [2, 4, 0, 1, 3]


async def test_no_more_hold_a_turn_than_the_limit_and_no_turn_is_lost_to_a_cancellation() -> None:
    turns, rng = Turns(3), random.Random(1)
    holding = most = 0

    async def work() -> None:
        nonlocal holding, most
        async with turns.turn(rng.randrange(2)):
            holding += 1
            most = max(most, holding)
            await asyncio.sleep(0)
            holding -= 1

    tasks = [asyncio.create_task(work()) for _ in range(300)]
    for task in rng.sample(tasks, 150):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert most == 3

    async with asyncio.timeout(1), turns.turn(0), turns.turn(0), turns.turn(0):
        all_are_free_again = True
    assert all_are_free_again


async def test_another_limit_lets_more_begin_at_once_and_fewer_as_turns_end() -> None:
    turns, go_on = Turns(1), asyncio.Event()
    holding = 0

    async def hold(until: asyncio.Event) -> None:
        nonlocal holding
        async with turns.turn(0):
            holding += 1
            await until.wait()
            holding -= 1

    async def settle() -> int:
        for _ in range(10):
            await asyncio.sleep(0)
        return holding

    first = [asyncio.create_task(hold(go_on)) for _ in range(4)]
    assert await settle() == 1
    turns.resize(3)
    assert await settle() == 3
    turns.resize(1)
    later = asyncio.Event()
    others = [asyncio.create_task(hold(later)) for _ in range(3)]
    assert await settle() == 3
    go_on.set()
    await asyncio.gather(*first)
    assert await settle() == 1
    later.set()
    await asyncio.gather(*others)
    turns.resize(2)
    third = asyncio.Event()
    last = [asyncio.create_task(hold(third)) for _ in range(3)]
    assert await settle() == 2
    third.set()
    await asyncio.gather(*last)
