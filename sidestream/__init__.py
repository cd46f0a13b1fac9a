"""Sidestream: federated fine-tuning of transformers on edge devices over MQTT.

From a program or a notebook::

    import sidestream
    model = sidestream.load("exported")         # what was learnt, to answer with
    model(["turn the lights off"])              # [{"label": "lights_off", "score": 0.97}]

    with sidestream.broker() as broker:         # a broker, a trainer and agents inside a program
        with sidestream.trainer("trainer.toml", broker=broker.url) as trainer: ...

Importing it is cheap: what a name takes is loaded with its first use. docs/notebook.md shows all of it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sidestream.host.signals import heed_interrupts_of_module

if TYPE_CHECKING:
    from sidestream.library.jobs import curves, fleet_view, plan, status
    from sidestream.library.models import Model, load
    from sidestream.library.running import agent, broker, source, trainer

heed_interrupts_of_module()

__all__ = [
    "Model",
    "agent",
    "broker",
    "curves",
    "fleet_view",
    "load",
    "plan",
    "source",
    "status",
    "trainer",
    "version",
]
_LOADED_LATE = {
    **dict.fromkeys(("curves", "fleet_view", "plan", "status"), "sidestream.library.jobs"),
    **dict.fromkeys(("Model", "load"), "sidestream.library.models"),
    **dict.fromkeys(("agent", "broker", "source", "trainer"), "sidestream.library.running"),
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_LATE:
        return getattr(importlib.import_module(_LOADED_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is offered, and no more: it is what a Tab shows."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
