"""Accounts from AWS Organizations: how they join a configuration, how they are listed, and how the list is shared."""

from __future__ import annotations

import pytest

from shard_config.load import loads
from shard_config.model import Config
from shard_config.organization import Listing, Member, question_of, with_accounts

TEXT = """
defaults: {regions: [eu-west-1, us-east-1], services: [ec2, sqs]}
accounts:
  - {id: "111111111111", alias: ours, services: [ec2]}
organization:
  role_template: arn:aws:iam::{account}:role/Reader
  external_id: a-secret
  exclude: ["333333333333"]
  services: [sqs]
  budget_usd_per_day: 5
"""
FOUND = Listing(
    question="q",
    listed_at_s=1,
    accounts=tuple(Member(id=str(n) * 12, name=f"name {n}") for n in (4, 3, 2, 1)),
)


def config_of(text: str = TEXT) -> Config:
    return loads(text, "headgate.yaml", {})


def test_members_join_as_the_section_says_and_accounts_of_the_file_stay_as_they_are() -> None:
    config = with_accounts(config_of(), FOUND)
    ours, *found = config.accounts
    assert (ours.id, ours.alias, ours.services) == ("111111111111", "ours", ("ec2",))
    assert [(a.id, a.alias) for a in found] == [("222222222222", "name 2"), ("444444444444", "name 4")]
    new = found[0]
    assert (new.regions, new.services) == (("eu-west-1", "us-east-1"), ("sqs",))
    assert (new.role_arn, new.budget_usd_per_day) == ("arn:aws:iam::222222222222:role/Reader", 5)
    assert new.external_id is not None
    assert new.external_id.get_secret_value() == "a-secret"


def test_what_members_are_asked_for_is_among_the_services_before_there_are_any() -> None:
    assert set(config_of().service_by_name) == {"ec2", "sqs"}


def test_a_new_member_is_another_revision_and_the_order_of_the_list_is_not() -> None:
    config = config_of()
    turned = FOUND.model_copy(update={"accounts": FOUND.accounts[::-1]})
    assert with_accounts(config, FOUND).revision == with_accounts(config, turned).revision
    assert with_accounts(config, FOUND).revision != config.revision


def test_without_an_organization_or_without_a_list_nothing_joins() -> None:
    config = config_of()
    assert with_accounts(config, None) is config
    alone = config.model_copy(update={"organization": None})
    assert with_accounts(alone, FOUND) is alone


@pytest.mark.parametrize(
    ("line", "another"),
    [("tags: {stage: prod}", True), ("units: [r-ab12]", True), ("regions: [eu-west-2]", False)],
)
def test_another_question_is_what_aws_would_answer_otherwise(line: str, another: bool) -> None:
    before, after = config_of().organization, config_of(TEXT + f"  {line}\n").organization
    assert before is not None
    assert after is not None
    assert (question_of(before) != question_of(after)) is another
