"""Curves for TensorBoard, through its own writer of event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metrics.trackers.tracking import Tracker
from sidestream.contract.errors import ConfigError


def open_tracker(where: str, job: str) -> Tracker:
    """Write below the folder ``where``, in a run of the job's name and the time.

    Raises:
        ConfigError: TensorBoard is not installed, or the folder cannot be written to.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as exc:
        raise ConfigError(
            "trackers", "tensorboard is not installed; pip install 'sidestream[tensorboard]'"
        ) from exc
    folder = Path(where).expanduser() / f"{job}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return _TensorBoard(EventFileWriter(str(folder)))
    except OSError as exc:
        raise ConfigError("trackers", f"cannot write to {folder}: {exc.strerror or exc}") from exc


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def log(self, version: int, figures: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=version, summary=Summary(value=values)))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()
