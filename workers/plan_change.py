"""What the coordinator would plan, against the plan before: what moves, and why. Pure; for `headgate plan`."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import ValidationError

from ingest.assign import Assignment, assign
from ingest.reassign import Planned
from ingest.schedule import grids_of
from ingest.spending import payers_of
from ingest.weights import weights_of
from shard_config.load import ConfigError, ConfigErrors
from shard_config.model import Account, Config
from shard_config.plan import least_moved
from shard_config.units import Places, UnitPlan, Weights, inherit, parse_unit, plan_units

Series = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Change:
    """Services of a target that begin, end or change their slot together. `services` is empty where that is all of them.

    `why`: new; gone; split, joined (`shard_config.units`); heavier: the slot it leaves has grown since the plan before; balance: it has not,
    but others take less than they would.
    """

    target: str
    services: tuple[str, ...]
    weight: float
    before: int | None
    after: int | None
    why: str


@dataclass(frozen=True, slots=True)
class Known:
    """What the ledger and Kafka say; empty where they could not be asked, with a line each in `doubts`."""

    series: Series
    kept: UnitPlan
    published: Assignment | None
    doubts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Proposal:
    """The plan as it would be, against the one before. Weights are metrics asked a minute."""

    plan: UnitPlan
    slots: int
    changes: tuple[Change, ...]
    moved: float
    least: float
    """No plan in balance, with targets split as in this one, moves less."""
    owners: tuple[str, ...]
    """By slot, its shard; empty where no shards are known."""
    slots_moved: tuple[int, ...]
    """Slots that change from a shard that had them to another."""
    doubts: tuple[str, ...]


def propose(config: Config, known: Known, shards: int | None = None) -> Proposal:
    """What the coordinator would plan for this configuration now. Raises ConfigErrors where it has less slots than there are."""
    grids = grids_of(config)
    weights = weights_of(grids, known.series)
    there = max([s + 1 for s in known.kept.slots.values()], default=0)
    if known.published is not None:
        there = max(there, len(known.published.owners))
    if config.slots < there:
        text, remedy = (
            f"{config.slots} are less than the {there} there are",
            "slots never shrink: set it back",
        )
        raise ConfigErrors([ConfigError("configuration", 0, "slots", text, remedy)])
    found = plan_units(weights, config.slots, known.kept.slots, via=payers_of(config))
    began = inherit(found.slots, weights, known.kept.slots)
    changes = changes_of(known.kept, found, weights)
    owners, moved = _onto_shards(found, config, known.published, shards)
    learned = sum(
        g.service in known.series.get(str(t), {}) for t, services in grids.items() for g in services
    )
    pairs = sum(map(len, grids.values()))
    assumed = (
        () if learned == pairs else (f"weights of {pairs - learned:,} of {pairs:,} services are assumed",)
    )
    return Proposal(
        plan=found,
        slots=config.slots,
        changes=tuple(changes),
        moved=math.fsum(c.weight for c in changes if c.before is not None and c.after is not None),
        least=least_moved(found.weights, config.slots, began),
        owners=owners,
        slots_moved=moved,
        doubts=(*known.doubts, *assumed),
    )


def with_a_plan_before(config: Config, known: Known) -> Known:
    """Where no plan is kept: with the one that the configuration as it is would have, so that a change shows alone."""
    if known.kept.slots:
        return known
    weights = weights_of(grids_of(config), known.series)
    return replace(known, kept=plan_units(weights, config.slots, via=payers_of(config)))


def changes_of(before: UnitPlan, after: UnitPlan, weights: Weights) -> list[Change]:
    """What differs between two plans: moves heaviest first, then what is new, then what is gone."""
    was, now = Places(before.slots), Places(after.slots)
    loads = loads_of(before)
    loads_now: dict[int, list[float]] = defaultdict(list)
    found: dict[tuple[str, int | None, int | None], list[str]] = defaultdict(list)
    for target, services in weights.items():
        for service, weight in services.items():
            slot = was.of(target, service)
            if slot is not None:
                loads_now[slot].append(weight)
            if slot != (to := now.of(target, service)):
                found[target, slot, to].append(service)
    grown = {slot for slot, load in loads_now.items() if math.fsum(load) > loads.get(slot, 0.0) * (1 + 1e-9)}

    def why(target: str, slot: int | None) -> str:
        if slot is None:
            return "new"
        if was.is_split(target) != now.is_split(target):
            return "split" if now.is_split(target) else "joined"
        return "heavier" if slot in grown else "balance"

    changes = [
        Change(
            target,
            () if len(services) == len(weights[target]) else tuple(sorted(services)),
            math.fsum(weights[target][s] for s in services),
            slot,
            to,
            why(target, slot),
        )
        for (target, slot, to), services in found.items()
    ]
    for unit, slot in before.slots.items():
        target, service = parse_unit(unit)
        if target not in weights or (service and service not in weights[target]):
            named = (service,) if service else ()
            changes.append(Change(target, named, before.weights.get(unit, 0.0), slot, None, "gone"))
    order = {"new": 1, "gone": 2}
    return sorted(changes, key=lambda c: (order.get(c.why, 0), -c.weight, c.target, c.services))


def loads_of(plan: UnitPlan) -> dict[int, float]:
    held: dict[int, list[float]] = defaultdict(list)
    for unit, slot in plan.slots.items():
        held[slot].append(plan.weights.get(unit, 0.0))
    return {slot: math.fsum(load) for slot, load in held.items()}


def _onto_shards(
    plan: UnitPlan, config: Config, published: Assignment | None, shards: int | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """(owner by slot, slots that move): of so many shards, or of those there are."""
    there = list(published.shards) if published else []
    names = there if shards is None else shard_names(there, shards)
    if not names:
        return (), ()
    before = dict(enumerate(published.owners)) if published else {}
    planned = Planned(plan, config.slots, payers_of(config))
    owners = assign(planned.weights, names, before, planned.together)
    return owners, tuple(slot for slot, shard in before.items() if owners[slot] != shard)


def shard_names(there: Collection[str], count: int) -> list[str]:
    """So many names: those that are there, the highest numbers leaving first, as `make scale` does."""

    def number(name: str) -> tuple[int, str]:
        digits = re.search(r"(\d+)$", name)
        return int(digits[1]) if digits else -1, name

    names = sorted(there, key=number)
    stem = re.sub(r"\d+$", "", names[-1]) if names else "exporter-"
    following = (f"{stem}{i}" for i in range(number(names[-1])[0] + 1 if names else 1, 10**6))
    return [*names, *(next(following) for _ in range(count - len(names)))][:count]


# --- the change that is asked about -----------------------------------------------------------------------------


def changed(config: Config, added: Sequence[str], removed: Sequence[str], slots: int | None) -> Config:
    """The configuration with accounts more or less, and with more slots. `added` are ACCOUNT or ACCOUNT:region,region. Raises ConfigErrors."""
    accounts = {account.id: account for account in config.accounts}
    for name in removed:
        if accounts.pop(name, None) is None:
            raise refused("--remove", f"{name} is not in the configuration", "see `headgate check`")
    for text in added:
        name, _, regions = text.partition(":")
        accounts[name] = _with_regions(
            config, accounts.get(name), name, tuple(filter(None, regions.split(",")))
        )
    update: dict[str, object] = {"accounts": tuple(accounts.values())}
    if slots is not None and slots < config.slots:
        raise refused("--slots", f"{slots} are less than the {config.slots} there are", "slots never shrink")
    if slots is not None:
        update["slots"] = slots
    return config.model_copy(update=update)


def _with_regions(config: Config, there: Account | None, name: str, regions: tuple[str, ...]) -> Account:
    model = there or next(iter(config.accounts), None)
    if model is None:
        raise refused("--add", "no account is there whose services it could have", "add one to the file")
    if there is not None and set(regions) <= set(there.regions):
        raise refused("--add", f"{name} is there already", f"name other regions: {name}:eu-west-1,…")
    wanted = (
        (*there.regions, *(r for r in regions if r not in there.regions))
        if there
        else regions or model.regions
    )
    try:
        return Account(id=name, regions=wanted, services=model.services, via=there.via if there else "")
    except ValidationError as error:
        raise refused(
            "--add", f"{name!r}: {error.errors()[0]['msg']}", "as 111111111111:eu-west-1"
        ) from error


def refused(option: str, what: str, remedy: str) -> ConfigErrors:
    return ConfigErrors([ConfigError("command line", 0, option, what, remedy)])
