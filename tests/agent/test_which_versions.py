"""A device gets the versions that it asks for, and no others: by its settings, its budget, its method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.method_registry import METHODS
from edge_agent.weights.adopted import load_adopted
from edge_agent.weights.choice import VersionChoice
from sidestream.backbone.backbone import Backbone
from sidestream.contract.plan import FedMobiLLM, MobiLLM, SplitFrozen, SplitLora
from sidestream.contract.signing import Signer, public_pem
from tests.agent.fake_trainer import FakeTrainer
from tests.agent.fleet import Running, write_samples
from tests.until import until

pytestmark = pytest.mark.slow


def version_of(folder: Path) -> int:
    kept = load_adopted(folder / "state-pi-1")
    return kept.adopted.version if kept is not None else 0


def test_a_device_that_wants_finished_versions_gets_the_first_good_one_and_those(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    with Running(broker, bert, tmp_path, weights="final"):
        trainer.publish_weights(3, first=True, chunks=2)
        until(lambda: version_of(tmp_path) == 3)
        before = trainer.telemetry["pi-1"].weights_bytes_down
        for version in range(4, 9):
            trainer.publish_weights(version, chunks=version % 3)
        trainer.wait_for_telemetry("pi-1", 3)
        assert version_of(tmp_path) == 3
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_bytes_down >= before)
        passing = trainer.telemetry["pi-1"].weights_bytes_down
        finished = len(trainer.publish_weights(9, final=True))
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 9)
        trainer.wait_for_telemetry("pi-1", 2)
        received = trainer.telemetry["pi-1"].weights_bytes_down - passing
        assert finished < received < finished + 1000, "one message, and no passing version at all"


def test_who_comes_late_gets_one_message(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    trainer.publish_weights(3, first=True)
    trainer.publish_weights(5, final=True)
    size = len(trainer.publish_weights(8, final=True))
    trainer.publish_weights(9)
    with Running(broker, bert, tmp_path, weights="final"):
        trainer.wait(lambda t: t.telemetry["pi-1"].weights_version == 8)
        trainer.wait_for_telemetry("pi-1", 2)
        assert size < trainer.telemetry["pi-1"].weights_bytes_down < size + 1000


def test_the_job_ends_for_it_as_for_others(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan()
    data = {"path": str(write_samples(tmp_path / "data.jsonl", 12))}
    with Running(broker, bert, tmp_path, weights="final", exit_when_done=True, data=data) as running:
        trainer.wait(lambda t: t.rows() == 12)
        trainer.publish_weights(4)
        trainer.publish_weights(5, final=True)
        until(lambda: running.code == 0, "done")
    assert version_of(tmp_path) == 5


def test_a_budget_that_is_used_up_leaves_finished_versions_also_after_a_restart(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    """A device with a key sees an older finished version then, which is nothing to be alarmed about."""
    key, path = Signer.new(), tmp_path / "keys.pem"
    path.write_bytes(public_pem(key.public))
    trainer.signer = key
    trainer.publish_plan()
    size = len(trainer.publish_weights(2, first=True))
    settings: dict[str, Any] = {"weights_budget_mib": 1.5 * size / 2**20, "trusted_keys_file": str(path)}
    with Running(broker, bert, tmp_path, **settings):
        until(lambda: version_of(tmp_path) == 2)
        trainer.publish_weights(3)
        until(lambda: version_of(tmp_path) == 3)
        trainer.wait_for_telemetry("pi-1", 2)
        trainer.publish_weights(4)
        trainer.wait_for_telemetry("pi-1", 3)
    with Running(broker, bert, tmp_path, **settings):
        trainer.wait_for_telemetry("pi-1", 3)
        assert version_of(tmp_path) == 3
        trainer.publish_weights(5, final=True)
        until(lambda: version_of(tmp_path) == 5)
        trainer.wait_for_telemetry("pi-1", 2)
    assert trainer.telemetry["pi-1"].weights_refused == 0


def test_the_setting_starves_no_method_that_learns_by_passing_versions() -> None:
    needs = {kind: METHODS[kind].needs_every for kind in METHODS}
    assert needs == {FedMobiLLM: False, MobiLLM: False, SplitFrozen: False, SplitLora: True}
    choice = VersionChoice("final", 1.0, spent_bytes=2 * 2**20)
    assert not choice.every
    choice.needs_every = True
    assert choice.every


def test_a_budget_is_spent_by_the_byte() -> None:
    choice = VersionChoice("every", 2 / 2**20)
    choice.received(1)
    assert choice.every and not choice.overspent
    choice.received(1)
    assert not choice.every and choice.overspent
    assert VersionChoice("every").every
