"""A choice is a record like any other, and no weight hangs on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import AssignmentRecord, Quantity
from side_trainer.method import Step
from side_trainer.operator.audit import verify
from side_trainer.operator.rebuild import rebuild
from side_trainer.operator.tuning import chosen
from side_trainer.settings.tuning import TuningConfig
from sidestream.contract.messages import Assignment, Telemetry, TrainerStatus
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import pack
from tests.trainer.conftest import FakeDevice, append, config, devices, fold_all, settle
from tests.trainer.test_trainer import TOPICS, Listener, born, final, send, trainer
from tests.until import until


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


def choice(device: str, **changes: object) -> bytes:
    record = AssignmentRecord(
        tier="big",
        device=device,
        unix_s=1e9,
        what=Quantity.BATCH_SIZE,
        up=False,
        batch_size=8,
        max_tokens=128,
        sampling="segments:4",
        codec=Codec.INT4,
        advised="big",
        why="memory at 112% of what is allowed",
    )
    return msgspec.json.encode(msgspec.structs.replace(record, **changes))


def test_a_choice_moves_no_weight(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / FILE_NAME)) as journal:
        job, fleet = Job(config(tmp_path), journal), devices()
        settle(job, fleet)
        for device in fleet:
            append(journal, device, device.batch(job.plan))
        fold = fold_all(journal, Fold(journal))
        before, state = fold.digest(), {name: array.tobytes() for name, array in fold.state().items()}
        offset = journal.append("assignment", choice("dev-0"), tier="big")
        assert fold.apply(journal.get(offset)) == Step()
        assert fold.digest() == before
        assert {name: array.tobytes() for name, array in fold.state().items()} == state
        for device in fleet:
            append(journal, device, device.batch(job.plan))
        assert fold_all(journal, fold).digest() == fold_all(journal, Fold(journal)).digest() != before


@pytest.mark.slow
def test_a_rebuild_takes_out_what_was_chosen_for_the_device_and_nothing_else(tmp_path: Path) -> None:
    with closing(Journal(tmp_path / FILE_NAME)) as journal:
        job, fleet = Job(config(tmp_path), journal), devices()
        settle(job, fleet)
        for device in fleet:
            append(journal, device, device.batch(job.plan))
            journal.append("assignment", choice(device.name), tier="big")
    rebuild(tmp_path, ["dev-1"])
    assert [one.choice.device for one in chosen(tmp_path)] == ["dev-0", "dev-2"]
    with closing(Journal(tmp_path / FILE_NAME)) as journal:
        assert fold_all(journal, Fold(journal)).offset == journal.tail


class Reporting:
    """A device that is far too slow, whatever it does."""

    def __init__(self, listener: Listener, device: FakeDevice) -> None:
        self.listener, self.device = listener, device
        self.samples, self.topic = 0, TOPICS.assignment(device.tier, device.name)

    def said(self) -> Assignment | None:
        return self.listener.last(self.topic, Assignment)

    def report(self) -> None:
        self.samples += 20
        said = self.said()
        told = Telemetry(
            stream=self.device.stream,
            samples_forwarded=self.samples,
            forward_seconds=100.0 * self.samples,
            assignment=said.version if said is not None else 0,
        )
        topic = TOPICS.telemetry(self.device.tier, self.device.name)
        self.listener.transport.publish(topic, pack(told))

    def gets(self, batch_size: int) -> bool:
        self.report()
        said = self.said()
        return said is not None and said.batch_size == batch_size


@pytest.mark.slow
def test_what_is_learnt_stays_final_when_something_is_chosen_and_verify_finds_the_same(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    """Nothing is published anew, and a second start says the same of it."""
    settings = config(tmp_path, autotune=True, tuning=TuningConfig(window_h=1e-4))
    listener, fleet = Listener(broker.transport("watch")), devices()
    with trainer(broker, settings):
        plan = born(listener, fleet)
        assert plan.tiers["big"].assignable is not None
        for device in fleet:
            send(listener, device, device.batch(plan))
        manifest = final(listener, 24)
        slow = Reporting(listener, fleet[0])
        until(lambda: slow.gets(4), "the choices")

        def settled() -> bool:
            status = listener.last(TOPICS.trainer_status, TrainerStatus)
            return status is not None and status.final and status.version >= manifest.version + 2

        until(settled, "they are folded")
        published = [
            event for event in listener.seen if event.topic == TOPICS.weights("big") and event.payload
        ]
        assert listener.manifest() == manifest
        assert len({event.payload for event in published}) == len(published)
    assert verify(tmp_path).matches
    listener.seen.clear()
    with trainer(broker, settings):
        until(lambda: slow.said() is not None, "it is said again")
    said = slow.said()
    assert said is not None and said.batch_size == 4 and said.version == chosen(tmp_path)[0].offset
    assert verify(tmp_path).matches


def test_without_autotune_nothing_is_chosen_and_plans_are_as_ever(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    listener, fleet = Listener(broker.transport("watch")), devices()
    with trainer(broker, config(tmp_path, tuning=TuningConfig(window_h=1e-5))):
        plan = born(listener, fleet)
        assert plan.tiers["big"].assignable is None
        slow = Reporting(listener, fleet[0])
        for _ in range(20):
            slow.report()
        for device in fleet:
            send(listener, device, device.batch(plan))
        final(listener, 24)
    assert slow.said() is None and chosen(tmp_path) == []
