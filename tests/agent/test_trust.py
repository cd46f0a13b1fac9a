"""A device that was given a key adopts nothing but what is signed with it, nothing older than it has had."""

from __future__ import annotations

import json
import logging
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import msgspec
import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.weights.adopted import load_adopted
from edge_agent.weights.trust import MOST_RUNS, Trust, read_trusted
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import ConfigError, StateError, UntrustedError
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.signing import Scope, Signer, key_id, public_pem
from sidestream.contract.wire import pack
from tests.agent.fake_trainer import JOB, RUN, TIER, FakeTrainer
from tests.agent.fleet import Running, write_samples
from tests.until import Clock, until

OLD, NEW, STRANGER = Signer.new(), Signer.new(), Signer.new()
OTHER_RUN = "cd" * 16
PLAN_SCOPE = Scope(kind="plan", job=JOB)
WEIGHTS_SCOPE = Scope(kind="weights", job=JOB, tier=TIER)


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path = tmp_path / "keys.pem"
    path.write_bytes(public_pem(OLD.public))
    return str(path)


def in_use(tmp_path: Path) -> int:
    kept = load_adopted(tmp_path / "state-pi-1")
    return kept.adopted.version if kept is not None else 0


def refusals(trainer: FakeTrainer, count: int) -> bool:
    return trainer.telemetry["pi-1"].weights_refused == count


def test_signed_plan_and_weights_are_adopted_whole_and_in_parts(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path, keys: str
) -> None:
    trainer.signer = OLD
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, trusted_keys_file=keys):
        trainer.publish_weights(3)
        until(lambda: in_use(tmp_path) == 3)
        trainer.publish_weights(4, chunks=3, final=True)
        until(lambda: in_use(tmp_path) == 4)


@pytest.mark.slow
def test_weights_unsigned_altered_of_a_stranger_for_another_or_cut_short_are_not_adopted(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    keys: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    trainer.signer = OLD
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, trusted_keys_file=keys):
        trainer.publish_weights(5)
        until(lambda: in_use(tmp_path) == 5)
        manifest = trainer.manifest(9, trainer.bundle(9))
        signed = OLD.sign(manifest, WEIGHTS_SCOPE)
        chunked = trainer.manifest(9, trainer.bundle(9), chunks=1)
        bad = [
            pack(manifest),
            STRANGER.sign(manifest, WEIGHTS_SCOPE),
            signed.replace(b"head.bias", b"head.bIas"),
            signed[:-1],
            OLD.sign(manifest, Scope(kind="weights", job="other", tier=TIER)),
            OLD.sign(manifest, Scope(kind="weights", job=JOB, tier="pi5")),
            OLD.sign(manifest, PLAN_SCOPE),
        ]
        for count, payload in enumerate(bad, start=1):
            trainer.send(trainer.topics.weights(TIER), payload)
            trainer.wait(partial(refusals, count=count))
        assert caplog.text.count("weights are not adopted") == len(bad)
        # A manifest that is signed, and a chunk that is not the one it names.
        trainer.send(trainer.topics.weights(TIER), chunked)
        part = bytearray(trainer.bundle(9))
        part[-1] ^= 1
        trainer.publish_chunk(9, 0, bytes(part))
        until(lambda: "version 9 refused" in caplog.text)
        assert in_use(tmp_path) == 5
        trainer.publish_weights(6)
        until(lambda: in_use(tmp_path) == 6)


def test_a_plan_that_is_not_signed_is_not_worked_by_and_the_log_says_why(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    keys: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, trusted_keys_file=keys) as agent:
        until(lambda: "a plan is not adopted: it is not signed" in caplog.text)
        assert not agent.asked
        trainer.signer = STRANGER
        trainer.publish_plan(revision=2)
        until(lambda: "which this device does not trust" in caplog.text)
        assert not agent.asked
        trainer.signer = OLD
        trainer.publish_plan(revision=3)
        until(lambda: agent.asked)


def test_a_device_without_a_key_takes_part_in_a_signed_job(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.signer = OLD
    trainer.publish_plan()
    with Running(broker, bert, tmp_path):
        trainer.publish_weights(3)
        until(lambda: in_use(tmp_path) == 3)


# --- forged ---------------------------------------------------------------------------------------------


FORGED: dict[str, dict[str, int]] = {
    "fence": {"fence": 2**50},
    "revision": {"revision": 2**50},
    "fence that no trainer has": {"fence": 2**61},
}


@pytest.mark.slow
@pytest.mark.parametrize("forged", FORGED.values(), ids=FORGED)
@pytest.mark.parametrize("signed", [False, True])
def test_a_forged_plan_deafens_no_device_for_longer_than_it_stands(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    keys: str,
    signed: bool,
    forged: dict[str, int],
) -> None:
    """The fake trainer's receipts have its fence, 0: a device that believes in a higher one is deaf."""
    clock = Clock()
    trainer.signer, trainer.receipts = OLD if signed else None, False
    trainer.publish_plan()
    data = write_samples(tmp_path / "train.jsonl", 8)
    trusted = keys if signed else ""
    with Running(broker, bert, tmp_path, data={"path": str(data)}, trusted_keys_file=trusted, clock=clock):
        trainer.wait(lambda t: t.rows() == 8)
        trainer.send(trainer.topics.plan, pack(msgspec.structs.replace(trainer.plan, **forged)))
        trainer.wait_for_telemetry("pi-1")
        trainer.publish_plan()
        assert trainer.telemetry["pi-1"].outbox_batches == 2
        trainer.receipts = True
        received = lambda: trainer.telemetry["pi-1"].outbox_batches == 0  # noqa: E731
        until(received, "it hears") if signed else clock.until(received, "the plan stands")


# --- older, across restarts ------------------------------------------------------------------------------


def trust(folder: Path, *given: bytes) -> Trust:
    return Trust(folder, job=JOB, tier=TIER, given=given or (OLD.public,))


def signed_plan(trainer: FakeTrainer, signer: Signer = OLD, **changes: object) -> bytes:
    return signer.sign(msgspec.structs.replace(trainer.plan, **changes), PLAN_SCOPE)


def signed_weights(run: str, version: int) -> bytes:
    manifest = WeightsManifest(
        run=run, version=version, state_digest="a", bundle_digest="b", bundle_bytes=1, bundle=b"x"
    )
    return OLD.sign(manifest, WEIGHTS_SCOPE)


def test_an_older_plan_is_refused_after_a_restart_too(trainer: FakeTrainer, tmp_path: Path) -> None:
    device = trust(tmp_path)
    device.adopted_plan(device.open_plan(signed_plan(trainer, fence=100, revision=7)))
    for again in (device, trust(tmp_path)):
        again.open_plan(signed_plan(trainer, fence=100, revision=7))
        for fence, revision in ((100, 6), (99, 8)):
            with pytest.raises(UntrustedError, match="older"):
                again.open_plan(signed_plan(trainer, fence=fence, revision=revision))


def test_a_new_journal_starts_over_and_what_the_one_before_published_stays_refused(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    device = trust(tmp_path)
    before = signed_plan(trainer, fence=100, revision=7)
    device.adopted_plan(device.open_plan(before))
    device.adopted_weights(RUN, 900)
    anew = signed_plan(trainer, fence=101, revision=1, run=OTHER_RUN)
    device.adopted_plan(device.open_plan(anew))
    device.open_manifest(signed_weights(OTHER_RUN, 1))
    device.adopted_weights(OTHER_RUN, 1)
    with pytest.raises(UntrustedError, match="older"):
        trust(tmp_path).open_plan(before)


def test_older_weights_are_refused_though_the_adopted_ones_were_lost(tmp_path: Path) -> None:
    trust(tmp_path).adopted_weights(RUN, 40)
    again = trust(tmp_path)
    with pytest.raises(UntrustedError, match="version 39 is older than 40"):
        again.open_manifest(signed_weights(RUN, 39))
    assert again.open_manifest(signed_weights(RUN, 40)).version == 40


def test_a_device_remembers_how_far_it_was_with_a_journal_that_comes_back(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    device = trust(tmp_path)
    for fence, run, version in ((1, RUN, 40), (2, OTHER_RUN, 3), (3, RUN, 41)):
        device.adopted_plan(device.open_plan(signed_plan(trainer, fence=fence, run=run)))
        with pytest.raises(UntrustedError, match="older") if fence == 3 else nullcontext():
            device.open_manifest(signed_weights(run, version - 2))
        device.adopted_weights(run, version)
        device = trust(tmp_path)
    for run, newest in ((RUN, 41), (OTHER_RUN, 3)):
        assert device.open_manifest(signed_weights(run, newest)).version == newest
        with pytest.raises(UntrustedError, match="older"):
            device.open_manifest(signed_weights(run, newest - 1))


def test_what_changes_nothing_is_not_written_down_again(tmp_path: Path) -> None:
    device = trust(tmp_path)
    device.adopted_weights(RUN, 40)
    (tmp_path / "trust.json").unlink()
    device.adopted_weights(RUN, 40)
    assert not (tmp_path / "trust.json").exists()
    device.adopted_weights(RUN, 41)
    assert (tmp_path / "trust.json").exists()


def test_the_journals_it_remembers_are_bounded_and_the_last_ones_stay(tmp_path: Path) -> None:
    device = trust(tmp_path)
    runs = [f"{number:032x}" for number in range(MOST_RUNS + 3)]
    for run in runs:
        device.adopted_weights(run, 7)
    for run in runs[3:]:
        with pytest.raises(UntrustedError, match="older"):
            trust(tmp_path).open_manifest(signed_weights(run, 6))
    assert len(json.loads((tmp_path / "trust.json").read_text())["versions"]) == MOST_RUNS


def test_weights_adopted_again_out_of_order_lower_nothing_and_keep_their_journal_among_the_last(
    tmp_path: Path,
) -> None:
    device = trust(tmp_path)
    device.adopted_weights(RUN, 40)
    for number in range(MOST_RUNS):
        if number == MOST_RUNS - 1:
            device.adopted_weights(RUN, 39)
        device.adopted_weights(f"{number:032x}", 7)
    for again in (device, trust(tmp_path)):
        with pytest.raises(UntrustedError, match="version 39 is older than 40"):
            again.open_manifest(signed_weights(RUN, 39))
        assert again.open_manifest(signed_weights(f"{0:032x}", 1)).version == 1, "the first was forgotten"


def test_a_device_without_a_key_takes_what_comes_and_keeps_nothing(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    device = Trust(tmp_path, job=JOB, tier=TIER)
    device.adopted_plan(device.open_plan(pack(msgspec.structs.replace(trainer.plan, fence=9))))
    device.adopted_weights(RUN, 40)
    assert device.open_plan(pack(trainer.plan)) == trainer.plan and device.keys == ()
    assert device.open_manifest(signed_weights(RUN, 1)).version == 1
    assert list(tmp_path.glob("trust*")) == []
    trust(tmp_path).adopted_weights(RUN, 40)
    assert Trust(tmp_path, job=JOB, tier=TIER).keys == () == read_trusted("")


def test_what_cannot_be_written_down_is_said_and_holds_until_the_restart(
    trainer: FakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    device = trust(tmp_path)
    device.adopted_weights(RUN, 39)
    (tmp_path / "trust.json.tmp").mkdir()
    device.adopted_weights(RUN, 40)
    assert "trust.json cannot be written" in caplog.text
    with pytest.raises(UntrustedError, match="older"):
        device.open_manifest(signed_weights(RUN, 39))
    assert trust(tmp_path).open_manifest(signed_weights(RUN, 39)).version == 39


# --- keys change -----------------------------------------------------------------------------------------


def test_a_new_key_is_learnt_from_a_plan_of_the_old_one_and_both_are_good_until_the_old_one_is_dropped(
    trainer: FakeTrainer, tmp_path: Path
) -> None:
    both = (OLD.public, NEW.public)
    device = trust(tmp_path)
    with pytest.raises(UntrustedError):
        device.open_plan(signed_plan(trainer, NEW, fence=9))
    device.adopted_plan(device.open_plan(signed_plan(trainer, OLD, fence=1, keys=both)))
    for signer in (NEW, OLD):
        again = trust(tmp_path)
        again.adopted_plan(again.open_plan(signed_plan(trainer, signer, fence=2, keys=both)))
    device = trust(tmp_path)
    device.adopted_plan(device.open_plan(signed_plan(trainer, NEW, fence=3, keys=(NEW.public,))))
    with pytest.raises(UntrustedError):
        trust(tmp_path).open_plan(signed_plan(trainer, OLD, fence=4, keys=both))


def test_other_keys_in_the_settings_take_the_place_of_those_that_were_learnt(
    trainer: FakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    device = trust(tmp_path)
    device.adopted_plan(device.open_plan(signed_plan(trainer, OLD, fence=0, keys=(OLD.public,))))
    assert caplog.messages == []
    device.adopted_plan(device.open_plan(signed_plan(trainer, OLD, fence=1, keys=(NEW.public,))))
    assert f"added {[key_id(NEW.public)]}, dropped {[key_id(OLD.public)]}" in caplog.text
    assert trust(tmp_path).keys == (NEW.public,)
    device.adopted_plan(device.open_plan(signed_plan(trainer, NEW, fence=2)))
    assert trust(tmp_path).keys == (NEW.public,), "a plan that names none changes none"
    assert trust(tmp_path, STRANGER.public).keys == (STRANGER.public,)


def test_settings_and_state_that_cannot_be_read_are_named(
    broker: InProcessBroker, bert: Backbone, tmp_path: Path, keys: str
) -> None:
    for file in (tmp_path / "missing.pem", tmp_path):
        with (
            pytest.raises(ConfigError, match="trusted_keys_file"),
            Running(broker, bert, tmp_path, trusted_keys_file=str(file)) as agent,
        ):
            agent.join()
    (tmp_path / "trust.json").write_text('{"fence": ')
    with pytest.raises(StateError, match=r"trust\.json"):
        trust(tmp_path)
