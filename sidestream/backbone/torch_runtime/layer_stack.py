"""Where a model keeps its stack of layers, and how much it can take: read from what transformers built."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from sidestream.accelerator.torch_device import Placement
from sidestream.contract.errors import BackboneError

_COUNTS: Final = ("n_layer", "n_layers", "num_layers", "num_hidden_layers")
"""How modules name the number of layers that they run."""
REMEDY: Final = "use another model (docs/models.md lists those that work)"
_NO_LIMIT: Final = 10**6
log = logging.getLogger(__name__)


class Stack(NamedTuple):
    """A model's layers, and how what they give becomes states."""

    layers: nn.ModuleList
    """In the order in which they run."""
    swapped: bool = False
    """Whether they have the tokens first and the texts second, as XLNet's."""

    def states(self, output: Any, tokens: int | None = None) -> Tensor:
        """[K, T, d] of what a layer gave, for T ``tokens``: some models add more, to fill up windows."""
        states = tensor_of(output)
        assert states is not None
        return (states.transpose(0, 1) if self.swapped else states)[:, :tokens]


def placed(model: nn.Module, precision: str, placement: Placement, name: str) -> Placement:
    """Move a model to a device, as far as its precision lets it; returns where it is."""
    if precision == "int8" and placement.device.type != "cpu":
        placement = Placement(torch.device("cpu"), "torch computes int8 on the processor only")
    placement.put(model)
    log.info("backbone %s: computed on %s", name, placement.chosen)
    return placement


class Stopped(Exception):  # noqa: N818  (a message to ourselves)
    """Ends a forward pass where no more of it is wanted."""


def read_taps(
    model: nn.Module,
    stack: Stack,
    given: Mapping[str, Any],
    taps: Sequence[int],
    take: Callable[[Tensor], None],
    name: str,
) -> None:
    """Hand each tap [K, T, d] to ``take`` as soon as it is computed, and compute nothing beyond the last.

    Args:
        model: The model.
        stack: Its layers.
        given: What it is called with.
        taps: Layers to read, ascending.
        take: Is given what the layer gave, in the graph if one is kept.
        name: For messages.

    Raises:
        BackboneError: it does not come to the last of the taps.
    """

    def reader(*, is_last: bool) -> Callable[[Any, Any, Any], None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            take(stack.states(output))
            if is_last:
                raise Stopped

        return hook

    hooks = [stack.layers[tap - 1].register_forward_hook(reader(is_last=tap == taps[-1])) for tap in taps]
    try:
        model(**given)
    except Stopped:
        return
    finally:
        for hook in hooks:
            hook.remove()
    raise BackboneError(f"{name}: the model's forward pass does not visit its layers in order")


def tensor_of(output: Any) -> Tensor | None:
    """What a module hands on, of what it gave: that, or the first of several things; None for neither."""
    first = output[0] if isinstance(output, tuple | list) and output else output
    return first if isinstance(first, Tensor) else None


def text_config(model: nn.Module) -> Any:
    """The configuration of a model, or of the text model in it."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def stacks_of(model: nn.Module, name: str) -> list[nn.ModuleList]:
    """Every list of modules that is as long as the model is deep; which one it is only a pass can tell.

    Raises:
        BackboneError: there is none.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise BackboneError(f"{name}: is an encoder-decoder; use an encoder or a decoder")
    stacks = [stack for _, _, stack in _placed(model)]
    if not stacks:
        raise BackboneError(
            f"{name}: a {type(model).__name__} has no stack of layers that can be tapped; {REMEDY}"
        )
    return stacks


def check_depth(model: nn.Module, keep: int, name: str) -> None:
    """See that the first ``keep`` layers can be had.

    Raises:
        BackboneError: there are fewer.
    """
    count = _depth(model)
    if not 0 <= keep <= count:
        raise BackboneError(f"{name}: has {count} layers, {keep} were asked for")


def truncate(model: nn.Module, keep: int) -> None:
    """Delete all layers after the first ``keep``: of every list, for some keep parts of layers in several."""
    config, count = text_config(model), _depth(model)
    for parent, attribute, stack in _placed(model):
        setattr(parent, attribute, nn.ModuleList(stack[:keep]))
        for counter in _COUNTS:
            if getattr(parent, counter, None) == count:
                setattr(parent, counter, keep)
    config.num_hidden_layers = keep  # some models count by it


def is_above(model: nn.Module, keep: int) -> Callable[[str], bool]:
    """Tells of a weight's name whether it would be gone with the layers after the first ``keep``."""
    paths = {id(module): path for path, module in model.named_modules()}
    lists = tuple(f"{paths[id(stack)]}." for _, _, stack in _placed(model))

    def above(name: str) -> bool:
        return any(
            name.startswith(path) and int(name.removeprefix(path).partition(".")[0]) >= keep for path in lists
        )

    return above


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that the model and its tokenizer can take."""
    positions = int(getattr(text_config(model), "max_position_embeddings", 0) or 0)
    limit = positions - position_offset(model) if positions > 0 else _NO_LIMIT  # XLNet says -1: any number
    return min(limit, int(min(tokenizer.model_max_length, _NO_LIMIT)))


def position_offset(model: nn.Module) -> int:
    """Where positions start: RoBERTa's do after the padding id."""
    positions = getattr(text_config(model), "max_position_embeddings", None)
    return max(
        (
            module.padding_idx + 1
            for module in model.modules()
            if isinstance(module, nn.Embedding)
            and module.num_embeddings == positions
            and module.padding_idx is not None
        ),
        default=0,
    )


def segments_of(model: nn.Module) -> int:
    """How many texts the model tells apart by segment ids; 0 if it takes none."""
    if any(name.endswith("seg_embed") for name, _ in model.named_parameters()):
        return 3  # XLNet only asks whether two tokens are of one segment, and has a third one for its mark
    count = int(getattr(text_config(model), "type_vocab_size", 0) or 0)
    return count if count > 1 else 0


def _depth(model: nn.Module) -> int:
    return int(getattr(text_config(model), "num_hidden_layers", 0))


def _placed(model: nn.Module) -> list[tuple[nn.Module, str, nn.ModuleList]]:
    count = _depth(model)
    return [
        (parent, attribute, module)
        for parent in model.modules()
        for attribute, module in parent.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == count > 0
    ]
