"""The page's curves go to trackers by version; one that fails, or is slow, is no reason not to train."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from metrics.fleet_page.view import Point
from metrics.trackers import tracking
from metrics.trackers.tracking import Trackers, check_trackers, figures_of
from sidestream.contract.errors import ConfigError

POINT = Point(
    at_unix_s=1.0,
    samples=30,
    messages=3,
    bytes_up=5,
    online=2,
    loss={"pi": 0.5},
    quality={"pi": 0.75, "big": 0.8},
    versions={"pi": 4, "big": 7},
)


class Fake:
    """Notes what it is told, perhaps after a while."""

    def __init__(self) -> None:
        self.told: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False
        self.may = threading.Event()
        self.fails = False

    def log(self, version: int, figures: Mapping[str, float]) -> None:
        assert self.may.wait(60)
        if self.fails:
            raise OSError("no room")
        self.told.append((version, figures))

    def close(self) -> None:
        self.closed = True


class Named:
    """An entry point."""

    def __init__(self, name: str, loads: Any) -> None:
        self.name = name
        self._loads = loads

    def load(self) -> Any:
        if isinstance(self._loads, Exception):
            raise self._loads
        return self._loads


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    fake = Fake()
    points = [Named("fake", lambda where, job: fake), Named("bad", ImportError("no wheels"))]
    monkeypatch.setattr(tracking, "entry_points", lambda group: points)
    return fake


def test_every_curve_is_told_by_the_version_that_it_is_of() -> None:
    assert figures_of(POINT, "accuracy", 9) == {
        4: {"accuracy/pi": 0.75},
        7: {"accuracy/big": 0.8},
        9: {
            "loss/pi": 0.5,
            "samples": 30,
            "messages": 3,
            "messages_refused": 0,
            "bytes_up": 5,
            "bytes_down": 0,
            "devices_online": 2,
        },
    }


def test_what_has_not_changed_is_not_told_again(fake: Fake) -> None:
    fake.may.set()
    with Trackers(["fake:anywhere"], "home") as trackers:
        trackers.offer(POINT, "accuracy", 9)
        trackers.offer(POINT, "accuracy", 9)
    assert [version for version, _ in fake.told] == [4, 7, 9] and fake.closed


def test_a_slow_tracker_is_waited_for_by_nobody_and_what_fails_is_told_once(
    fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.fails = True
    with caplog.at_level(logging.WARNING), Trackers(["fake:anywhere"], "home") as trackers:
        for version in range(1, 1000):
            trackers.offer(Point(at_unix_s=1.0, samples=version), "accuracy", version)
        fake.may.set()
    assert caplog.text.count("tracker fake:anywhere: OSError: no room; training goes on") == 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("tensorboard", "is no NAME:WHERE"),
        ("tensorboard:", "is no NAME:WHERE"),
        ("wandb:x", "no tracker 'wandb'; there are: bad, fake, mlflow, tensorboard"),
        ("bad:x", "'bad' cannot be loaded: no wheels"),
    ],
)
def test_what_is_no_tracker_is_refused(fake: Fake, spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_trackers([spec])


@pytest.mark.parametrize("name", ["tensorboard", "mlflow"])
def test_one_that_is_not_installed_says_how_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [one for one in sys.modules if one.split(".")[0] == name] + [name]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; pip install 'sidestream\[{name}\]'"):
        Trackers([f"{name}:x"], "home")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers([f"tensorboard:{tmp_path}"], "home") as trackers:
        for version in (4, 8):
            trackers.offer(
                Point(at_unix_s=1.0, quality={"pi": version / 10}, versions={"pi": version}),
                "accuracy",
                version,
            )
    [run] = tmp_path.iterdir()
    read = EventAccumulator(str(run))
    read.Reload()
    told = [(one.step, round(one.value, 3)) for one in read.Scalars("accuracy/pi")]
    assert run.name.startswith("home-") and told == [(4, 0.4), (8, 0.8)]
    assert "samples" in read.Tags()["scalars"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = f"file:{tmp_path}/runs"
    with Trackers([f"mlflow:{uri}"], "home") as trackers:
        trackers.offer(POINT, "accuracy", 9)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("sidestream home")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert [(one.step, one.value) for one in client.get_metric_history(run.info.run_id, "accuracy/pi")] == [
        (4, 0.75)
    ]
    assert run.data.metrics["loss/pi"] == 0.5
