"""What computes a backbone, by name. Only here is a runtime imported, and only once a backbone is wanted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Final, Literal, Protocol, TypeAlias, get_args

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.onnx_runtime.folder import place_of
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import TASKS, Modality, Task

RuntimeName: TypeAlias = Literal["torch", "onnx"]
RuntimeChoice: TypeAlias = Literal["auto", "torch", "onnx"]
"""auto: onnx where the reference is an exported folder, torch elsewhere."""


class Runtime(Protocol):
    """A library that computes transformers."""

    def load(self, reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
        """As :func:`load_backbone`."""

    def set_device(self, wanted: str) -> None:
        """Where its passes are computed, of what is loaded from now on: auto, cpu, cuda or cuda:N.

        Raises:
            ConfigError: there is no such device.
        """

    def set_threads(self, count: int) -> None:
        """How many processor threads its passes take: of what is loaded from now on, at least."""


@cache
def _torch() -> Runtime:
    from sidestream.backbone.torch_runtime.runtime import TorchRuntime  # seconds: torch and transformers

    return TorchRuntime()


@cache
def _onnx() -> Runtime:
    from sidestream.backbone.onnx_runtime.runtime import OnnxRuntime

    return OnnxRuntime()


_RUNTIMES: Final[Mapping[RuntimeName, Callable[[], Runtime]]] = {"torch": _torch, "onnx": _onnx}
if set(_RUNTIMES) != set(get_args(RuntimeName)):  # pragma: no cover
    raise AssertionError("every RuntimeName needs its Runtime")
_REMEDIES: Final[Mapping[RuntimeName, str]] = {
    "torch": "install torch and transformers, or name a folder that sidestream backbone export wrote",
    "onnx": "pip install onnxruntime tokenizers",
}
_shared: dict[tuple[str, int, Precision, bool, Modality, RuntimeName], Backbone] = {}
_shared_lock = threading.Lock()


def runtime_of(reference: str, choice: RuntimeChoice = "auto") -> RuntimeName:
    """What is to compute a backbone."""
    if choice == "auto":
        return "torch" if place_of(reference) is None else "onnx"
    return choice


def load_backbone(
    reference: str,
    layers: int = 0,
    precision: Precision = "f32",
    task: Task = Task.TEXT_CLASSIFICATION,
    *,
    runtime: RuntimeChoice = "auto",
) -> Backbone:
    """Load a frozen backbone.

    Args:
        reference: ``package:NAME`` for weights inside an installed package (which is not imported), a folder,
            a name on the Hugging Face hub, or a folder that ``sidestream backbone export`` wrote.
        layers: Keep only the first so many layers; 0 for all.
        precision: How to keep the weights in memory; an exported folder keeps its own.
        task: What it is for: where that is to generate text, it is a
            :class:`sidestream.backbone.language_model.LanguageModel`; where its samples are images, it takes
            those.
        runtime: What computes it.

    Raises:
        BackboneError: it cannot be found or loaded; the message says what to do.
    """
    chosen = runtime_of(reference, runtime)
    return _runtime(chosen).load(reference, layers, precision, task)


def shared_backbone(
    reference: str,
    layers: int = 0,
    precision: Precision = "f32",
    task: Task = Task.TEXT_CLASSIFICATION,
    *,
    runtime: RuntimeChoice = "auto",
) -> Backbone:
    """As :func:`load_backbone`, but loaded once in this process and shared by all its agents."""
    spec = TASKS[task]
    key = (reference, layers, precision, spec.generates, spec.modality, runtime_of(reference, runtime))
    with _shared_lock:
        if key not in _shared:
            _shared[key] = load_backbone(reference, layers, precision, task, runtime=runtime)
        return _shared[key]


def set_threads(count: int, runtime: RuntimeName) -> None:
    """How many processor threads a runtime's backbones take, of those loaded from now on at least."""
    _runtime(runtime).set_threads(count)


def set_device(wanted: str, runtime: RuntimeName) -> None:
    """Where a runtime's backbones are computed, of those loaded from now on.

    Raises:
        ConfigError: there is no such device.
    """
    _runtime(runtime).set_device(wanted)


def _runtime(name: RuntimeName) -> Runtime:
    """Import a runtime.

    Raises:
        BackboneError: it is not installed.
    """
    try:
        return _RUNTIMES[name]()
    except ModuleNotFoundError as exc:
        raise BackboneError(f"{exc.name} is not installed here, and is wanted: {_REMEDIES[name]}") from exc
