"""The coordinator's budget loop: twice a minute it reads what is spent and decides how polls stretch, or stop, until midnight UTC.

* What is decided is kept in PostgreSQL: another coordinator goes on from it, and deadlines allow for it.
* While PostgreSQL is away planning goes on as decided last: nothing is stretched, relaxed, stopped or resumed meanwhile.
* A change is said in the log, and shows in `headgate status`; `headgate_poll_stretch` is for alerts.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import structlog
from prometheus_client import Gauge

from ingest import budget, spending
from ingest.budget import Day, Decision, Polling
from ingest.clock import Clock
from ingest.errors import HeadgateError, Transient
from ingest.ledger import Ledger
from shard_config.model import Config
from workers.lifecycle import Lifecycle

_log = structlog.get_logger()

BUDGET_INTERVAL_S = 30.0
BUDGET_RETRY_S = 10.0

SPEND = Gauge(
    "headgate_spend_usd_today",
    "Dollars that AWS has billed an account for its metrics API this UTC day, those in doubt included.",
    ["account"],
)
FORECAST = Gauge(
    "headgate_spend_forecast_usd_today",
    "The same at midnight UTC, if polls go on as they do. Above the budget: stretching alone does not keep it.",
    ["account"],
)
BUDGET = Gauge(
    "headgate_budget_usd", "What an account may cost in a UTC day; account=all: all together.", ["account"]
)
STRETCH = Gauge(
    "headgate_poll_stretch",
    "Poll intervals that became one for a budget, where more than 1; 0: stopped until midnight UTC.",
    ["account", "service"],
)
ALL = "all"


class Planner(Protocol):
    """What the loop needs of the coordinator."""

    polling: Polling


class Budgeter:
    """Decides for one coordinator."""

    def __init__(self, config: Config, coordinator: Planner, ledger: Ledger, clock: Clock) -> None:
        self._config = config
        self._coordinator = coordinator
        self._ledger = ledger
        self._clock = clock
        self.decision: Decision | None = None
        """What was decided last, at `decided_at_ms`; `error` says why nothing newer is, and is empty otherwise."""
        self.decided_at_ms: int | None = None
        self.error = ""

    def configure(self, config: Config) -> None:
        """Go by this configuration's budgets, priorities and prices from the next pass on."""
        self._config = config

    async def step(self) -> Decision:
        """Read, decide and keep in one transaction; of several coordinators one after the other. Raises Transient."""
        now_s = self._clock.now_s()
        async with self._ledger.connected() as connection, connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", spending.LOCK_ID)
            books = await spending.read(connection, self._config, now_s)
            # In a thread: of 10,000 polls with budgets it takes a second.
            decision = await asyncio.to_thread(budget.decide, spending.situation_of(books, self._config))
            await spending.keep(connection, decision.polling, books.polling, now_s)
        self._coordinator.polling = decision.polling
        self.decision, self.decided_at_ms, self.error = decision, self._clock.now_ms(), ""
        self._report(decision, books.polling)
        return decision

    async def run(self, lifecycle: Lifecycle) -> None:
        """Until told to stop. The first pass is made by whoever starts this, before the first plan."""
        pause_s = BUDGET_INTERVAL_S
        while not await lifecycle.pause(pause_s):
            pause_s = BUDGET_INTERVAL_S if await self.try_step() else BUDGET_RETRY_S

    async def try_step(self) -> bool:
        """`step`; False where it was not possible: polls stay as they are."""
        try:
            await self.step()
        except Transient as error:
            self.error = str(error)
            _log.warning("budgets_as_last_known", error=str(error))
            return False
        except HeadgateError as error:
            self.error = str(error)
            # A store that will not have us must not stop the planning.
            _log.error("budgets_failed", error=str(error))
            return False
        return True

    def _report(self, decision: Decision, before: Polling) -> None:
        for gauge in (SPEND, FORECAST, BUDGET, STRETCH):
            gauge.clear()
        for account, day in [*decision.days.items(), (ALL, decision.all)]:
            SPEND.labels(account=account).set(float(day.spent_usd))
            FORECAST.labels(account=account).set(float(day.forecast_usd))
            if day.budget_usd is not None:
                BUDGET.labels(account=account).set(float(day.budget_usd))
        polling = decision.polling
        for pair in sorted(set(polling.stretch) | polling.stopped):
            account, service = pair
            k = 0 if pair in polling.stopped else polling.of(*pair)
            STRETCH.labels(account=account, service=service).set(k)
        if polling != before:
            _log.warning(
                "polls_stretched",
                stretched={f"{a}/{s}": k for (a, s), k in sorted(polling.stretch.items())},
                stopped=[f"{a}/{s}" for a, s in sorted(polling.stopped)],
                spent_usd=float(decision.all.spent_usd),
                forecast_usd=float(decision.all.forecast_usd),
            )


# --- for people and machines --------------------------------------------------------------------------------------


def today(decision: Decision) -> str:
    """Spent, forecast and budget of all accounts together, and which budgets do not hold: one line."""
    day = decision.all
    of_all = "" if day.budget_usd is None else f" of ${day.budget_usd:,.2f}"
    text = f"${day.spent_usd:,.4f}{of_all}, ${day.forecast_usd:,.4f} by midnight UTC"
    passed = [name for name, d in decision.days.items() if d.passed] + [ALL] * day.passed
    short = [
        n for n, d in decision.days.items() if d.budget_usd is not None and d.forecast_usd > d.budget_usd
    ]
    if passed:
        return f"{text}; budget passed: {_some(passed)}"
    return f"{text}; budget too small: {_some(short)}" if short else text


def spoken(polling: Polling) -> str:
    """Which polls are stretched or stopped: one line."""
    by_what: dict[str, list[str]] = {}
    for account, service in sorted(set(polling.stretch) | polling.stopped):
        stopped = (account, service) in polling.stopped
        what = "stopped" if stopped else f"×{polling.of(account, service)}"
        by_what.setdefault(f"{service} {what}", []).append(account)
    if not by_what:
        return "as configured"
    return "; ".join(f"{what} ({_some(accounts)})" for what, accounts in by_what.items())


def _some(names: list[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def to_plain(decision: Decision) -> dict[str, object]:
    """For JSON: dollars as numbers, by account and of all; stretched and stopped polls as account/service."""

    def of(day: Day) -> dict[str, object]:
        return {
            "spent_usd": float(day.spent_usd),
            "forecast_usd": float(day.forecast_usd),
            "budget_usd": None if day.budget_usd is None else float(day.budget_usd),
            "passed": day.passed,
        }

    polling = decision.polling
    return {
        "all": of(decision.all),
        "accounts": {account: of(day) for account, day in decision.days.items()},
        "stretch": {f"{a}/{s}": k for (a, s), k in sorted(polling.stretch.items())},
        "stopped": [f"{a}/{s}" for a, s in sorted(polling.stopped)],
    }
