"""One trial pass at load: is what we tap what the model itself says its layers give, whatever the padding?

Transformers has hundreds of architectures, and each may keep its layers elsewhere, hand on something else
than states, or look at padding. So nothing is believed: two texts of unequal length go through the model
once, with ``output_hidden_states``, and the stack of layers is the list of modules whose outputs are those
states. Then the shorter text goes through alone. What differs is refused before anything is announced.

The last state that a model reports may have passed its final norm: it is looked for among what the modules
after the last layer make of that layer's output.

Legend: K texts, T tokens of the longest, L layers, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.layer_stack import (
    REMEDY,
    Stack,
    Stopped,
    check_depth,
    stacks_of,
    tensor_of,
    truncate,
)
from sidestream.contract.errors import BackboneError

LONG: Final = 11
SHORT: Final = 6
"""Tokens of the two texts: odd and even, and neither as many as there are texts."""
_CLOSE: Final = 1e-3
"""States are equal when they differ by less than this, relative and measured by their root mean square. Sums
in another order make 1e-5 of it, another layer or a look at the padding 1e-2 and far more."""
Given = Mapping[str, Tensor]


class Watch:
    """What modules gave in one pass.

    Args:
        model: The model.
        stacks: Lists of modules whose outputs are kept, by list and place.
        stop: The pass ends before any module of these places is run; -1 for never.
    """

    def __init__(self, model: nn.Module, stacks: Sequence[nn.ModuleList], stop: int = -1) -> None:
        self._model = model
        self._stacks = stacks
        self._stop = stop
        self.given: list[list[list[Tensor | None]]] = [[[] for _ in stack] for stack in stacks]
        """By list, place and visit: copies, for a model may go on to write into what it gave."""
        self.around: list[tuple[Tensor, Tensor]] = []
        """What every module outside the lists made of what, in the order in which they ended."""

    def run(self, given: Given) -> Any:
        """One pass; None if it was stopped."""
        hooks = list(self._hooks())
        own = {} if self._stop >= 0 else {"output_hidden_states": True}
        try:
            with torch.inference_mode():
                return self._model(**given, **own)
        except Stopped:
            return None
        finally:
            for hook in hooks:
                hook.remove()

    def _hooks(self) -> Iterator[Any]:
        inside = {id(part) for stack in self._stacks for part in stack.modules()}
        for stack, kept in zip(self._stacks, self.given, strict=True):
            for place, module in enumerate(stack):
                if self._stop < 0 or place < self._stop:
                    yield module.register_forward_hook(_keeper(kept[place]))
                else:
                    yield module.register_forward_pre_hook(_stop)
        for module in self._model.modules():
            if id(module) not in inside and module is not self._model:
                yield module.register_forward_hook(self._beside)

    def _beside(self, module: Any, given: Any, output: Any) -> None:
        first, made = tensor_of(given), tensor_of(output)
        if first is not None and made is not None and first.is_floating_point():
            self.around.append((first.clone(), made.clone()))


@contextmanager
def explained(model: nn.Module, name: str) -> Iterator[None]:
    """Turn whatever transformers and torch raise into one line that says what to do.

    Raises:
        BackboneError: anything was raised.
    """
    try:
        yield
    except BackboneError:
        raise
    except Exception as exc:  # transformers raises whatever its parts raise
        first = next(iter(str(exc).strip().splitlines()), "")[:200]
        raise refusal(model, name, f"{type(exc).__name__}: {first}") from exc


def refusal(model: nn.Module, name: str, why: str) -> BackboneError:
    """That a model cannot be used."""
    return BackboneError(f"{name}: a {type(model).__name__} cannot be a backbone here: {why}; {REMEDY}")


def is_close(found: Tensor, wanted: Tensor) -> bool:
    """Whether states are equal but for the order of sums."""
    scale = float(wanted.square().mean().sqrt().nan_to_num())
    return torch.allclose(found, wanted, rtol=_CLOSE, atol=_CLOSE * scale, equal_nan=True)


def find_stack(model: nn.Module, keep: int, given: Given, name: str) -> Stack:
    """Cut a model to its first ``keep`` layers, 0 for all, and find the list of modules that its layers are.

    Args:
        model: The model; its upper layers are deleted.
        keep: How many are kept.
        given: What goes through it: ``input_ids`` [K, T] and ``attention_mask`` [K, T]; or something of which
            the model makes equally many vectors for each, such as ``pixel_values``.
        name: For messages.

    Raises:
        BackboneError: there is no such list, or too short a one, or its layers give other states in the cut
            model than they did in the whole one.
    """
    stacks = stacks_of(model, name)
    check_depth(model, keep, name)
    before: Watch | None = None
    if 0 < keep < len(stacks[0]):
        before = Watch(model, stacks, stop=keep)
        before.run(given)
        truncate(model, keep)
        stacks = stacks_of(model, name)
    watch = Watch(model, stacks)
    own = getattr(watch.run(given), "hidden_states", None)
    if not own:
        raise refusal(model, name, "it does not say what states its layers give")
    mask = given.get("attention_mask")
    if mask is None and any(state.shape != own[0].shape or state.dim() != 3 for state in own):
        raise refusal(model, name, "its layers give states of several sizes, stage by stage; taps need one")
    real = torch.ones(own[0].shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    for index, stack in enumerate(stacks):
        for swapped in (False, True):
            found = Stack(stack, swapped)
            if _agrees(found, watch.given[index], own, real, watch.around):
                if before is not None and not _same(before.given[index], watch.given[index]):
                    raise refusal(model, name, f"cut to {keep} layers it is not what those layers were")
                return found
    raise refusal(model, name, "no list of modules in it gives the states that it reports for its layers")


def check_padding(
    read: Callable[[Tensor, Tensor], Sequence[Tensor]], given: Given, model: nn.Module, name: str
) -> None:
    """See that a text gives the same alone as beside a longer one.

    Args:
        read: Given ids and mask, both [K, T], gives every layer's states [K, T, d].
        given: Two texts, the second one the shorter.
        model: For messages.
        name: Likewise.

    Raises:
        BackboneError: it does not.
    """
    ids, mask = given["input_ids"], given["attention_mask"].bool()
    length = int(mask[-1].sum())
    together = read(ids, mask)
    alone = read(ids[-1:, :length], mask[-1:, :length])
    for layer, (padded, bare) in enumerate(zip(together, alone, strict=True), 1):
        if not is_close(padded[-1:, :length], bare):
            raise refusal(
                model, name, f"layer {layer}'s states of a text change with the padding of its batch"
            )


def _agrees(
    stack: Stack,
    given: Sequence[Sequence[Tensor | None]],
    own: Sequence[Tensor],
    real: Tensor,
    around: Sequence[tuple[Tensor, Tensor]],
) -> bool:
    """Whether each module was visited once, and gave what the model says is its layer's state."""
    outputs = [visits[0] for visits in given if len(visits) == 1]
    if len(outputs) != len(given) or len(own) != len(given) + 1:
        return False
    if any(output is None or output.dim() != 3 for output in outputs):
        return False
    states = [stack.states(output, real.shape[1]) for output in outputs]
    if any(state.shape[:2] != real.shape or state.shape != own[0].shape for state in states):
        return False
    inner = all(is_close(a[real], b[real]) for a, b in zip(states[:-1], own[1:-1], strict=True))
    last = outputs[-1]
    assert last is not None
    return inner and any(_ends_as(one, own[-1], real, stack) for one in _made_of(last, around))


def _made_of(last: Tensor, around: Sequence[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """The last layer's output, and what modules after it made of that, one after the other."""
    known = [last]
    yield last
    for taken, made in around:
        if any(taken.shape == one.shape and torch.equal(taken, one) for one in known):
            known.append(made)
            yield made


def _ends_as(made: Tensor, own: Tensor, real: Tensor, stack: Stack) -> bool:
    if made.dim() != 3:
        return False
    state = stack.states(made, real.shape[1])
    return state.shape == own.shape and is_close(state[real], own[real])


def _same(before: Sequence[Sequence[Tensor | None]], after: Sequence[Sequence[Tensor | None]]) -> bool:
    pairs = zip(before, after, strict=False)  # before they were cut there were more
    return all(a is not None and b is not None and is_close(a, b) for (a, *_), (b, *_) in pairs)


def _keeper(kept: list[Tensor | None]) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, given: Any, output: Any) -> None:
        states = tensor_of(output)
        kept.append(None if states is None else states.clone())

    return hook


def _stop(module: Any, given: Any) -> None:
    raise Stopped
