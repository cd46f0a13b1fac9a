"""A trial at load: does a model begun in the middle give, bit for bit, what it gives as a whole?

Two texts of unequal length go through the whole model; then what each layer was given is put into the model
at that layer. Whatever an architecture does between or beside its layers, it either shows here or does no
harm.

Legend: K texts, T tokens of the longest, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.split_model.adapters import not_cut
from sidestream.split_model.skipping import STATES


class Seen(NamedTuple):
    """What a whole pass showed."""

    states: list[Tensor]
    """By number of layers done, from 0 to all but one: what is there by then, [K, T, d]."""
    parts: int
    """How many things a layer gives, the states first; 0 where it gives these by themselves."""
    last: Tensor
    """The last states, [K, T, d]."""
    mask: Tensor
    """[K, T]: which tokens are real."""


class Upper(Protocol):
    """The layers from ``cut`` on: padded states [K, T, d] and mask [K, T] -> last states [K, T, d]."""

    def __call__(self, cut: int, states: Tensor, mask: Tensor) -> Tensor: ...


def watch(view: TorchBackbone, tokens: Tokens, run: Callable[..., Tensor]) -> Seen:
    """One pass through all layers; of pairs of texts, where the model tells them apart."""
    ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
    layers = view.stack.layers
    states: list[Tensor] = []
    parts: list[int] = []

    def first(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append((given[0] if given else named[STATES]).clone())

    def keep(module: nn.Module, given: Any, output: Any) -> None:
        states.append(view.stack.states(output, ids.shape[1]).clone())
        parts.append(len(output) if isinstance(output, tuple) else 0)

    hooks = [layers[0].register_forward_pre_hook(first, with_kwargs=True)]
    hooks += [layer.register_forward_hook(keep) for layer in layers]
    segments = {}
    if view.text_input.segments:
        segments = {"token_type_ids": torch.arange(ids.shape[1]).expand(ids.shape) % view.text_input.segments}
    try:
        with torch.no_grad():
            last = run(ids, mask, **segments)
    finally:
        for hook in hooks:
            hook.remove()
    if len(set(parts)) > 1:
        raise not_cut(view, "its layers do not all give the same")
    return Seen(states[:-1], parts[0], last, mask)


def check_cuts(view: TorchBackbone, seen: Seen, upper: Upper) -> None:
    """Begin in the middle, at each layer in turn.

    Raises:
        BackboneError: what comes of it is not what came of the whole, to the last bit.
    """
    for cut, states in enumerate(seen.states):
        real = seen.mask[:, :, None]
        with torch.no_grad():  # padding does not travel
            found = upper(cut, states.masked_fill(~real, 0.0), seen.mask)
        if not torch.equal(found[seen.mask], seen.last[seen.mask]):
            raise not_cut(view, f"begun after layer {cut} it gives other states than as a whole")


def check_gradients(
    view: TorchBackbone, seen: Seen, cut: int, upper: Upper, parameters: Mapping[str, Tensor]
) -> None:
    """One pass back.

    Args:
        view: For messages.
        seen: As :func:`watch` returned it.
        cut: Where to begin.
        upper: The model.
        parameters: Those above the cut.

    Raises:
        BackboneError: no gradient comes to the cut, or to a parameter.
    """
    states = seen.states[cut].clone().requires_grad_()
    total = upper(cut, states, seen.mask)[seen.mask].float().square().sum()
    found = torch.autograd.grad(total, [states, *parameters.values()], allow_unused=True)
    for name, gradient in zip(["the cut", *parameters], found, strict=True):
        if gradient is None or not gradient.isfinite().all():
            raise not_cut(view, f"no gradient comes to {name}")
