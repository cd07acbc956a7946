"""The configuration under way: what a change of the file, of the organization's list or a signal does to a worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from prometheus_client import REGISTRY

from ingest.archive import open_archive
from ingest.clock import ManualClock, SystemClock
from ingest.errors import Transient
from shard_config.load import ConfigErrors, load
from shard_config.model import S3, Config
from shard_config.organization import Listing, Member, question_of
from tests.conftest import eventually
from workers import members as members_module
from workers import reload
from workers.lifecycle import Lifecycle
from workers.members import KEY, Lister, Members, encode, with_known
from workers.reload import Settings, refuse_fixed

ONE, TWO, THREE = "111111111111", "222222222222", "333333333333"


def text_of(*accounts: str, more: str = "") -> str:
    listed = "".join(f'\n  - id: "{account}"' for account in accounts)
    return f"defaults: {{regions: [eu-west-1], services: [ec2]}}\naccounts:{listed}\n{more}\n"


ORGANIZATION = "organization: {role_template: 'arn:aws:iam::{account}:role/R', refresh_s: 600}"


class Rig:
    """Settings of one file, and what was applied."""

    def __init__(self, path: Path, text: str, members: Members | None = None, **environ: str) -> None:
        self.path = path
        self.write(text)
        self.clock = ManualClock(1000)
        self.members = members or Members(S3(), self.clock)
        file = load(path, environ=environ)
        self.settings = Settings(file, self.members, self.clock, path, environ)
        self.applied: list[Config] = []

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def remove(self) -> None:
        self.path.unlink()

    async def apply(self, config: Config) -> None:
        self.applied.append(config)

    async def look(self, *, again: bool = False) -> list[str]:
        """Look once; the accounts that are in use then."""
        await self.settings.look(self.apply, again=again)
        return [account.id for account in self.settings.config.accounts]


def metric(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "headgate.yaml"


async def test_a_valid_change_is_applied_once(path: Path) -> None:
    rig = Rig(path, text_of(ONE))
    assert await rig.look() == [ONE]
    assert rig.applied == []
    rig.write(text_of(ONE, TWO))
    accepted = metric("headgate_config_reloads_total", result="accepted")
    assert await rig.look() == await rig.look() == [ONE, TWO]
    assert [[a.id for a in config.accounts] for config in rig.applied] == [[ONE, TWO]]
    assert metric("headgate_config_reloads_total", result="accepted") == accepted + 1
    assert metric("headgate_config_revision_info", revision=rig.settings.config.revision) == 1


async def test_words_that_mean_the_same_are_no_change(path: Path) -> None:
    rig = Rig(path, text_of(ONE))
    rig.write("# a comment\n" + text_of(ONE))
    await rig.look()
    assert rig.applied == []


async def test_an_invalid_file_is_refused_once_with_every_message_and_the_old_one_stays(path: Path) -> None:
    rig = Rig(path, text_of(ONE))
    rig.write(text_of(ONE, "22").replace("eu-west-1", "eu-wst-1"))
    with structlog.testing.capture_logs() as logs:
        assert await rig.look() == await rig.look() == [ONE]
    [refusal] = [line for line in logs if line["event"] == "config_refused"]
    assert refusal["log_level"] == "error"
    assert [error.split(": ")[1] for error in refusal["errors"]] == ["defaults.regions[0]", "accounts[1].id"]
    assert metric("headgate_config_invalid") == 1
    rig.write(text_of(ONE))
    assert await rig.look() == [ONE]
    assert metric("headgate_config_invalid") == 0
    assert rig.applied == []


async def test_a_file_that_is_gone_changes_nothing_and_is_said_once(path: Path) -> None:
    rig = Rig(path, text_of(ONE))
    rig.remove()
    with structlog.testing.capture_logs() as logs:
        assert await rig.look() == await rig.look() == [ONE]
    assert [line["event"] for line in logs] == ["config_refused"]
    rig.write(text_of(TWO))
    assert await rig.look() == [TWO]


async def test_a_configmaps_link_that_is_swapped_is_a_change(tmp_path: Path) -> None:
    for name, account in (("old", ONE), ("new", TWO)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "headgate.yaml").write_text(text_of(account))
    (tmp_path / "data").symlink_to("old")
    link = tmp_path / "headgate.yaml"
    link.symlink_to("data/headgate.yaml")
    clock = ManualClock(0)
    settings = Settings(load(link, environ={}), Members(S3(), clock), clock, link, {})
    (tmp_path / "next").symlink_to("new")
    (tmp_path / "next").rename(tmp_path / "data")

    async def apply(_: Config) -> None: ...

    await settings.look(apply)
    assert [a.id for a in settings.config.accounts] == [TWO]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ("slots: 99", "slots"),
        ("kafka: {prefix: other}", "kafka"),
        ("postgres: {password: x}", "postgres"),
        ("s3: {bucket: other}", "s3"),
        ("run: {clock_offset_s: 5}", "run"),
    ],
)
async def test_what_cannot_change_under_way_is_refused_with_the_remedy(
    path: Path, line: str, key: str
) -> None:
    rig = Rig(path, text_of(ONE))
    rig.write(text_of(ONE, TWO, more=line))
    with pytest.raises(ConfigErrors, match=f"{key}: cannot change under way; restart to change"):
        refuse_fixed(rig.settings.file, load(path, environ={}), "headgate.yaml")
    assert await rig.look() == [ONE]
    assert rig.applied == []


async def test_less_slots_are_refused_for_ever_and_not_only_under_way(path: Path) -> None:
    rig = Rig(path, text_of(ONE))
    rig.write(text_of(ONE, TWO, more="slots: 9"))
    with pytest.raises(ConfigErrors, match="slots: 9 are less than the 24 there are, and slots never shrink"):
        refuse_fixed(rig.settings.file, load(path, environ={}), "headgate.yaml")
    assert await rig.look() == [ONE]


async def test_a_secret_that_changed_behind_the_file_is_read_at_a_signal(path: Path, tmp_path: Path) -> None:
    secret = tmp_path / "id"
    secret.write_text("old")
    rig = Rig(path, text_of(ONE).rstrip() + "\n    external_id: {file: id}\n")
    await rig.look()
    secret.write_text("new")
    await rig.look()
    assert rig.applied == []
    await rig.look(again=True)
    [config] = rig.applied
    [account] = config.accounts
    assert account.external_id is not None
    assert account.external_id.get_secret_value() == "new"


async def test_run_looks_at_once_at_a_hangup_and_ends_when_told_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "LOOK_S", 60.0)
    monkeypatch.setattr(reload, "AT_ONCE_S", 0.05)
    rig = Rig(path, text_of(ONE))
    lifecycle = Lifecycle()
    running = asyncio.create_task(rig.settings.run(lifecycle, rig.apply))
    await asyncio.sleep(0.1)
    rig.write(text_of(TWO))
    lifecycle.hangup.set()

    async def applied() -> bool:
        return len(rig.applied) == 1

    await eventually(applied, 5)
    lifecycle.stop.set()
    await asyncio.wait_for(running, 5)


async def test_until_looks_for_what_is_missing_and_gives_up_in_time(path: Path) -> None:
    rig = Rig(path, text_of(ONE))

    def has_two(config: Config) -> bool:
        return any(account.id == TWO for account in config.accounts)

    assert not await rig.settings.until(has_two, 3)
    assert rig.clock.monotonic_s() == pytest.approx(3, abs=0.6)
    rig.write(text_of(ONE, TWO))
    asking = asyncio.create_task(rig.settings.until(has_two, 1e6))
    await asyncio.sleep(0)
    await rig.look()
    assert await asyncio.wait_for(asking, 5)


# --- the organization's list ----------------------------------------------------------------------------------


def listing(*accounts: str, listed_at_s: int = 900, question: str = "q") -> Listing:
    found = tuple(Member(id=account) for account in accounts)
    return Listing(question=question, listed_at_s=listed_at_s, accounts=found)


async def test_a_new_list_is_applied_and_an_older_one_is_not(path: Path) -> None:
    rig = Rig(path, text_of(ONE, more=ORGANIZATION), NoArchive(ManualClock(1000)))
    rig.members.take(listing(TWO))
    assert await rig.look() == [ONE, TWO]
    rig.members.take(listing(THREE, listed_at_s=899))
    assert await rig.look() == [ONE, TWO]
    assert len(rig.applied) == 1
    assert metric("headgate_organization_list_age_seconds") == 100


async def test_an_account_that_is_excluded_goes_without_a_new_list(path: Path) -> None:
    rig = Rig(path, text_of(ONE, more=ORGANIZATION), NoArchive(ManualClock(1000)))
    rig.members.take(listing(TWO, THREE))
    assert await rig.look() == [ONE, TWO, THREE]
    rig.write(text_of(ONE, more=ORGANIZATION.replace("refresh_s", f"exclude: ['{TWO}'], refresh_s")))
    assert await rig.look() == [ONE, THREE]


class NoArchive(Members):
    """Without an archive to read."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(S3(), clock)

    async def read(self, *, older_than_s: float = 0) -> None: ...


class Aws:
    """Organizations, as `list_organization` asks it."""

    def __init__(self) -> None:
        self.answers: list[Listing | Exception] = []
        self.asked = 0

    async def __call__(self, config: Config, *_: object) -> Listing:
        self.asked += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        assert config.organization is not None
        question = question_of(config.organization)
        return answer.model_copy(update={"question": question})


@asynccontextmanager
async def lister_of(
    s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Lister, Aws, ManualClock]]:
    aws, clock = Aws(), ManualClock(1000)
    monkeypatch.setattr(members_module, "list_organization", aws)
    yield Lister(S3(bucket=bucket, endpoint_url=s3_endpoint), clock), aws, clock


def config_of(path: Path, s3_endpoint: str, bucket: str, more: str = ORGANIZATION) -> Config:
    path.write_text(text_of(ONE, more=f"{more}\ns3: {{bucket: {bucket}, endpoint_url: '{s3_endpoint}'}}"))
    return load(path, environ={})


async def test_what_the_coordinator_lists_is_what_the_others_read(
    path: Path, s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(path, s3_endpoint, bucket)
    async with lister_of(s3_endpoint, bucket, monkeypatch) as (lister, aws, clock):
        aws.answers = [listing(TWO, listed_at_s=1000)]
        assert await lister.refresh(config)
        assert not await lister.refresh(config)
        assert [a.id for a in (await with_known(config)).accounts] == [ONE, TWO]
        # A coordinator that starts again has it from there, and asks when it is due.
        again = Lister(config.s3, clock)
        await again.read()
        assert not await again.refresh(config)
        assert aws.asked == 1
        clock.advance(600)
        aws.answers = [listing(TWO, THREE, listed_at_s=1600)]
        assert await again.refresh(config)
        assert [a.id for a in (await with_known(config)).accounts] == [ONE, TWO, THREE]


async def test_a_failed_refresh_keeps_what_is_known_says_how_old_and_backs_off(
    path: Path, s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(path, s3_endpoint, bucket)
    async with lister_of(s3_endpoint, bucket, monkeypatch) as (lister, aws, clock):
        aws.answers = [listing(TWO, listed_at_s=1000)]
        await lister.refresh(config)
        aws.answers = [Transient("aws", "away")] * 30
        clock.advance(600)
        asked_at = []
        with structlog.testing.capture_logs() as logs:
            for _ in range(2000):
                before = aws.asked
                assert not await lister.refresh(config)
                asked_at += [clock.now_s() - 1600] if aws.asked > before else []
                clock.advance(1)
        assert asked_at == [0, 30, 90, 210, 450, 930, 1530]
        assert (logs[-1]["event"], logs[-1]["known_accounts"]) == ("organization_not_listed", 1)
        assert logs[-1]["age_s"] == 600 + 1530
        assert lister.listing == aws_listing(lister)
        lister.hurry()
        await lister.refresh(config)
        assert aws.asked == len(asked_at) + 2


def aws_listing(lister: Lister) -> Listing:
    assert lister.listing is not None
    return listing(TWO, listed_at_s=1000, question=lister.listing.question)


async def test_another_question_is_asked_at_once(
    path: Path, s3_endpoint: str, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lister_of(s3_endpoint, bucket, monkeypatch) as (lister, aws, _):
        aws.answers = [
            listing(TWO, listed_at_s=1000),
            Transient("aws", "away"),
            listing(THREE, listed_at_s=1000),
        ]
        await lister.refresh(config_of(path, s3_endpoint, bucket))
        tagged = config_of(
            path, s3_endpoint, bucket, ORGANIZATION.replace("refresh_s", "tags: {a: b}, refresh_s")
        )
        assert not await lister.refresh(tagged)
        in_a_unit = config_of(
            path, s3_endpoint, bucket, ORGANIZATION.replace("refresh_s", "units: [r-ab12], refresh_s")
        )
        assert await lister.refresh(in_a_unit)
        assert aws.asked == 3


async def test_a_list_that_cannot_be_shared_is_not_used(
    path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(path, s3_endpoint, "no-such-bucket")
    async with lister_of(s3_endpoint, "no-such-bucket", monkeypatch) as (lister, aws, _):
        aws.answers = [listing(TWO, listed_at_s=1000)]
        assert not await lister.refresh(config)
        assert lister.listing is None


@pytest.mark.parametrize(
    "body", [b"?", b"{}", b'{"question": "q", "listed_at_s": 1, "accounts": [{"id": "1"}]}']
)
async def test_a_spoilt_list_is_none_and_what_is_known_stays(
    s3_endpoint: str, bucket: str, body: bytes
) -> None:
    s3 = S3(bucket=bucket, endpoint_url=s3_endpoint)
    members = Members(s3, SystemClock())
    async with open_archive(s3, SystemClock()) as archive:
        await archive.cache(KEY, encode(listing(TWO)))
        await members.read(older_than_s=0)
        await archive.cache(KEY, body)
        with structlog.testing.capture_logs() as logs:
            await members.read(older_than_s=0)
    assert members.listing == listing(TWO)
    assert [line["event"] for line in logs] == ["organization_as_last_known"]
