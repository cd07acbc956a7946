"""What a ledger that was lost can be told again: pure.

* A receipt out of the archive tells its task: without one the ledger could neither replay its look nor say why it was paid for.
* What the configuration says was due, and nobody may know of any more, is planned again, and asked of nobody: windows that a receipt knows are closed by it, and healing
  finds the others, by the cheapest means.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from ingest.charges import BACKFILL_ATTEMPT
from ingest.model import Receipt, Target, Task, TaskItem, TaskKind, task_id_of
from ingest.schedule import Grid, blocks

ATTEMPT = BACKFILL_ATTEMPT - 1
"""Of what is planned again: of no poll, no healing and no backfill, so that it has no other task's id."""
HEALED_MAX = 100
"""`heal.attempts_max` is at most so many."""


def task_of(receipt: Receipt, config_revision: str) -> Task:
    """A task that asked what the receipt answers, with its id: of the kind that its id gives away, else of kind AGAIN.

    An id is made from what is asked, the configuration's revision and the attempt. What another revision asked for, a backfill, or a look
    that went back further than it was asked to, is not recognized: then nobody knows why it was asked. Live and overdue polls differ by when they were begun only.
    """
    items = tuple(done.item for done in receipt.items)
    kind, attempt = TaskKind.AGAIN, 0
    for n in range(HEALED_MAX + 1):
        if task_id_of(receipt.target, config_revision, n, items) == receipt.task_id:
            late_s = receipt.started_at_ms // 1000 - receipt.tick_s
            live = late_s <= max(item.grid_s for item in items)
            kind = TaskKind.HEAL if n else TaskKind.LIVE if live else TaskKind.BACKLOG
            attempt = n
            break
    return Task(
        receipt.task_id,
        receipt.target,
        config_revision,
        receipt.tick_s,
        attempt,
        kind.value,
        0,
        items,
    )


def planned_again(
    grids: Mapping[Target, Sequence[Grid]],
    planned_until_s: Mapping[str, Mapping[str, int]],
    begun_s: Mapping[Target, int],
    now_s: int,
    config_revision: str,
) -> list[Task]:
    """Tasks of kind PAUSED over all windows that have ended since the ledger's last planned one, oldest first.

    `planned_until_s` is by target and service; of those without, `begun_s` says when the target's first task was, and without that
    they are left to the coordinator, which plans them as new.
    """
    items: dict[tuple[int, Target], list[TaskItem]] = defaultdict(list)
    for target, of_target in grids.items():
        for grid in of_target:
            since_s = planned_until_s.get(str(target), {}).get(grid.service, begun_s.get(target))
            if since_s is None:
                continue
            for item in blocks(grid, grid.floor(since_s), grid.floor(now_s)):
                items[item.end_s, target].append(item)
    tasks = []
    for (end_s, target), some in sorted(items.items()):
        ordered = tuple(sorted(some, key=lambda i: i.service))
        task_id = task_id_of(target, config_revision, ATTEMPT, ordered)
        tasks.append(
            Task(task_id, target, config_revision, end_s, ATTEMPT, TaskKind.PAUSED.value, 0, ordered)
        )
    return tasks
