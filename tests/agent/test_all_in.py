"""Whether everything is receipted: by the trainer that is there, and not by one that has gone since."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from edge_agent.session.receipts import Receipts
from edge_agent.store.streams import Settled
from edge_agent.uplink.link_state import LinkState
from sidestream.contract.messages import Receipt
from sidestream.contract.wire import pack

STREAM = "a" * 32


@pytest.fixture
def told() -> Any:
    """Receipts of a device without anything in its outbox, with the plan of a trainer of fence 5."""
    plans = SimpleNamespace(plan=SimpleNamespace(fence=5), is_deposed=lambda fence: False)
    streams = SimpleNamespace(receipt=lambda receipt, ruling: Settled())
    outbox = SimpleNamespace(stream=STREAM, size=lambda: (0, 0), streams=streams)
    link = LinkState()
    parts = {"plans": plans, "weights": SimpleNamespace(version=1), "link": link, "in_flight": None}
    receipts = Receipts("t", outbox, **parts)  # type: ignore[arg-type]
    return SimpleNamespace(receipts=receipts, link=link, plans=plans)


def receipt(told: Any, fence: int) -> None:
    told.receipts.take(pack(Receipt(stream=STREAM, upto=0, fence=fence)))


def status(told: Any, fence: int, *, online: bool) -> None:
    told.link.trainer_online, told.link.trainer_fence = online, fence


def test_it_takes_a_receipt_of_the_trainer_whose_plan_is_in_force(told: Any) -> None:
    assert not told.receipts.all_in()
    receipt(told, 4)
    assert not told.receipts.all_in()
    receipt(told, 5)
    assert told.receipts.all_in(), "nothing is known of the trainer's coming and going"


def test_a_receipt_that_the_broker_kept_of_a_trainer_that_has_gone_is_none(told: Any) -> None:
    status(told, 5, online=False)
    receipt(told, 5)
    assert not told.receipts.all_in(), "the next one may come from a backup, and lack what this one had"
    status(told, 7, online=True)
    assert not told.receipts.all_in()
    told.plans.plan.fence = 7
    assert not told.receipts.all_in()
    receipt(told, 7)
    assert told.receipts.all_in()


def test_a_new_trainers_plan_may_come_after_its_receipt_and_its_status(told: Any) -> None:
    status(told, 5, online=False)
    receipt(told, 7)
    status(told, 7, online=True)
    told.plans.plan.fence = 7
    assert told.receipts.all_in()


def test_a_trainer_may_go_once_it_has_answered(told: Any) -> None:
    status(told, 5, online=True)
    receipt(told, 5)
    status(told, 5, online=False)
    assert told.receipts.all_in()
