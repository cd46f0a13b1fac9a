"""The agent: samples, frozen backbone, sampled activations, outbox, broker; weights back, predictions.

Importing it is cheap: torch is loaded with the first use of :func:`load`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edge_agent.predictor import Prediction, Predictor, load

__all__ = ["Prediction", "Predictor", "load"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from edge_agent import predictor  # torch and transformers; only here, so that --help stays fast

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
