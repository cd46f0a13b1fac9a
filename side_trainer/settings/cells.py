"""Cells: brokers with devices of their own, and a trainer each, that learn one side-network together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import msgspec

from broker_config.settings import BrokerSettings
from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import METHODS, Split
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.topics import check_name
from sidestream.contract.wire import prepared

RANK, WORLD_SIZE = "RANK", "WORLD_SIZE"
"""What torchrun tells each process of where it stands, in the environment."""


@prepared
class CellConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One broker with its devices, and the trainer process that serves them; a table ``[[cells]]``."""

    name: str
    """What it is called in logs, and its folder below the state directory."""
    broker: BrokerSettings = BrokerSettings()
    """Its broker, another one than every other cell's."""
    state_dir: str = ""
    """Its journal and checkpoints; default: cells/NAME below the trainer's state_dir."""


class _Settings(Protocol):
    @property
    def cells(self) -> tuple[CellConfig, ...]: ...
    @property
    def task(self) -> Task: ...
    @property
    def method(self) -> str: ...
    @property
    def labels(self) -> Sequence[str]: ...
    @property
    def compute_device(self) -> str: ...


def check_cells(config: _Settings) -> None:
    """See that a job can be learnt in its cells.

    Raises:
        ConfigError: naming the field that stands against it.
    """
    cells, task = config.cells, TASKS[config.task]
    if not cells:
        return
    if len(cells) == 1:
        raise ConfigError("cells", "one cell is a trainer by itself: leave cells out, and give it as broker")
    names, urls = [one.name for one in cells], [one.broker.url for one in cells]
    for number, one in enumerate(cells):
        check_name(f"cells.{number}.name", one.name)
        one.broker.endpoint()
        if one.name in names[:number]:
            raise ConfigError(f"cells.{number}.name", f"{one.name!r} is another cell's too")
        if one.broker.url in urls[:number]:
            raise ConfigError(f"cells.{number}.broker.url", f"{one.name} needs a broker of its own")
    if issubclass(METHODS[config.method], Split) or task.generates:
        what = config.task.value if task.generates else config.method
        raise ConfigError("cells", f"{what} is learnt by one trainer; leave cells out")
    if task.named and not config.labels:
        raise ConfigError("labels", "have to be given where there are cells: nobody hears all their devices")


def rank_of(cells: Sequence[CellConfig], environ: Mapping[str, str]) -> int | None:
    """Which cell this process serves; None for a trainer by itself.

    Raises:
        ConfigError: there is not one process for each cell.
    """
    rank, size = environ.get(RANK, ""), environ.get(WORLD_SIZE, "")
    if not cells:
        if size not in ("", "1"):
            raise ConfigError(
                "cells", f"{size} processes were started, and the settings have no [[cells]], one for each"
            )
        return None
    if not (rank.isdecimal() and size.isdecimal()):
        raise ConfigError(
            "cells",
            f"each of the {len(cells)} takes a process: torchrun --nproc-per-node {len(cells)} --no-python "
            f"sidestream trainer run CONFIG; or give each process RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT",
        )
    if int(size) != len(cells) or int(rank) >= len(cells):
        raise ConfigError("cells", f"there are {len(cells)}, and {size} processes (this one is {rank})")
    return int(rank)
