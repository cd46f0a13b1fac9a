"""Where a trainer's state is, and what of the settings is one cell's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from side_trainer.settings.cells import rank_of
from side_trainer.settings.schema import TrainerConfig
from sidestream.host.state_dir import default_dir

_FOLDER: Final = "cells"


def state_dir_of(config: TrainerConfig) -> Path:
    """The trainer's state directory: the configured one, or the user's for this job."""
    if config.state_dir:
        return Path(config.state_dir).expanduser()
    return default_dir("trainer", config.job)


def cell_dirs(config: TrainerConfig) -> list[Path]:
    """Each cell's state directory, the settings being those of all."""
    below = state_dir_of(config) / _FOLDER
    return [
        Path(cell.state_dir).expanduser() if cell.state_dir else below / cell.name for cell in config.cells
    ]


def in_cell(config: TrainerConfig, environ: Mapping[str, str]) -> TrainerConfig:
    """The settings of the cell that this process serves; those given where there are no cells.

    Ports of metrics and page go up by one a cell.

    Raises:
        ConfigError: the environment does not say which cell that is.
    """
    rank = rank_of(config.cells, environ)
    if rank is None:
        return config
    ports = {
        name: port + rank
        for name, port in (("metrics_port", config.metrics_port), ("page_port", config.page_port))
        if port > 0
    }
    cell, state_dir = config.cells[rank], str(cell_dirs(config)[rank])
    return msgspec.structs.replace(config, broker=cell.broker, state_dir=state_dir, **ports)
