"""The trainer signs what devices adopt, and a device that trusts its key follows it through every restart."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.broadcast.signing import TrainerSigner, load_signer
from side_trainer.settings.schema import SigningConfig
from sidestream.contract.errors import ConfigError, StateError, UntrustedError
from sidestream.contract.messages import TrainerStatus, WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.signing import Scope, Signer, open_signed, public_pem
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import TOPICS, Listener, born, receipted, send, trainer
from tests.until import until

PLAN = Scope(kind="plan", job="colours")


def key_files(folder: Path, signer: Signer, *more: Signer) -> SigningConfig:
    key, public = folder / "signing.key", folder / "signing.pem"
    key.write_bytes(signer.to_pem())
    key.chmod(0o600)
    public.write_bytes(b"".join(public_pem(one.public) for one in (signer, *more)))
    return SigningConfig(key_file=str(key), public_keys_file=str(public))


def payload(listener: Listener, topic: str) -> bytes:
    until(lambda: any(event.topic == topic and event.payload for event in list(listener.seen)), topic)
    return [event.payload for event in listener.seen if event.topic == topic and event.payload][-1]


def test_plan_and_weights_of_every_tier_are_signed_for_that_tier(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    signer, successor = Signer.new(), Signer.new()
    settings = config(tmp_path / "state", signing=key_files(tmp_path, signer, successor))
    with trainer(broker, settings):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        for device in fleet:
            send(listener, device, device.batch(plan))
        for tier in ("big", "small"):
            manifest = payload(listener, TOPICS.weights(tier))
            scope = Scope(kind="weights", job="colours", tier=tier)
            assert open_signed(WeightsManifest, manifest, scope, [signer.public]).version > 0
            with pytest.raises(UntrustedError):
                open_signed(WeightsManifest, manifest, Scope(kind="weights", job="colours"), [signer.public])
        sealed = open_signed(Plan, payload(listener, TOPICS.plan), PLAN, [signer.public])
        assert sealed.keys == (signer.public, successor.public)


def test_every_restart_outranks_the_one_before_on_whatever_journal(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    signer = Signer.new()
    signing = key_files(tmp_path, signer)
    seen: list[tuple[int, int]] = []
    for state in ("one", "one", "two"):
        with trainer(broker, config(tmp_path / state, signing=signing)):
            listener = Listener(broker.transport(f"watch-{len(seen)}"))

            def newer(listener: Listener = listener) -> bool:
                plan = listener.plan()
                return plan is not None and (plan.fence, plan.revision) > max(seen, default=(0, 0))

            until(newer, "a newer plan")
            plan = open_signed(Plan, payload(listener, TOPICS.plan), PLAN, [signer.public])
            seen.append((plan.fence, plan.revision))
    assert seen == sorted(set(seen))


@pytest.mark.slow
@pytest.mark.parametrize("forger", [None, Signer.new()])
def test_a_forged_status_with_a_higher_fence_neither_stops_a_trainer_that_signs_nor_keeps_one_from_starting(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture, forger: Signer | None
) -> None:
    forged = TrainerStatus(state="online", run="0" * 32, epoch=1, fence=2**50, instance="forger")
    sealed = TrainerSigner("colours", forger).status(forged)
    listener = Listener(broker.transport("watch"))
    listener.transport.publish(TOPICS.trainer_status, sealed, retain=True)
    with trainer(broker, config(tmp_path / "state", signing=key_files(tmp_path, Signer.new()))):
        # A forger that also answers, as a trainer would.
        until(lambda: any(event.topic == TOPICS.trainer_claim for event in list(listener.seen)), "a claim")
        listener.transport.publish(TOPICS.trainer_status, sealed, retain=True)
        fleet = devices()
        plan = born(listener, fleet)
        listener.transport.publish(TOPICS.trainer_status, sealed, retain=True)
        for device in fleet:
            send(listener, device, device.batch(plan))
        until(lambda: all(receipted(listener, device) == 1 for device in fleet), "receipts")
        until(lambda: broker.retained[TOPICS.trainer_status] != sealed, "its own status is back")
    assert "without this job's signing key" in caplog.text


def test_a_trainer_with_the_same_key_is_still_given_way_to(broker: InProcessBroker, tmp_path: Path) -> None:
    signing = key_files(tmp_path, Signer.new())
    with (
        pytest.raises(StateError, match="has taken over"),
        trainer(broker, config(tmp_path / "one", signing=signing)),
    ):
        listener = Listener(broker.transport("watch"))
        until(listener.plan, "the first runs")
        first = listener.plan()
        with (
            pytest.raises(StateError, match="another trainer of this job is running"),
            trainer(broker, config(tmp_path / "two", signing=signing)) as stop,
        ):
            stop.wait(30.0)
        with trainer(broker, config(tmp_path / "two", signing=signing), take_over=True):
            until(lambda: listener.plan() != first, "the second runs")


def test_a_key_that_others_can_read_or_that_is_none_is_refused_by_its_setting(tmp_path: Path) -> None:
    signing = key_files(tmp_path, Signer.new())
    Path(signing.key_file).chmod(0o640)
    with pytest.raises(ConfigError, match=r"signing\.key_file.*chmod 600"):
        load_signer("colours", signing)
    Path(signing.key_file).write_text("no key")
    Path(signing.key_file).chmod(0o600)
    with pytest.raises(ConfigError, match=r"signing\.key_file"):
        load_signer("colours", signing)
    with pytest.raises(ConfigError, match=r"signing\.key_file"):
        load_signer("colours", SigningConfig(key_file=str(tmp_path / "none")))
    with pytest.raises(ConfigError, match="name both"):
        load_signer("colours", SigningConfig(public_keys_file="keys.pem"))


def test_a_list_of_keys_without_the_signing_one_would_lock_the_devices_out(tmp_path: Path) -> None:
    signing = key_files(tmp_path, Signer.new())
    Path(signing.public_keys_file).write_bytes(public_pem(Signer.new().public))
    with pytest.raises(ConfigError, match=r"signing\.public_keys_file.*adopt nothing"):
        load_signer("colours", signing)


@pytest.mark.parametrize("known", [True, False])
def test_after_a_change_of_keys_the_own_last_status_is_no_intrusion(
    broker: InProcessBroker, tmp_path: Path, caplog: pytest.LogCaptureFixture, known: bool
) -> None:
    caplog.set_level(logging.INFO)
    old, new = Signer.new(), Signer.new()
    for state, signer in (("one", old), ("one" if known else "two", new)):
        with trainer(broker, config(tmp_path / state, signing=key_files(tmp_path, signer))):
            listener = Listener(broker.transport(f"watch-{state}-{signer is new}"))
            until(partial(plan_signed_by, listener, signer), "its plan")
    assert ("is of before the change of keys" in caplog.text) is known
    assert ("without this job's signing key" in caplog.text) is not known


def plan_signed_by(listener: Listener, signer: Signer) -> bool:
    try:
        open_signed(Plan, payload(listener, TOPICS.plan), PLAN, [signer.public])
    except UntrustedError:
        return False
    return True


@pytest.mark.parametrize("change", [{"job": "shapes"}, {"labels": ("round", "square")}])
def test_a_first_start_to_which_nothing_was_sent_binds_the_state_folder_to_nothing(
    broker: InProcessBroker, tmp_path: Path, change: dict[str, object]
) -> None:
    settings = config(tmp_path / "one")
    with trainer(broker, settings):
        listener = Listener(broker.transport("first"))
        until(listener.plan, "the first runs")
    with trainer(broker, config(tmp_path / "one", **change)):
        until(lambda: (tmp_path / "one").exists(), "the second runs")
    with trainer(broker, settings):
        listener, fleet = Listener(broker.transport("watch")), devices()
        plan = born(listener, fleet)
        send(listener, fleet[0], fleet[0].batch(plan))
        until(lambda: receipted(listener, fleet[0]) == 1, "a receipt")
    with (
        pytest.raises(ConfigError, match="this state_dir"),
        trainer(broker, config(tmp_path / "one", **change)),
    ):
        pass
