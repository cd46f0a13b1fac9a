"""Choices in a running trainer: journaled, told, shown, and gone on from after a restart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from metrics.catalogue import TrainerMetrics, level, values
from metrics.fleet_page.fleet import Fleet
from side_trainer.autotune.tuner import Tuner
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import AssignmentRecord
from side_trainer.operator.tuning import chosen, in_words
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tuning import TuningConfig
from sidestream.cli import build_parser
from sidestream.contract.errors import StorageError
from sidestream.contract.messages import Assignment, Telemetry
from sidestream.contract.signing import Scope, Signer, open_signed
from sidestream.contract.topics import Topics, Uplink
from tests.trainer.conftest import config, devices, settle

TUNING = TuningConfig(window_h=1.0)
SIGNER = Signer.new()
REPORT_S = 600.0


class Link:
    """Stands for connection and leadership."""

    def __init__(self, fence: int) -> None:
        self.active, self.fence = True, fence


class Downlink:
    """Keeps what was published, as long as the broker takes it."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bytes]] = []
        self.takes = True

    def send(self, topic: str, payload: bytes, *, retain: bool = False, tier: str = "") -> bool:
        assert retain and tier
        if self.takes:
            self.sent.append((topic, payload))
        return self.takes


class Figures:
    def __init__(self, settings: TrainerConfig) -> None:
        self.metrics = TrainerMetrics(CollectorRegistry())
        self.metrics.set_tiers(settings.tiers)
        self.fleet = Fleet(settings.tiers)
        self.assigned: Any = None


class Run:
    """A trainer's part that chooses, on one journal, with one device that does as it is told."""

    def __init__(
        self,
        journal: Journal,
        settings: TrainerConfig,
        *,
        fence: int = 1,
        start_s: float = 0.0,
        most: int = 100,
    ) -> None:
        self.journal, self.fence, self.now = journal, fence, start_s
        self.link, self.downlink, self.figures = Link(fence), Downlink(), Figures(settings)
        self.job = Job(settings, journal)
        settle(self.job, devices())
        self.tuner = Tuner(
            settings.tuning,
            journal,
            self.job,
            cast(Any, self.link),
            cast(Any, self.downlink),
            Topics("colours"),
            TrainerSigner("colours", SIGNER),
            cast(Any, self.figures),
            clock=lambda: 1e9 + self.now,
            most=most,
        )
        self.assignment, self.samples = 0, int(start_s)

    def report(
        self, *, memory: float = 0.1, name: str = "dev-0", after_s: float = REPORT_S, **changes: Any
    ) -> None:
        """Ten minutes pass, and the device reports; then the trainer does its duties."""
        self.now += after_s
        self.samples += 100
        figures: dict[str, Any] = {
            "stream": f"{0:032x}",
            "samples_forwarded": self.samples,
            "forward_seconds": self.samples * 0.05,
            "sending_seconds": self.now / 100,
            "rss_bytes": int(1000 * memory),
            "memory_free_bytes": 1000 - int(1000 * memory),
            "assignment": self.assignment,
        }
        told = Telemetry(**{**figures, **changes})
        uplink = Uplink(tier="big", device=name, kind="telemetry")
        self.figures.fleet.on_telemetry("big", name, told, self.now)
        self.tuner.on_telemetry(uplink, told, self.now)
        self.tuner.tick(self.now)

    def hours(self, count: int, **about: Any) -> None:
        for _ in range(6 * count):
            self.report(**about)

    def told(self, name: str = "dev-0") -> list[Assignment]:
        """What a device was told, each as it can be believed."""
        topic = Topics("colours").assignment("big", name)
        scope = Scope(kind="assignment", job="colours", tier="big", device=name)
        return [
            open_signed(Assignment, payload, scope, [SIGNER.public])
            for where, payload in self.downlink.sent
            if where == topic
        ]

    def records(self) -> list[AssignmentRecord]:
        return [
            msgspec.json.decode(record.payload, type=AssignmentRecord)
            for record in self.journal.others(self.journal.tail, ("assignment",))
        ]


@contextmanager
def running(folder: Path, **about: Any) -> Iterator[Run]:
    tuning = about.pop("tuning", TUNING)
    with closing(Journal(folder / FILE_NAME)) as journal:
        yield Run(journal, config(folder, autotune=True, tuning=tuning), **about)


def test_a_choice_is_journaled_and_its_device_told(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(2, memory=0.9)
        assert run.told() == [] and run.records() == []
        run.report(memory=0.9)
        [record] = run.records()
        assert (record.tier, record.device, record.batch_size) == ("big", "dev-0", 8)
        assert record.unix_s == 1e9 + run.now
        [told] = run.told()
        assert told == Assignment(
            run=run.journal.run,
            version=run.journal.version_base + run.journal.tail,
            batch_size=8,
            max_tokens=128,
            sampling="segments:4",
            codec=told.codec,
            fence=1,
            key_id=told.key_id,
            signature=told.signature,
        )


def test_a_device_is_judged_again_only_once_it_goes_by_what_it_was_told(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(10, memory=0.9)
        assert len(run.records()) == 1
        run.assignment = run.told()[-1].version
        run.hours(3, memory=0.9)
        assert [record.batch_size for record in run.records()] == [8, 4]


def test_a_device_that_does_not_go_by_it_is_told_again_now_and_then(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(3, memory=0.9)
        before = len(run.told())
        for _ in range(60):
            run.report(after_s=60.0)
        assert len(run.told()) == before + 6
        assert level(run.figures.metrics.unheeding.labels("big")) == 1
        assert len(set(run.told())) == 1
        run.assignment = run.told()[-1].version
        run.report()
        known = len(run.told())
        run.hours(2)
        assert len(run.told()) == known
        assert level(run.figures.metrics.unheeding.labels("big")) == 0


def test_a_restarted_trainer_says_the_same_and_chooses_the_same(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(3, memory=0.9)
        [before] = run.told()[-1:]
        now = run.now
    with running(tmp_path, fence=2, start_s=now) as run:
        run.tuner.tick(run.now)
        [told] = run.told()
        assert (told.version, told.batch_size, told.fence) == (before.version, 8, 2)
        run.assignment = told.version
        run.hours(20)
        assert len(run.records()) == 1, "what was lowered rests, restart or not"
        run.hours(6)
        assert [record.batch_size for record in run.records()] == [8, 16]


def test_a_fresh_reign_says_everything_again(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(3, memory=0.9)
        run.assignment = run.told()[-1].version
        run.report()
        before = len(run.told())
        run.link.active = False
        run.tuner.tick(run.now)
        assert len(run.told()) == before
        run.link.active = True
        run.tuner.tick(run.now)
        assert len(run.told()) == before + 1


def test_what_could_not_be_sent_is_sent_later(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.downlink.takes = False
        run.hours(3, memory=0.9)
        assert run.told() == []
        run.downlink.takes = True
        run.tuner.tick(run.now)
        assert [told.batch_size for told in run.told()] == [8]


def test_nothing_is_told_that_could_not_be_journaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running(tmp_path) as run:
        with monkeypatch.context() as patch:

            def full(*_: object, **__: object) -> int:
                raise StorageError("the disk is full")

            patch.setattr(run.journal, "append", full)
            run.hours(4, memory=0.9)
        assert run.told() == [] and "the disk is full" in caplog.text
        run.hours(1, memory=0.9)
        assert len(run.records()) == 1


def test_a_journal_that_was_set_back_has_its_device_go_by_the_tiers_plan_again(tmp_path: Path) -> None:
    """The device goes by a choice that nobody knows of; the fence is higher, so it takes the word."""
    with running(tmp_path, fence=5) as run:
        run.assignment = 99
        run.report()
        [told] = run.told()
        assert (told.version, told.batch_size, told.sampling, told.fence) == (0, 16, "segments:4", 5)
        run.assignment = 0
        run.hours(3, memory=0.9)
        assert len(run.records()) == 1


def test_other_bounds_bring_what_was_chosen_within(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.hours(3, memory=0.9)
        now = run.now
    with running(tmp_path, start_s=now, tuning=msgspec.structs.replace(TUNING, batch_size_min=12)) as run:
        run.tuner.tick(run.now)
        assert [(record.what.value, record.batch_size) for record in run.records()] == [
            ("batch_size", 8),
            ("bounds", 12),
        ]
        assert run.told()[-1].batch_size == 12
        assert run.job.plan.tiers["big"].assignable is not None


def test_a_quarantined_device_is_not_judged(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        run.figures.fleet.held = lambda device: True
        run.hours(5, memory=0.9)
        assert run.records() == []


def test_page_and_metrics_show_what_was_chosen(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        assert run.figures.assigned("big", "dev-0") is None
        run.hours(3, memory=0.9)
        view = run.figures.assigned("big", "dev-0")
        assert view.words == "batches of 8, 128 tokens, segments:4 int4"
        assert view.why == "memory at 112% of what is allowed" and not view.heeded and view.advised == ""
        run.assignment = run.told()[-1].version
        run.report()
        assert run.figures.assigned("big", "dev-0").heeded
        metrics = run.figures.metrics
        assert values(metrics.chosen)[("big", "batch_size")] == 1
        assert (level(metrics.assigned.labels("big")), level(metrics.advised.labels("big"))) == (1, 0)


def test_advice_is_journaled_shown_and_told_to_the_operator_and_changes_no_batch(tmp_path: Path) -> None:
    hasty = msgspec.structs.replace(TUNING, changes_a_day=100)
    with running(tmp_path, tuning=hasty) as run:
        for _ in range(30):
            run.hours(1, memory=0.95)
            run.assignment = run.told()[-1].version if run.told() else 0
        last = run.records()[-1]
        assert (last.what.value, last.advised) == ("tier", "small")
        assert run.figures.assigned("big", "dev-0").advised == "small"
        assert level(run.figures.metrics.advised.labels("big")) == 1
        assert (run.told()[-1].batch_size, run.told()[-1].max_tokens) == (4, 32)
    text = "\n".join(in_words(chosen(tmp_path)))
    assert "dev-0" in text and "sidestream fleet add-device FLEET dev-0 --tier small --again" in text
    assert len(chosen(tmp_path)) == 1
    assert len(chosen(tmp_path, "dev-0")) == 5
    assert chosen(tmp_path, "dev-1") == []


def test_devices_are_judged_each_for_itself(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        for _ in range(13):
            run.report(memory=0.9)
            run.report(memory=0.1, name="dev-2", stream=f"{2:032x}")
        assert run.told("dev-2") == []
        assert {record.device for record in run.records()} == {"dev-0"}


def test_of_more_devices_than_are_judged_none_loses_what_was_chosen_for_it(tmp_path: Path) -> None:
    with running(tmp_path, most=1) as run:
        run.hours(3, memory=0.9)
        run.assignment = run.told()[-1].version
        run.report()
        run.report(name="dev-2", stream=f"{2:032x}", assignment=0)
        assert list(run.tuner._devices) == [("big", "dev-2")]
        run.hours(20)
        assert [record.batch_size for record in run.records()] == [8], "and it rests as it did"
        run.hours(7)
        assert [record.batch_size for record in run.records()] == [8, 16]


def test_a_deeper_tier_is_advised_by_what_its_devices_measure(tmp_path: Path) -> None:
    with running(tmp_path) as run:
        for name, tier, accuracy in (("dev-0", "big", 0.9), ("dev-1", "small", 0.7)):
            told = Telemetry(stream=f"{9:032x}", accuracy=accuracy, evaluation_samples=2000)
            run.figures.fleet.on_status(tier, name, devices()[0].birth(), 0.0)
            run.figures.fleet.on_telemetry(tier, name, told, 0.0)
        assert run.tuner._accuracies(0.0) == {"big": (0.9, 2000), "small": (0.7, 2000)}
        assert run.tuner._accuracies(59.0) is run.tuner._accuracies(1.0)


def test_the_command_prints_what_was_chosen_and_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*more: str) -> str:
        args = build_parser().parse_args(["trainer", "tuning", "--state-dir", str(tmp_path), *more])
        assert args.handler(args) == 0
        return capsys.readouterr().out

    with running(tmp_path) as run:
        assert told() == "nothing was chosen; is autotune on?\n"
        run.hours(3, memory=0.9)
        assert "dev-0" in told() and "batches of 8, 128 tokens, segments:4 int4" in told()
        assert "(memory at 112% of what is allowed)" in told("--device", "dev-0")
        assert told("--device", "dev-9") == "nothing was chosen for dev-9\n"
        [found] = json.loads(told("--json"))
        assert found["choice"]["batch_size"] == 8 and found["offset"] == run.journal.tail
