"""The agent: samples, frozen backbone, sampled activations, outbox, broker; weights back, predictions.

Importing it is cheap: torch is loaded with the first use of :func:`load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.answers.answer import Prediction
    from edge_agent.answers.predictor import Predictor, load
    from sidestream.backbone.torch_runtime.tuned import load_tuned

__all__ = ["Prediction", "Predictor", "load", "load_tuned"]


def __getattr__(name: str) -> Any:
    if name == "load_tuned":
        from sidestream.backbone.torch_runtime import tuned

        return tuned.load_tuned
    if name in __all__:
        from edge_agent.answers import (  # torch and transformers: only here, so that --help is fast
            answer,
            predictor,
        )

        return getattr(answer if name == "Prediction" else predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
