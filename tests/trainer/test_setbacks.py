"""A state that was set back is said once, and what was published before it is never published over."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
import pytest

from broker_config.transport import Received
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.journal.journal import Journal
from side_trainer.receive.setbacks import Setbacks
from sidestream.contract.messages import HIGHEST_FENCE, Telemetry, WeightsManifest
from sidestream.contract.signing import Signer
from sidestream.contract.topics import Topics, Uplink

STREAM, OTHER = "a" * 32, "b" * 32
DEVICE = Uplink(tier="t", device="pi-1", kind="telemetry")


@pytest.fixture
def setbacks(journal: Journal) -> Setbacks:
    return Setbacks(journal, TrainerSigner("j"))


def lost(samples: int, stream: str = STREAM) -> Telemetry:
    return Telemetry(stream=stream, samples_lost=samples)


def manifest(
    run: str, version: int, *, signer: TrainerSigner | None = None, tier: str = "t", chunks: int = 0
) -> Received:
    body: dict[str, Any] = {"bundle": b"" if chunks else b"x", "bundle_bytes": 1, "chunks": chunks}
    told = WeightsManifest(run=run, version=version, state_digest="a", bundle_digest="b", **body)
    payload = (signer or TrainerSigner("j")).manifest(told, tier)
    return Received(topic=Topics("j").weights(tier), payload=payload, retained=True, qos=1, epoch=1)


def test_another_history_of_a_stream_is_said_once(
    setbacks: Setbacks, caplog: pytest.LogCaptureFixture
) -> None:
    for stream in (STREAM, STREAM, OTHER, STREAM):
        setbacks.on_fork(DEVICE, stream)
    assert [text.split("stream ")[1][:8] for text in caplog.messages] == ["aaaaaaaa", "bbbbbbbb"]
    assert "pi-1" in caplog.text


def test_what_was_lost_is_said_once_over_restarts_and_added_to(
    journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    said: list[bool] = []
    for samples, stream in ((0, STREAM), (5, STREAM), (5, STREAM), (7, STREAM), (6, STREAM), (1, OTHER)):
        caplog.clear()
        Setbacks(journal, TrainerSigner("j")).on_telemetry(DEVICE, lost(samples, stream))
        said.append(bool(caplog.messages))
        if (samples, stream) == (7, STREAM):
            assert ": 2 samples that" in caplog.text and "LOST" in caplog.text
    assert said == [False, True, False, True, False, True]
    assert journal.lost == {STREAM: 7, OTHER: 1}


def test_what_was_lost_is_said_once_within_a_start(
    setbacks: Setbacks, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    for samples in (5, 5, 5):
        setbacks.on_telemetry(DEVICE, lost(samples))
    assert len(caplog.messages) == 1 and journal.lost == {STREAM: 5}


def test_a_fleet_that_is_set_back_all_at_once_is_noted_device_by_device(
    setbacks: Setbacks, journal: Journal
) -> None:
    written = [0]

    def noted(devices: range) -> int:
        written[0] = 0
        for number in devices:
            told = Telemetry(stream=f"{number:032x}", samples_lost=3, streams_forked=1)
            setbacks.on_telemetry(Uplink(tier="t", device=f"pi-{number}", kind="telemetry"), told)
        return written[0]

    def count(statement: str) -> None:
        written[0] += len(statement)

    journal.db.set_trace_callback(count)
    first = noted(range(50))
    assert noted(range(50, 100)) < 1.1 * first
    assert len(journal.lost) == len(journal.forks) == 100


def test_what_is_known_of_versions_is_looked_up_once(setbacks: Setbacks, journal: Journal) -> None:
    journal.published = {5: {}}
    told = Telemetry(stream=STREAM, weights_run=journal.run, weights_version=5)
    setbacks.on_telemetry(DEVICE, told)
    asked: list[str] = []
    journal.db.set_trace_callback(asked.append)
    for version in (5, 4, 5):
        setbacks.on_telemetry(DEVICE, msgspec.structs.replace(told, weights_version=version))
    assert not asked


def test_versions_go_on_above_the_highest_on_the_broker_with_which_the_journal_can_tidy_up(
    setbacks: Setbacks, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    journal.published = {10: {"t": 1}}
    setbacks.on_manifest(manifest(journal.run, 10))
    setbacks.rise()
    assert journal.version_base == 0 and not caplog.messages, "it knows of that one"
    for version, tier, chunks in ((30, "t", 2), (30, "u", 3), (20, "v", 4)):
        setbacks.on_manifest(manifest(journal.run, version, tier=tier, chunks=chunks))
    setbacks.rise()
    setbacks.rise()
    assert journal.version_base == 30
    assert journal.published == {10: {"t": 0}, 20: {"v": 4}, 30: {"t": 2, "u": 3}}
    assert len(caplog.messages) == 1 and "version 30" in caplog.text and "none above 10" in caplog.text


def test_a_device_that_has_a_higher_version_makes_the_journal_rise_above_it_at_once(
    setbacks: Setbacks, journal: Journal
) -> None:
    for version, highest in ((0, 0), (1, 1), (7, 7), (6, 7)):
        setbacks.on_telemetry(
            DEVICE, Telemetry(stream=STREAM, weights_run=journal.run, weights_version=version)
        )
        assert journal.version_base == highest == max(journal.published, default=0)


def test_versions_of_another_journal_or_that_no_trainer_can_have_or_unsigned_do_not_count(
    journal: Journal,
) -> None:
    ours, stranger = TrainerSigner("j", Signer.new()), TrainerSigner("j", Signer.new())
    setbacks = Setbacks(journal, ours)
    for event in (
        manifest(OTHER, 9, signer=ours),
        manifest(journal.run, HIGHEST_FENCE, signer=ours),
        manifest(journal.run, 9),
        manifest(journal.run, 9, signer=stranger),
    ):
        setbacks.on_manifest(event)
    for run, version in ((OTHER, 9), (journal.run, HIGHEST_FENCE)):
        setbacks.on_telemetry(DEVICE, Telemetry(stream=STREAM, weights_run=run, weights_version=version))
    setbacks.rise()
    assert journal.version_base == 0 and journal.published == {}
    setbacks.on_manifest(manifest(journal.run, 9, signer=ours))
    setbacks.rise()
    assert journal.version_base == 9
