"""The three errors that cross a boundary here. The type says what the caller does.

Vendor errors (botocore, aiokafka, asyncpg, aiohttp) are translated at the adapter that talks to the
vendor; nothing above an adapter imports a vendor's exception.
"""

from __future__ import annotations


class HeadgateError(Exception):
    """Base of every error that Headgate raises on purpose.

    `where` names the part and the thing (`"archive s3://bucket/key"`), `what` says what happened, and `remedy`
    what to do about it, where there is something to do.
    """

    def __init__(self, where: str, what: str, remedy: str = "") -> None:
        self.where = where
        self.what = what
        self.remedy = remedy
        super().__init__(f"{where}: {what}" + (f" ({remedy})" if remedy else ""))


class Transient(HeadgateError):
    """It may work later: try again, with a bound on attempts and on time."""

    def __init__(self, where: str, what: str, remedy: str = "", retry_after_s: float = 1.0) -> None:
        super().__init__(where, what, remedy)
        self.retry_after_s = retry_after_s


class Rejected(HeadgateError):
    """This input is bad and stays bad: put it aside with its reason (a dead letter), and go on.

    `reason` is one of a small, fixed vocabulary, fit for a metric's label: see `ingest.validate`.
    """

    def __init__(self, where: str, reason: str, what: str = "") -> None:
        self.reason = reason
        super().__init__(where, f"{reason}: {what}" if what else reason)


class Fatal(HeadgateError):
    """Going on could lose or spoil data: stop loudly, with the remedy in the message."""
