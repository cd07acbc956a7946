"""What a comparison remembers between scrapes, and between a Ctrl-C and going on: one SQLite file.

* Memory is SQLite's cache, whatever the number of series; on disk a series takes some 400 bytes, and a value that waits for its time to settle 40.
* Values that wait are at most `PENDING_MAX`: past a share of it a scrape keeps those of each n-th series, another n-th each time.
* A scrape counts whole or not at all: it is one transaction.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import orjson

from ingest.compare.lines import Judged, Line, Shown, Verdict, key_of_line
from ingest.errors import Fatal

PENDING_MAX: Final = 2_000_000
VALUES_PER_SCRAPE: Final = 50_000
"""Series whose values are kept of a scrape."""
EXAMPLES_MAX: Final = 2_000
"""Of each verdict but the good ones."""
LINES_A_STEP: Final = 10_000

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS scrapes (n INTEGER PRIMARY KEY, url INTEGER NOT NULL, at_s INTEGER NOT NULL, lines INTEGER NOT NULL, problem TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counters (url INTEGER, name TEXT, last REAL NOT NULL, spent REAL NOT NULL, PRIMARY KEY (url, name));
CREATE TABLE IF NOT EXISTS theirs (
    key INTEGER PRIMARY KEY, url INTEGER NOT NULL, name TEXT NOT NULL, account TEXT NOT NULL, region TEXT NOT NULL, labels TEXT NOT NULL,
    first_s INTEGER NOT NULL, last_s INTEGER NOT NULL, scrapes INTEGER NOT NULL, valued INTEGER NOT NULL, nonzero INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS infos (labels TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ours (
    key INTEGER PRIMARY KEY, id BLOB NOT NULL, name TEXT NOT NULL, account TEXT NOT NULL, region TEXT NOT NULL, service TEXT NOT NULL,
    said TEXT NOT NULL, period_s INTEGER NOT NULL, rank INTEGER NOT NULL, read_s INTEGER NOT NULL, live INTEGER);
CREATE TABLE IF NOT EXISTS pending (at_s INTEGER, name TEXT, key INTEGER, ts INTEGER, value REAL, PRIMARY KEY (at_s, name, key, ts)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS periods (name TEXT PRIMARY KEY, period_s INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS spans (name TEXT PRIMARY KEY, lag_s INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS verdicts (account TEXT, region TEXT, service TEXT, verdict TEXT, n INTEGER NOT NULL, lag_s INTEGER NOT NULL,
    PRIMARY KEY (account, region, service, verdict)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS examples (verdict TEXT, key INTEGER, at_s INTEGER, ts INTEGER, theirs REAL, ours_ts INTEGER, ours REAL, observed_s REAL,
    note TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (verdict, key, at_s, ts)) WITHOUT ROWID;
"""

_THEIRS: Final = """INSERT INTO theirs VALUES (?, ?, ?, ?, ?, ?, ?, ?, 1, ?, ?) ON CONFLICT (key) DO UPDATE SET
    labels = excluded.labels, valued = valued + excluded.valued * (last_s < excluded.last_s),
    nonzero = nonzero + excluded.nonzero, scrapes = scrapes + (last_s < excluded.last_s), last_s = excluded.last_s"""

_GONE: Final = """INSERT OR IGNORE INTO pending SELECT ?, name, key, 0, NULL FROM theirs
    WHERE url = ? AND last_s = ? AND abs(key) % ? = ? LIMIT ?"""
"""Of what the scrape before showed and this one does not."""

_RIPE: Final = """SELECT p.at_s, p.name, o.account, o.region, p.key, p.ts, p.value, o.id, o.period_s, o.service, o.said
FROM pending AS p JOIN ours AS o ON o.key = p.key JOIN waits AS w ON w.service = o.service
WHERE p.at_s <= ? - w.wait_s ORDER BY p.at_s, p.name LIMIT ?"""


@dataclass(frozen=True, slots=True)
class Ripe:
    """One value that has had its time to settle, and the series of ours that it is of. `id` has 16 bytes."""

    shown: Shown
    name: str
    account: str
    region: str
    id: bytes
    period_s: int
    service: str
    said: str
    """`ingest.compare.store.OurSeries.said`."""


class State:
    """The file. Not for several processes at once: the second finds it locked."""

    def __init__(self, path: Path | None) -> None:
        """None: in memory, for one look. Raises Fatal where the file is not one of ours, or in use."""
        self._where = f"state {path or 'in memory'}"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self.db = sqlite3.connect(
                path or ":memory:", isolation_level=None, timeout=1, check_same_thread=False
            )
            self.db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")
            self.db.execute("PRAGMA cache_size = -65536")
            self.db.executescript(_SCHEMA)
            self.db.execute("CREATE TEMP TABLE waits (service TEXT PRIMARY KEY, wait_s INTEGER NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise Fatal(self._where, str(error), "give another --state, or end who uses it") from error

    def close(self) -> None:
        self.db.close()

    def rows(self, query: str, *values: Any) -> Iterator[tuple[Any, ...]]:
        """What a query finds, as it is read."""
        yield from self.db.execute(query, values)

    def one(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None where there is none."""
        row = self.db.execute(query, values).fetchone()
        return None if row is None else row[0]

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it or nothing; and one write to the disk."""
        self.db.execute("BEGIN")
        try:
            yield
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        self.db.execute("COMMIT")

    # --- what is remembered of the comparison itself --------------------------------------------------------------

    def get(self, name: str) -> Any:
        """None where it was never set."""
        said = self.one("SELECT value FROM meta WHERE name = ?", name)
        return None if said is None else orjson.loads(said)

    def set(self, name: str, value: Any) -> None:
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, orjson.dumps(value).decode()))

    # --- a scrape -------------------------------------------------------------------------------------------------

    def failed(self, url: int, at_s: int, problem: str) -> None:
        """A scrape that was none."""
        self.db.execute(
            "INSERT INTO scrapes (url, at_s, lines, problem) VALUES (?, ?, 0, ?)", (url, at_s, problem[:500])
        )

    def take(self, url: int, at_s: int, lines: Iterable[Line], expected: int) -> int:
        """One scrape of the endpoint number `url`, of some `expected` lines; returns those of AWS's metrics.

        What `lines` raises leaves nothing of it behind.
        """
        modulus = max(1, math.ceil(expected / VALUES_PER_SCRAPE))
        turn = (self.one("SELECT count(*) FROM scrapes WHERE url = ?", url) or 0) % modulus
        before_s = self.one("SELECT max(at_s) FROM scrapes WHERE url = ? AND problem = ''", url)
        room = PENDING_MAX - (self.one("SELECT count(*) FROM pending") or 0)
        count = 0
        with self.transaction():
            for chunk in _chunks(lines, LINES_A_STEP):
                theirs: list[tuple[Any, ...]] = []
                values: list[tuple[Any, ...]] = []
                for line in chunk:
                    if line.is_own:
                        self._count(url, line)
                        continue
                    count += 1
                    if line.is_info:
                        self.db.execute(
                            "INSERT OR IGNORE INTO infos VALUES (?)",
                            (_text(line.labels | {"__name__": line.name}),),
                        )
                        continue
                    key, valued = key_of_line(line), not math.isnan(line.value)
                    theirs.append(
                        (
                            key,
                            url,
                            line.name,
                            line.account,
                            line.region,
                            _text(line.labels),
                            at_s,
                            at_s,
                            valued,
                            valued and line.value != 0,
                        )
                    )
                    if abs(key) % modulus == turn and len(values) < room:
                        values.append((at_s, line.name, key, line.timestamp_s or 0, line.value))
                self.db.executemany(_THEIRS, theirs)
                self.db.executemany("INSERT OR IGNORE INTO pending VALUES (?, ?, ?, ?, ?)", values)
                room -= len(values)
            if before_s is not None:
                self.db.execute(_GONE, (at_s, url, before_s, modulus, turn, max(0, room)))
            self.db.execute(
                "INSERT INTO scrapes (url, at_s, lines, problem) VALUES (?, ?, ?, '')", (url, at_s, count)
            )
        return count

    def _count(self, url: int, line: Line) -> None:
        """A counter of YACE's own. One that fell was started anew; what was counted before the first scrape is not ours to compare."""
        name = line.name + (f":{line.labels['api_name']}" if "api_name" in line.labels else "")
        self.db.execute(
            "INSERT INTO counters VALUES (?1, ?2, ?3, 0) ON CONFLICT DO UPDATE SET spent = spent + ?3 - (CASE WHEN ?3 < last THEN 0 ELSE last END), last = ?3",
            (url, name, line.value),
        )

    # --- our series -----------------------------------------------------------------------------------------------

    def put_ours(self, rows: Sequence[tuple[Any, ...]]) -> None:
        """(key, id, name, account, region, service, said, period_s, rank, read_s); of two with one key that of the greater rank stays."""
        with self.transaction():
            self.db.executemany(
                "INSERT INTO ours VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT (key) DO UPDATE SET id = excluded.id, service = excluded.service,"
                " said = excluded.said, period_s = excluded.period_s, rank = excluded.rank, read_s = excluded.read_s WHERE excluded.rank >= rank",
                rows,
            )

    def set_living(self, rows: Sequence[tuple[int, int]]) -> None:
        """(1 or 0, key) of series of ours."""
        with self.transaction():
            self.db.executemany("UPDATE ours SET live = ? WHERE key = ?", rows)

    # --- values ---------------------------------------------------------------------------------------------------

    def ripe(self, now_s: int, waits: Mapping[str, int], at_most: int) -> list[Ripe]:
        """The oldest values whose service's time to settle is over, by scrape and metric."""
        self.db.executemany("INSERT OR REPLACE INTO waits VALUES (?, ?)", waits.items())
        return [
            Ripe(
                Shown(key, at_s, ts or None, math.nan if value is None else value), name, account, region, *of
            )
            for at_s, name, account, region, key, ts, value, *of in self.rows(_RIPE, now_s, at_most)
        ]

    def period_s(self, name: str) -> int | None:
        """The longer period that YACE asks for a metric at, where that was found out."""
        known: int | None = self.one("SELECT period_s FROM periods WHERE name = ?", name)
        return known

    def set_period(self, name: str, period_s: int) -> None:
        self.db.execute("INSERT OR REPLACE INTO periods VALUES (?, ?)", (name, period_s))

    def span_s(self, name: str) -> int | None:
        """How old the values of a metric were at most when they were scraped, as far as is known."""
        lag: int | None = self.one("SELECT lag_s FROM spans WHERE name = ?", name)
        return lag

    def judged(self, found: Iterable[tuple[Ripe, Judged]]) -> None:
        """Count verdicts, keep examples of those that are not good, and forget the values."""
        with self.transaction():
            for ripe, one in found:
                shown, ours = one.shown, one.ours
                lag_s = (
                    shown.at_s - ours.timestamp_s if ours is not None and one.verdict is Verdict.EQUAL else 0
                )
                self.db.execute(
                    "INSERT INTO verdicts VALUES (?, ?, ?, ?, 1, ?) ON CONFLICT DO UPDATE SET n = n + 1, lag_s = lag_s + excluded.lag_s",
                    (ripe.account, ripe.region, ripe.service, one.verdict, lag_s),
                )
                if lag_s and shown.timestamp_s is None:
                    self.db.execute(
                        "INSERT INTO spans VALUES (?, ?) ON CONFLICT DO UPDATE SET lag_s = max(lag_s, excluded.lag_s)",
                        (ripe.name, lag_s),
                    )
                if one.verdict not in (Verdict.EQUAL, Verdict.NEITHER):
                    self._example(one)
                self.db.execute(
                    "DELETE FROM pending WHERE at_s = ? AND name = ? AND key = ? AND ts = ?",
                    (shown.at_s, ripe.name, shown.key, shown.timestamp_s or 0),
                )

    def _example(self, one: Judged) -> None:
        if self.one("SELECT count(*) FROM examples WHERE verdict = ?", one.verdict) >= EXAMPLES_MAX:
            return
        ours = (
            (None, None, None)
            if one.ours is None
            else (one.ours.timestamp_s, one.ours.value, one.ours.observed_s)
        )
        shown = one.shown
        self.db.execute(
            "INSERT OR IGNORE INTO examples VALUES (?, ?, ?, ?, ?, ?, ?, ?, '')",
            (one.verdict, shown.key, shown.at_s, shown.timestamp_s or 0, shown.value, *ours),
        )

    def conclude(
        self, example: tuple[str, int, int, int], of: tuple[str, str, str], verdict: Verdict, note: str
    ) -> None:
        """Give an example (verdict, key, at_s, ts) of an account, region and service another verdict, or the same, and say why."""
        with self.transaction():
            self.db.execute(
                "UPDATE OR REPLACE examples SET verdict = ?, note = ? WHERE verdict = ? AND key = ? AND at_s = ? AND ts = ?",
                (verdict, note, *example),
            )
            if verdict != example[0]:
                self.db.execute(
                    "UPDATE verdicts SET n = n - 1 WHERE account = ? AND region = ? AND service = ? AND verdict = ?",
                    (*of, example[0]),
                )
                self.db.execute(
                    "INSERT INTO verdicts VALUES (?, ?, ?, ?, 1, 0) ON CONFLICT DO UPDATE SET n = n + 1",
                    (*of, verdict),
                )


def _chunks(lines: Iterable[Line], size: int) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == size:
            yield chunk
            chunk = []
    yield chunk


def _text(labels: Mapping[str, str]) -> str:
    return orjson.dumps(labels, option=orjson.OPT_SORT_KEYS).decode()
