"""What a device says of a plan that it cannot follow."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import msgspec
import pytest

from edge_agent.session.plan_inbox import PlanInbox, PlanVerdict
from edge_agent.store.outbox import Outbox
from edge_agent.weights.trust import Trust
from sidestream.contract.errors import DecodeError
from sidestream.contract.wire import to_map
from tests.contract.examples import plan


def inbox(folder: Path) -> PlanInbox:
    return PlanInbox("assist", "full", cast(Outbox, None), Trust(folder, job="assist", tier="full"))


def test_a_method_that_it_does_not_know_is_told_once_with_the_remedy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    strange = msgspec.msgpack.encode({**to_map(plan()), "method": {"name": "telepathy"}})
    plans = inbox(tmp_path)
    for _ in range(3):
        assert plans.on_plan(strange, working=False) is PlanVerdict.IGNORED
    told = "does not know (it knows fed-mobillm, mobillm, split-lora, split-frozen); update the agent"
    assert caplog.text.count(told) == 1 and told in plans._waits_for(True, loaded=False)


def test_other_damage_is_told_as_it_is(tmp_path: Path) -> None:
    damaged = msgspec.msgpack.encode({**to_map(plan()), "tiers": 7})
    with pytest.raises(DecodeError, match=r"not a Plan: .*\$\.tiers"):
        inbox(tmp_path).on_plan(damaged, working=False)


def test_a_device_whose_backbone_loads_does_not_blame_the_trainer(tmp_path: Path) -> None:
    plans = inbox(tmp_path)
    plans.plan = plan(tiers={"full": msgspec.structs.replace(plan().tiers["full"], fingerprint="")})
    assert plans.trouble(labels_known=True, loaded=False) == "waits until its backbone is loaded"
    assert "until the trainer has settled the tier" in plans.trouble(labels_known=True, loaded=True)
    plans.plan = plan(tiers={"half": plan().tiers["half"]})
    assert "backbone" not in plans._waits_for(True, loaded=False)
