"""What one process remembers of the series that it landed: the ids, and the span of each one's timestamps.

Only ever a hint, so that landing asks the store less: forgetting all of it, or having it from another run, costs time and
changes nothing. It is bounded: past `series_max` everything is forgotten.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ingest.model import SeriesIds
from ingest.sinks.copy import Rows

_MIN = np.iinfo(np.int64).min
_MAX = np.iinfo(np.int64).max


class Seen:
    """32 bytes a series, in arrays sorted by the high half of the id.

    The high half decides nearly always; of ids that share it, the first is remembered and the others never are.
    """

    def __init__(self, series_max: int) -> None:
        self._series_max = series_max
        self.forget()

    def __len__(self) -> int:
        return len(self._high)

    def forget(self) -> None:
        self._high = np.empty(0, np.uint64)
        self._low = np.empty(0, np.uint64)
        self._oldest_s = np.empty(0, np.int64)
        self._newest_s = np.empty(0, np.int64)

    def knows(self, ids: SeriesIds) -> NDArray[np.bool_]:
        """Which of the ids have been learned."""
        return self._find(ids)[1]

    def may_conflict(self, rows: Rows) -> NDArray[np.bool_]:
        """Which rows lie within the span of what has landed of their series, so that their key may exist."""
        at, known = self._find(rows.ids)
        oldest_s = np.full(len(rows.ids), _MAX)
        newest_s = np.full(len(rows.ids), _MIN)
        oldest_s[known] = self._oldest_s[at[known]]
        newest_s[known] = self._newest_s[at[known]]
        return (rows.timestamps_s >= oldest_s[rows.series]) & (rows.timestamps_s <= newest_s[rows.series])

    def learn(self, rows: Rows) -> None:
        """Remember the series of rows that were committed, those without rows too."""
        oldest_s = np.full(len(rows.ids), _MAX)
        newest_s = np.full(len(rows.ids), _MIN)
        # Rows are in the order of time, and of what is assigned to one place numpy keeps the last.
        newest_s[rows.series] = rows.timestamps_s
        oldest_s[rows.series[::-1]] = rows.timestamps_s[::-1]
        at, known = self._find(rows.ids)
        old = at[known]
        self._oldest_s[old] = np.minimum(self._oldest_s[old], oldest_s[known])
        self._newest_s[old] = np.maximum(self._newest_s[old], newest_s[known])
        if not known.all():
            self._add(rows.ids, at, ~known, oldest_s, newest_s)

    def _find(self, ids: SeriesIds) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Where each id is or would be inserted, and whether it is there."""
        at = np.searchsorted(self._high, ids[:, 0])
        if not len(self):
            return at, np.zeros(len(ids), np.bool_)
        inside = np.minimum(at, len(self) - 1)
        return at, (self._high[inside] == ids[:, 0]) & (self._low[inside] == ids[:, 1])

    def _add(
        self,
        ids: SeriesIds,
        at: NDArray[np.intp],
        new: NDArray[np.bool_],
        oldest_s: NDArray[np.int64],
        newest_s: NDArray[np.int64],
    ) -> None:
        high = ids[:, 0]
        new = new & ~np.isin(high, self._high)
        new[1:] &= high[1:] != high[:-1]
        if len(self) + int(new.sum()) > self._series_max:
            self.forget()
            return
        where = at[new]
        self._high = np.insert(self._high, where, high[new])
        self._low = np.insert(self._low, where, ids[new, 1])
        self._oldest_s = np.insert(self._oldest_s, where, oldest_s[new])
        self._newest_s = np.insert(self._newest_s, where, newest_s[new])
