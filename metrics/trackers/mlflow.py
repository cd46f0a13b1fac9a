"""Curves for MLflow: an experiment of the job's name, a run for each start of the trainer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from metrics.trackers.tracking import Tracker
from sidestream.contract.errors import ConfigError


def open_tracker(where: str, job: str) -> Tracker:
    """Write to the tracking server, or to what else the URI ``where`` names.

    Raises:
        ConfigError: MLflow is not installed, or does not answer there.
    """
    try:
        from mlflow.tracking import MlflowClient
    except ImportError as exc:
        raise ConfigError("trackers", "mlflow is not installed; pip install 'sidestream[mlflow]'") from exc
    name = f"sidestream {job}"
    try:
        client = MlflowClient(tracking_uri=where)
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known is not None else client.create_experiment(name)
        run = client.create_run(experiment, run_name=time.strftime("%Y-%m-%d %H:%M:%S"))
    except Exception as exc:
        raise ConfigError("trackers", f"mlflow at {where}: {str(exc).splitlines()[0]}") from exc
    return _MLflow(client, run.info.run_id)


class _MLflow:
    def __init__(self, client: Any, run: str) -> None:
        self._client = client
        self._run = run

    def log(self, version: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        told = [Metric(name, float(value), now_ms, version) for name, value in figures.items()]
        self._client.log_batch(self._run, metrics=told)

    def close(self) -> None:
        self._client.set_terminated(self._run)
