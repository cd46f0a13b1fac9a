"""The device on which torch computes: chosen, tried before it is believed, and given tensors to.

Whoever computes knows a :class:`Placement` and no device. Tests put the meta device or a second processor in
its place: torch refuses to mix tensors of two devices, so what was not sent or fetched shows without a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sidestream.accelerator.choice import AUTO, Chosen, index_of, without_cuda
from sidestream.contract.errors import ConfigError

_REMEDY: Final = "use auto or cpu, or install a torch that fits (docs/boards.md)"
M = TypeVar("M", bound=nn.Module)


class Gpus(Protocol):
    """What torch says of GPUs."""

    @property
    def built(self) -> bool:
        """Whether this build of torch knows CUDA."""

    def names(self) -> Sequence[str]:
        """Of those there are."""

    def try_out(self, index: int) -> None:
        """Compute something.

        Raises:
            Exception: it cannot.
        """


class TorchGpus:
    """Of this machine."""

    @property
    def built(self) -> bool:
        return torch.version.cuda is not None

    def names(self) -> Sequence[str]:
        if not torch.cuda.is_available():
            return ()
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]

    def try_out(self, index: int) -> None:
        """A build may find a GPU whose instructions it was not compiled for."""
        values = torch.ones(8, 8, device=f"cuda:{index}")
        assert float((values @ values).sum().cpu()) == 512.0


class Placement:
    """A device, and the way there and back.

    Args:
        device: Where to compute.
        why: Why there, in words.
    """

    def __init__(self, device: torch.device, why: str) -> None:
        self.device = device
        self.why = why

    @property
    def chosen(self) -> Chosen:
        """In words."""
        return Chosen(str(self.device), self.why)

    def put(self, module: M) -> M:
        """Move a model there, in place."""
        return module.to(self.device)

    def send(self, tensor: Tensor) -> Tensor:
        """A tensor there; itself where it is there already."""
        return tensor.to(self.device)

    def send_all(self, given: dict[str, Any]) -> dict[str, Any]:
        """The same of all tensors by name."""
        return {name: self.send(one) if isinstance(one, Tensor) else one for name, one in given.items()}

    def fetch(self, tensor: Tensor) -> Tensor:
        """A tensor here, in the processor's memory."""
        return tensor.to("cpu")


def deterministic(placement: Placement) -> None:
    """Have a GPU give the same bits every time; a processor does, with equally many threads.

    https://docs.pytorch.org/docs/stable/notes/randomness.html
    """
    if placement.device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before the first product
        torch.use_deterministic_algorithms(True)


HERE: Final = Placement(torch.device("cpu"), "the processor is what this uses")


def choose(wanted: str, gpus: Gpus | None = None, field: str = "compute_device") -> Placement:
    """Where to compute.

    Args:
        wanted: auto, cpu, cuda or cuda:N. auto takes the first GPU that works, or the processor.
        gpus: What there is; this machine's.
        field: The setting, for messages.

    Raises:
        ConfigError: a GPU is asked for by name and cannot be had.
    """
    if wanted == "cpu":
        return Placement(torch.device("cpu"), "it is set")
    gpus = gpus or TorchGpus()
    index, trouble = index_of(wanted), ""
    names = gpus.names() if gpus.built else ()
    if not gpus.built:
        trouble = without_cuda("torch")
    elif not names:
        trouble = "torch finds no GPU"
    elif index >= len(names):
        trouble = f"there are {len(names)} GPUs, counted from 0"
    else:
        try:
            gpus.try_out(index)
        except Exception as exc:  # CUDA's errors have no root of their own
            first = next(iter(str(exc).strip().splitlines()), type(exc).__name__)[:150]
            trouble = f"{names[index]} does not work with this build of torch: {first}"
    if not trouble:
        return Placement(torch.device("cuda", index), names[index])
    if wanted == AUTO:
        return Placement(torch.device("cpu"), trouble)
    raise ConfigError(field, f"{wanted}: {trouble}; {_REMEDY}")
