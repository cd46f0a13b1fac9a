"""Every method of a plan learns by a class that knows every kind of record, or nothing starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import RecordKind
from side_trainer.method_registry import METHODS, check_total
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from side_trainer.side_tuning.method import SideTuningMethod
from sidestream.contract import plan
from sidestream.contract.errors import DecodeError, StateError
from sidestream.contract.wire import to_map, unpack
from tests.contract.examples import plan as example
from tests.trainer.conftest import append, config, devices, fold_all, settle


def test_a_method_without_a_class_is_found() -> None:
    lacking: Any = {kind: method for kind, method in METHODS.items() if kind is not plan.MobiLLM}
    with pytest.raises(AssertionError, match="MobiLLM"):
        check_total(lacking)


def test_a_kind_of_record_without_a_handler_is_found() -> None:
    class Forgetful(SideTuningMethod):
        handlers: ClassVar = {RecordKind.BATCH: SideTuningMethod.handlers[RecordKind.BATCH]}

    with pytest.raises(AssertionError, match="Forgetful handles"):
        check_total({**METHODS, plan.FedMobiLLM: Forgetful})


@pytest.mark.parametrize("name", plan.METHODS)
def test_a_plan_carries_its_method_and_a_method_implies_settings(name: str) -> None:
    named = example(method=plan.METHODS[name]())
    assert to_map(named)["method"]["name"] == name
    settings = with_implied({"job": "j", "method": name})
    assert msgspec.convert(settings, TrainerConfig).method == name


@pytest.mark.parametrize(
    ("task", "codec"),
    [
        ("text-classification", "packed"),
        ("token-classification", "packed"),
        ("regression", "int8"),
        ("causal-lm", "int8"),
    ],
)
def test_weights_are_packed_where_it_is_known_what_that_costs(task: str, codec: str) -> None:
    assert msgspec.convert(with_implied({"job": "j", "task": task}), TrainerConfig).weights_codec == codec
    chosen = with_implied({"job": "j", "task": task, "weights_codec": "f16"})
    assert msgspec.convert(chosen, TrainerConfig).weights_codec == "f16"


def test_a_plan_of_a_method_that_is_not_known_is_refused() -> None:
    strange = {**to_map(example()), "method": {"name": "telepathy"}}
    with pytest.raises(DecodeError, match="method"):
        unpack(plan.Plan, msgspec.msgpack.encode(strange))


def test_the_method_in_the_settings_is_the_one_that_folds_and_every_kind_is_told_apart(
    journal: Journal, tmp_path: Path
) -> None:
    job = Job(config(tmp_path, method="mobillm"), journal)
    assert isinstance(job.plan.method, plan.MobiLLM)
    device, *_ = fleet = devices()
    settle(job, fleet)
    append(journal, device, device.batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    assert isinstance(fold.method, SideTuningMethod) and isinstance(fold.facts.settings.method, plan.MobiLLM)
    journal.append("dream", b"{}")
    with pytest.raises(StateError, match="'dream' record"):
        fold_all(journal, fold)
