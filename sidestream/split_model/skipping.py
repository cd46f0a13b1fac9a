"""One model in memory serves every cut: for the time of a pass its first layers do nothing.

Legend: K texts, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

STATES = "hidden_states"
"""How models call what a layer is given, where they name it."""


@contextmanager
def starting_at(layers: nn.ModuleList, cut: int, states: Tensor, parts: int) -> Iterator[None]:
    """Have a model begin with layer ``cut``, on states that came from elsewhere.

    The layers before it stay in place, with all that the model may look up in them, and hand the states on.

    Args:
        layers: The model's.
        cut: The first layer that is computed, from 0.
        states: [K, T, d] of the layer before it.
        parts: How many things a layer gives, the states first; 0 where it gives these by themselves.
    """

    def hand_on(*given: Any, **named: Any) -> Any:
        return (states, *[None] * (parts - 1)) if parts else states

    def feed(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if given:
            return (states, *given[1:]), named
        if STATES not in named:
            raise TypeError(f"a layer is not given its {STATES} by that name")
        return given, named | {STATES: states}

    hook = layers[cut].register_forward_pre_hook(feed, with_kwargs=True)
    skipped = list(layers[:cut])
    try:
        for layer in skipped:
            vars(layer)["forward"] = hand_on
        yield
    finally:
        for layer in skipped:
            vars(layer).pop("forward", None)
        hook.remove()
