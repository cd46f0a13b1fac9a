"""The agent: samples, frozen backbone, sampled activations, outbox, broker; weights back, predictions.

Importing it is cheap: torch is loaded with the first use of :func:`load`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.answers.answer import Prediction
    from edge_agent.answers.predictor import Predictor, load
    from sidestream.backbone.torch_runtime.tuned import load_tuned

__all__ = ["Prediction", "Predictor", "load", "load_tuned"]


_LOADED_LATE = {
    "Prediction": "edge_agent.answers.answer",
    "Predictor": "edge_agent.answers.predictor",
    "load": "edge_agent.answers.predictor",
    "load_tuned": "sidestream.backbone.torch_runtime.tuned",
}


def __getattr__(name: str) -> Any:
    if name in _LOADED_LATE:
        return getattr(importlib.import_module(_LOADED_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
