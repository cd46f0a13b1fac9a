"""Adopting, measuring and late labels take short turns between forward passes, on the thread of these."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from edge_agent.batches.patience import Patience
from edge_agent.batches.side_tasks import NOT_DUE, SideTasks
from edge_agent.weights.adoption import Adopter, Opened
from edge_agent.weights.evaluation import Score
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import WeightsManifest
from sidestream.contract.quality import Tally
from sidestream.host.trace import Trace
from sidestream.side_network.bundle import digest
from tests.agent.fake_trainer import JOB, RUN, TIER, plan_for

FORGED = b"forged"


class Measuring:
    """Evaluation samples that take three turns to prepare, and a version some seconds to measure."""

    def __init__(self, takes: Callable[[float], None]) -> None:
        self._takes = takes
        self.left = 3
        self.measured: list[Any] = []

    def extend(self) -> bool:
        self._takes(100.0)
        self.left -= 1
        return self.left >= 0

    def measure(self, network: Any, align: str) -> Score | None:
        self._takes(2.0)
        self.measured.append(network)
        return Score(Tally(), {}, 3)


class Stage:
    """An adopter whose time stands still but where something is said to take some."""

    def __init__(self, folder: Path, backbone: Backbone) -> None:
        self.now = 1000.0
        self.woken = 0
        plan = plan_for(backbone)

        def read(data: bytes) -> Opened:
            if data == FORGED:
                raise DecodeError("nobody made it")
            return Opened(RUN, int(data), data.decode())

        self.adopter = Adopter(
            folder,
            plan,
            TIER,
            backbone="",
            read=read,
            on_change=lambda: None,
            on_refused=lambda: None,
            metrics=AgentMetrics(CollectorRegistry()),
            trace=Trace(),
            trust=Trust(folder, job=JOB, tier=TIER),
            wake=self._wake,
            clock=lambda: self.now,
        )

    def _wake(self) -> None:
        self.woken += 1

    def takes(self, seconds: float) -> None:
        self.now += seconds

    def offer(self, version: int, *, data: bytes = b"", final: bool = False) -> None:
        data = data or str(version).encode()
        manifest = WeightsManifest(
            run=RUN,
            version=version,
            state_digest="0" * 64,
            bundle_digest=digest(data),
            bundle_bytes=len(data),
            bundle=data,
            final=final,
        )
        self.adopter.offer(manifest, data)

    @property
    def version(self) -> int:
        return self.adopter.in_use.version if self.adopter.in_use is not None else 0


@pytest.fixture
def stage(tmp_path: Path, bert: Backbone) -> Iterator[Stage]:
    yield Stage(tmp_path, bert)


def test_a_version_is_adopted_prepared_for_and_measured_in_turns(stage: Stage) -> None:
    measuring = Measuring(stage.takes)
    stage.adopter.evaluate_with(measuring)
    assert stage.adopter.turn() == NOT_DUE
    stage.offer(1)
    assert stage.woken == 1
    turns = []
    while stage.adopter.turn() == 0.0:
        turns.append((stage.version, measuring.left, measuring.measured.copy()))
    assert turns == [(1, 3, []), (1, 2, []), (1, 1, []), (1, 0, []), (1, -1, ["1"])]


def test_passing_versions_take_up_a_tenth_of_the_time_and_a_final_one_does_not_wait(stage: Stage) -> None:
    stage.adopter.evaluate_with(Measuring(stage.takes))
    stage.offer(1)
    while stage.adopter.turn() == 0.0:
        pass
    stage.offer(2)
    # Not what the samples took, which are prepared once: 100 s each.
    assert 0 < stage.adopter.turn() <= 60.0 and stage.version == 1
    stage.takes(19.0)
    assert stage.adopter.turn() > 0 and stage.version == 1
    stage.offer(3, final=True)
    assert stage.adopter.turn() == 0.0 and stage.version == 3


def test_an_older_version_that_comes_late_does_not_replace_one_that_waits(stage: Stage) -> None:
    """As the finished one does, which stands on its topic, where a device begins to listen to that."""
    stage.offer(3)
    stage.offer(2)
    assert stage.adopter.turn() == 0.0 and stage.version == 3
    assert stage.adopter.turn() == 0.0 and stage.version == 3
    assert stage.adopter.turn() == NOT_DUE


def test_behind_a_forged_version_the_real_one_waits(stage: Stage) -> None:
    stage.offer(10**9, data=FORGED)
    stage.offer(2)
    stage.adopter.turn()
    assert stage.version == 0
    stage.adopter.turn()
    assert stage.version == 2


def test_who_waits_takes_turns_and_is_woken() -> None:
    tasks, stopped = SideTasks(), threading.Event()
    turns: list[int] = []

    def task() -> float:
        turns.append(len(turns))
        if len(turns) < 3:
            return 0.0  # at once
        waker.start()
        return NOT_DUE

    def wake() -> None:
        stopped.set()
        tasks.wake()

    waker = threading.Thread(target=wake)
    tasks.add(task)
    Patience("it waits", stopped.is_set, tasks).pause(300.0)
    waker.join()
    assert turns == [0, 1, 2]
