"""What computes a backbone, by name. Only here is a runtime imported, and only once a backbone is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final, Literal, Protocol, get_args

from sidestream.backbone.backbone import Backbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import TASKS, Task

RuntimeName = Literal["torch"]


class Runtime(Protocol):
    """A library that computes transformers."""

    def load(self, reference: str, layers: int, precision: Precision, *, with_head: bool) -> Backbone:
        """As :func:`load_backbone`; a language model where the output head is wanted."""

    def set_threads(self, count: int) -> None:
        """How many processor threads its passes take from now on."""


def _torch() -> Runtime:
    from sidestream.backbone.torch_runtime.runtime import TorchRuntime  # seconds: torch and transformers

    return TorchRuntime()


_RUNTIMES: Final[Mapping[RuntimeName, Callable[[], Runtime]]] = {"torch": _torch}
if set(_RUNTIMES) != set(get_args(RuntimeName)):  # pragma: no cover
    raise AssertionError("every RuntimeName needs its Runtime")
_shared: dict[tuple[str, int, Precision, bool], Backbone] = {}
_shared_lock = threading.Lock()


def load_backbone(
    reference: str, layers: int = 0, precision: Precision = "f32", task: Task = Task.TEXT_CLASSIFICATION
) -> Backbone:
    """Load a frozen backbone.

    Args:
        reference: ``package:NAME`` for weights inside an installed package (which is not imported), a folder,
            or a name on the Hugging Face hub.
        layers: Keep only the first so many layers; 0 for all.
        precision: How to keep the weights in memory.
        task: What it is for: where that is to generate text, it is a
            :class:`sidestream.backbone.language_model.LanguageModel`.

    Raises:
        BackboneError: it cannot be found or loaded; the message says what to do.
    """
    return _RUNTIMES["torch"]().load(reference, layers, precision, with_head=TASKS[task].generates)


def shared_backbone(
    reference: str, layers: int = 0, precision: Precision = "f32", task: Task = Task.TEXT_CLASSIFICATION
) -> Backbone:
    """As :func:`load_backbone`, but loaded once in this process and shared by all its agents."""
    key = (reference, layers, precision, TASKS[task].generates)
    with _shared_lock:
        if key not in _shared:
            _shared[key] = load_backbone(reference, layers, precision, task)
        return _shared[key]


def set_threads(count: int) -> None:
    """How many processor threads backbones take."""
    _RUNTIMES["torch"]().set_threads(count)
