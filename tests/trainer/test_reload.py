"""A tier added to the settings file joins the running job; what would disturb the others takes a restart."""

from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import msgspec
import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.operator.audit import verify
from side_trainer.operator.status import read_state
from side_trainer.rows.training_rows import StoredBatch, gather
from side_trainer.settings.reload import SettingsFile, take_up
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from sidestream.contract.errors import ConfigError
from sidestream.contract.messages import Flow, WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.wire import pack, unpack
from sidestream.host.signals import set_on_hangup
from sidestream.side_network.bundle import decode_bundle
from sidestream.side_network.network import from_bundle
from tests.trainer.conftest import LABELS, FakeDevice, config, devices, settle
from tests.trainer.test_trainer import TOPICS, Listener, born, final, receipted, send, trainer
from tests.until import until

TEXT = """\
job = "colours"
state_dir = "{state}"
labels = ["amber", "blue", "cyan", "dun"]
metrics_port = -1
idle_after_s = 0.05
publish_every_s = 0.05
checkpoint_every_s = 0.2
[broker]
url = "mqtt://user:hunter2@127.0.0.1"
[learner]
seed = 5
passes = 3
replay = 1
pass_rows = 8
replay_rows = 8
[tiers.big]
backbone = "m"
[tiers.small]
backbone = "m"
layers = 3
"""
WIDE = '[tiers.wide]\nbackbone = "another"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "trainer.toml"
    file.write_text(TEXT.format(state=tmp_path / "state"))
    return file


def accuracy(listener: Listener, device: FakeDevice, plan: Plan) -> float:
    """Of the tier's newest weights on rows that were never trained."""
    manifest = listener.manifest(device.tier)
    assert manifest is not None
    bundle = decode_bundle(listener.bundle(manifest, device.tier))
    stranger = FakeDevice(name="judge", tier=device.tier, stream="f" * 32, seed=4711)
    stored = StoredBatch.read(device.tier, pack(stranger.batch(plan, rows=128)))
    rows = gather(((stored, row) for row in range(128)), lambda _: bundle.about.tiers[device.tier])
    family = rows.families[0]
    answers = from_bundle(bundle).predict(family.align, family.activations, rows.mask).argmax(dim=-1)
    return float((answers == rows.targets).float().mean())


def teach(listener: Listener, fleet: list[FakeDevice], plan: Plan, *, batches: int) -> None:
    for _ in range(batches):
        for device in fleet:
            send(listener, device, device.batch(plan))
        until(lambda: all(receipted(listener, one) == one.sequence for one in fleet), "receipts")


@pytest.mark.slow
def test_a_tier_of_another_width_joins_half_way_and_the_others_lose_nothing(
    broker: InProcessBroker, path: Path
) -> None:
    file = SettingsFile(path)
    with trainer(broker, file.load(), file):
        listener, fleet = Listener(broker.transport("watch")), devices()
        first = born(listener, fleet)
        teach(listener, fleet, first, batches=10)
        final(listener, 240)
        before = {device.tier: accuracy(listener, device, first) for device in fleet}
        path.write_text(path.read_text() + WIDE)
        late = FakeDevice(name="late", tier="wide", stream="e" * 32, seed=77)
        until(lambda: (plan := listener.plan()) is not None and "wide" in plan.tiers, "the plan has it")
        plan = born(listener, [late])
        assert plan.revision > first.revision and plan.run == first.run
        assert {name: plan.tiers[name] for name in first.tiers} == first.tiers, "the others' part is the same"
        assert plan.tiers["wide"].align != plan.tiers["big"].align and plan.tiers["wide"].width == 24
        teach(listener, [late], plan, batches=20)
        teach(listener, fleet, plan, batches=1)
        manifest = final(listener, 240 + 160 + 24)
        final(listener, 424, "wide")
        after = {device.tier: accuracy(listener, device, plan) for device in [*fleet, late]}
    assert after["wide"] > 0.9, after
    assert all(after[tier] >= before[tier] - 0.02 for tier in before), (before, after)
    state = read_state(path.parent / "state")
    assert state.tiers == {"big": 6, "small": 3, "wide": 4} and state.samples_trained_unique == 424
    verdict = verify(path.parent / "state")
    assert verdict.matches and verdict.refold_digest == manifest.state_digest
    with trainer(broker, file.load(), file):
        listener.seen.clear()
        until(listener.plan, "a restart knows the tier")
        again = listener.plan()
        assert again is not None and again.tiers == plan.tiers
    assert verify(path.parent / "state").matches


def test_devices_of_the_new_tier_that_came_too_early_are_admitted_when_they_announce_themselves_again(
    broker: InProcessBroker, path: Path
) -> None:
    file = SettingsFile(path)
    with trainer(broker, file.load(), file):
        listener = Listener(broker.transport("watch"))
        until(listener.plan, "it runs")
        late = FakeDevice(name="late", tier="wide", stream="e" * 32)
        listener.transport.publish(TOPICS.status("wide", "late"), pack(late.birth()), retain=True)
        until(lambda: any("/rejected/wide/" in event.topic for event in listener.seen), "not yet")
        path.write_text(path.read_text() + WIDE)
        until(lambda: (plan := listener.plan()) is not None and "wide" in plan.tiers, "the plan has it")
        assert listener.last(TOPICS.flow("wide"), Flow) is not None
        born(listener, [late])
        teach(listener, [late], unpack(Plan, broker.retained[TOPICS.plan]), batches=2)
        until(lambda: TOPICS.weights("wide") in broker.retained, "it gets weights")
        unpack(WeightsManifest, broker.retained[TOPICS.weights("wide")])


def test_a_shallower_tier_that_joins_a_family_moves_nobodys_taps(journal: Journal, tmp_path: Path) -> None:
    running = config(tmp_path)
    job = Job(running, journal)
    settle(job, devices()[:1])
    fresh = msgspec.structs.replace(
        running, tiers={**running.tiers, "tiny": TierConfig(backbone="m", layers=2)}
    )
    updated, refused = take_up(running, fresh)
    assert not refused
    job.reconfigure(updated)
    settle(job, devices())
    tiny = FakeDevice(name="tiny", tier="big", stream="d" * 32).birth()
    job.on_birth("tiny", "tiny-1", msgspec.structs.replace(tiny, depth=2, fingerprint="t"), 0.0)
    assert {name: tier.taps for name, tier in job.plan.tiers.items()} == {
        "big": (1, 3, 6),
        "small": (1, 3),
        "tiny": (1, 2),
    }
    assert {name: tier.taps for name, tier in Job(updated, journal).plan.tiers.items()} == {
        name: tier.taps for name, tier in job.plan.tiers.items()
    }


# --- what may change, and what may not -------------------------------------------------------------------


def later(file: SettingsFile, running: TrainerConfig) -> TrainerConfig:
    file.asked.set()
    return file.update(running, 0.0)


def test_a_tier_that_cannot_join_is_told_with_its_table_and_what_to_do(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = config(tmp_path, tiers={"big": TierConfig(backbone="m", taps=(2, 99))})
    with caplog.at_level(logging.ERROR):
        settle(Job(settings, journal), devices()[:1])
    assert "tier big cannot join, its devices wait: tiers.big: taps [2, 99] must ascend" in caplog.text
    assert "correct it and restart the trainer" in caplog.text


def test_new_tiers_and_cadences_are_taken_up(path: Path) -> None:
    file = SettingsFile(path)
    running = file.load()
    text = path.read_text().replace("publish_every_s = 0.05", "publish_every_s = 30\npublish_change = 0.5")
    path.write_text(text.replace("idle_after_s = 0.05", "idle_after_s = 9") + WIDE)
    updated = later(file, running)
    assert set(updated.tiers) == {"big", "small", "wide"}
    assert (updated.publish_every_s, updated.publish_change, updated.idle_after_s) == (30, 0.5, 9)
    assert later(file, updated) == updated


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("seed = 5", "seed = 6", "learner.seed"),
        ("hunter2", "hunter3", "broker.url"),
        ("layers = 3", "layers = 2", "tiers.small.layers"),
        ("[tiers.small]", "[tiers.other]", "tiers.small"),
        ("metrics_port = -1", "metrics_port = 0", "metrics_port"),
        ('"dun"]', '"dun", "ecru"]', "labels"),
        ('job = "colours"', 'job = "others"', "job"),
    ],
)
def test_anything_else_is_refused_in_one_line_that_names_it(
    path: Path, caplog: pytest.LogCaptureFixture, old: str, new: str, named: str
) -> None:
    file = SettingsFile(path)
    running = file.load()
    path.write_text(path.read_text().replace(old, new) + WIDE)
    with caplog.at_level(logging.ERROR):
        updated = later(file, running)
    assert msgspec.structs.replace(updated, tiers=running.tiers) == running
    assert "wide" in updated.tiers and all(
        updated.tiers[name] == running.tiers[name] for name in running.tiers
    )
    assert len(caplog.records) == 1 and "restart" in caplog.text and f": {named} changed" in caplog.text
    assert "hunter" not in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "job = ",
        "\udcff",
        TEXT + WIDE + "bach_size = 3\n",
        TEXT + WIDE + "taps = [1, 2, 3, 4]\n",
        TEXT + '[tiers.wide]\nsampling = "some"\n',
        TEXT + f'[tiers.wide]\nbackbone = "{"x" * 600}"\n',
        TEXT + '[tiers."a/b"]\n',
        TEXT + "".join(f"[tiers.t{number}]\n" for number in range(63)),
        None,
    ],
)
def test_a_file_that_cannot_be_used_is_logged_once_and_ignored(
    path: Path, caplog: pytest.LogCaptureFixture, text: str | None
) -> None:
    file = SettingsFile(path)
    running = file.load()
    if text is None:
        path.unlink()
    else:
        path.write_bytes(text.encode(errors="surrogateescape"))
    with caplog.at_level(logging.ERROR):
        assert file.update(running, 10.0) == running
        assert file.update(running, 20.0) == running
    assert len(caplog.records) == 1 and "ignored" in caplog.text
    path.write_text(TEXT.format(state=path.parent / "state") + WIDE)
    assert "wide" in file.update(running, 30.0).tiers


def test_the_file_is_looked_at_every_two_seconds_and_read_only_when_it_changed(
    path: Path,
) -> None:
    file = SettingsFile(path)
    running = file.load()
    assert file.update(running, 10.0) is running
    path.write_text(path.read_text() + WIDE)
    assert file.update(running, 11.0) is running
    assert "wide" in file.update(running, 12.0).tiers


def test_flags_go_on_overriding_the_file(path: Path) -> None:
    file = SettingsFile(path, {"learner.seed": "9"})
    running = file.load()
    path.write_text(path.read_text() + WIDE)
    assert later(file, running).learner.seed == 9


def test_a_hangup_has_the_file_read_again(path: Path) -> None:
    file, before = SettingsFile(path), signal.getsignal(signal.SIGHUP)
    with set_on_hangup(file.asked):
        os.kill(os.getpid(), signal.SIGHUP)
        assert file.asked.wait(5)
    assert signal.getsignal(signal.SIGHUP) is before


def test_a_tier_that_does_not_go_with_the_settings_in_force_is_an_error() -> None:
    running = TrainerConfig(job="j", labels=LABELS)
    wrong = msgspec.structs.replace(running, tiers={**running.tiers, "x": TierConfig(taps=(1, 2, 3, 4))})
    with pytest.raises(ConfigError, match="blocks"):
        take_up(running, wrong)
