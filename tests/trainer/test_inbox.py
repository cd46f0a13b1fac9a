"""What the trainer lets in: any known policy in any codec in one job, and nothing longer than the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from metrics.catalogue import Reason
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.receive.inbox import Refused, examine
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from sidestream.contract.messages import ActivationBatch, to_bin
from sidestream.contract.plan import Plan
from sidestream.contract.sampling import Rung
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack
from sidestream.host.toml import load_config
from tests.trainer.conftest import WIDTHS, FakeDevice, append, config, devices, fold_all, settle

MIX = [
    *(("pivot", 1, Codec.F16), ("mean", 1, Codec.INT8), ("segments:4", 4, Codec.INT4)),
    *(("all", 9, Codec.NF4), ("random:3", 3, Codec.F32), ("important:5", 5, Codec.INT2)),
]


def plan_of(journal: Journal, tmp_path: Path, fleet: list[FakeDevice], **tier: Any) -> Plan:
    tiers = {
        "big": TierConfig(backbone="m", max_tokens=12, **tier),
        "small": TierConfig(backbone="m", layers=3, max_tokens=12, precision="int8"),
    }
    job = Job(config(tmp_path, tiers=tiers), journal)
    settle(job, fleet)
    return job.plan


def sent(device: FakeDevice, plan: Plan, sampling: str, vectors: int, codec: Codec) -> ActivationBatch:
    batch = device.batch(plan, rows=4)
    values = np.random.default_rng(1).standard_normal((len(batch.taps), 4 * vectors, WIDTHS[device.tier]))
    return msgspec.structs.replace(
        batch,
        sampling=sampling,
        lengths=to_bin([vectors] * 4, "<u2"),
        activations=encode(values.astype(np.float32), codec),
    )


def test_one_job_learns_from_every_policy_codec_and_precision(journal: Journal, tmp_path: Path) -> None:
    fleet, ladder = devices(), tuple((sampling, codec) for sampling, _, codec in MIX)
    plan = plan_of(journal, tmp_path, fleet, ladder=ladder)
    small = msgspec.structs.replace(plan.tiers["small"], ladder=plan.tiers["big"].ladder)
    plan = msgspec.structs.replace(plan, tiers={**plan.tiers, "small": small})
    assert plan.tiers["small"].precision == "int8" and plan.tiers["small"].align == plan.tiers["big"].align
    for number, (sampling, vectors, codec) in enumerate(MIX):
        device = fleet[number % len(fleet)]
        batch = sent(device, plan, sampling, vectors, codec)
        assert examine(pack(batch), device.tier, plan).batch == batch
        assert append(journal, device, batch)
    fold = fold_all(journal, Fold(journal))
    assert fold.samples == 4 * len(MIX)
    assert all(np.isfinite(array).all() for array in fold.weights().values())


@pytest.mark.parametrize(
    ("sampling", "vectors", "message"),
    [
        *(("best:3", 3, "no policy"), ("random:99", 3, "1 to 64"), ("", 1, "no policy")),
        *(
            ("random:3", 3, "no policy of the plan's: all, mean"),
            ("all", 13, "plan's 12"),
            ("mean", 2, "1 of"),
        ),
    ],
)
def test_policies_outside_the_plan_and_rows_over_the_length_they_give_are_refused(
    journal: Journal, tmp_path: Path, sampling: str, vectors: int, message: str
) -> None:
    fleet = devices()
    plan = plan_of(journal, tmp_path, fleet)
    batch = sent(fleet[0], plan, sampling, vectors, Codec.INT8)
    with pytest.raises(Refused, match=message) as caught:
        examine(pack(batch), "big", plan)
    assert caught.value.reason is Reason.MISMATCH and caught.value.batch == batch


def test_what_was_made_by_an_earlier_plans_policy_is_taken_after_a_restart(
    journal: Journal, tmp_path: Path
) -> None:
    fleet = devices()
    batch = sent(fleet[0], plan_of(journal, tmp_path, fleet, sampling="random:3"), "random:3", 3, Codec.INT8)
    job = Job(config(tmp_path), journal)
    with pytest.raises(Refused, match="no policy of the plan's"):
        examine(pack(batch), "big", job.plan)
    assert examine(pack(batch), "big", job.plan, job.policies).batch == batch


def test_a_ladder_in_the_settings_is_the_plans(journal: Journal, tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    path.write_text(
        'job = "colours"\n[tiers.big]\nprecision = "bf16"\n'
        'ladder = [["all", "int4"], ["segments:8", "int4"], ["important:2", "int2"]]\n'
    )
    tier = load_config(TrainerConfig, path).checked().tiers["big"]
    plan = plan_of(journal, tmp_path, devices(), ladder=tier.ladder, precision=tier.precision)
    assert plan.tiers["big"].precision == "bf16"
    assert plan.tiers["big"].ladder == (
        Rung(sampling="all", codec=Codec.INT4),
        Rung(sampling="segments:8", codec=Codec.INT4),
        Rung(sampling="important:2", codec=Codec.INT2),
    )
    assert plan.tiers["small"].ladder == ()
