"""LoRA in a frozen model: put there by peft, known by the names of :mod:`sidestream.contract.lora`.

Legend: r rank, d_in and d_out the widths of a map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError, DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tensors import Floats

_PARTS: Final = ("lora_A", "lora_B")
_ADAPTER: Final = "default"
"""How peft calls the only one."""
_REMEDY: Final = "use another model (docs/models.md), or a method that does not split"


class Shell(nn.Module):
    """Has a model where one with a head has it, for peft writes names by the place.

    It has no ``config``: peft would take it for a model of transformers, and its targets for those of older
    versions of it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.add_module(model.base_model_prefix or "model", model)


class Adapters:
    """The adapters of one model, by the names that travel, layer by layer.

    Each starts as nothing: A drawn evenly from ±1/√d_in, which is peft's way, and B zero.

    Args:
        view: A twin of a backbone, which has them from now on.
        inject: Has peft put them there, without values.
        seed: Decides A.

    Raises:
        BackboneError: the model has no such maps, or has them elsewhere than in its layers.
    """

    def __init__(self, view: TorchBackbone, inject: Callable[[], None], *, seed: int) -> None:
        with refusing(view):
            inject()
        self._path = f"{view.stack_path}."
        self._places = dict(_places(view))
        for name, place in self._places.items():
            if not name.startswith(self._path):
                raise BackboneError(
                    f"{view.name}: targets: {name.rpartition('.')[0]} is in none of its layers"
                )
            self._put(name, _start(name, tuple(place.weight.shape), seed))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained: A [r, d_in] and B [d_out, r] of each map."""
        return {name: place.weight for name, place in self._places.items()}

    def layer_of(self, name: str) -> int:
        """The layer that an adapter is in, from 0."""
        return int(name.removeprefix(self._path).partition(".")[0])

    def replace(self, arrays: Mapping[str, Floats]) -> None:
        """Take other values; graphs that are kept go on with those that they were made with.

        Raises:
            DecodeError: names or shapes are not exactly these, or a value is not finite.
        """
        check_arrays(arrays, self.parameters)
        for name, array in arrays.items():
            self._put(name, torch.from_numpy(array.copy()))

    def _put(self, name: str, values: Tensor) -> None:
        self._places[name].weight = nn.Parameter(values)


def lora_config(backbone: TorchBackbone, lora: LoraSpec, *, every: bool, **more: Any) -> Any:
    """What peft has to know.

    Args:
        backbone: The model.
        lora: What the plan says.
        every: Whether each target has to be there; in the first layers some may be missing, if not all.
        more: For peft.

    Raises:
        BackboneError: peft's table has no targets for the architecture, and the plan names none; or it names
            such as no layer has.
    """
    kind = str(getattr(backbone.model.config, "model_type", ""))
    targets = lora.targets or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
    if not targets:
        raise BackboneError(
            f"{backbone.name}: peft names no targets for {kind}; name some, as in lora.targets"
        )
    modules = dict(backbone.stack.layers.named_modules())
    lacking = [one for one in lora.targets if not any(f".{path}".endswith(f".{one}") for path in modules)]
    if lacking and (every or len(lacking) == len(lora.targets)):
        raise BackboneError(f"{backbone.name}: targets: its layers have no map called {lacking[0]!r}")
    transposed = any(
        type(module).__name__ == "Conv1D" and path.rpartition(".")[2] in targets
        for path, module in modules.items()
    )
    return peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        fan_in_fan_out=transposed,
        **more,
    )


def check_arrays(arrays: Mapping[str, Floats], wanted: Mapping[str, nn.Parameter]) -> None:
    """See that weights are those of a model.

    Raises:
        DecodeError: names or shapes are not exactly those that are wanted, or a value is not finite.
    """
    if arrays.keys() != wanted.keys():
        odd = min(arrays.keys() ^ wanted.keys())
        what = "lacks" if odd in wanted else "has no place for"
        raise DecodeError(f"weights do not fit the split model: it {what} {odd[:100]!r}")
    for name, array in arrays.items():
        if array.shape != tuple(wanted[name].shape):
            raise DecodeError(f"{name} has shape {array.shape}, not {tuple(wanted[name].shape)}")
        if not np.isfinite(array).all():
            raise DecodeError(f"{name} holds NaN or infinite values")


def to_arrays(parameters: Mapping[str, Tensor]) -> dict[str, Floats]:
    """As float32, sharing no memory."""
    return {
        name: parameter.detach().numpy().astype(np.float32, copy=True)
        for name, parameter in parameters.items()
    }


def check_precision(backbone: TorchBackbone) -> None:
    """Refuse a backbone through which no gradient passes.

    Raises:
        BackboneError: it is kept in int8.
    """
    if backbone.precision == "int8":
        raise BackboneError(f"{backbone.name}: no gradient passes through int8; set precision to f32 or bf16")


@contextmanager
def refusing(backbone: TorchBackbone) -> Iterator[None]:
    """Turn whatever peft, transformers and torch raise into one line.

    Raises:
        BackboneError: anything was raised.
    """
    try:
        yield
    except BackboneError:
        raise
    except Exception as exc:  # they raise whatever their parts raise
        first = next(iter(str(exc).strip().splitlines()), "")[:200]
        raise not_cut(backbone, f"{type(exc).__name__}: {first}") from exc


def not_cut(backbone: TorchBackbone, why: str) -> BackboneError:
    """That a model cannot be used by the methods that split."""
    kind = type(backbone.model).__name__
    return BackboneError(f"{backbone.name}: a {kind} cannot be cut in two here: {why}; {_REMEDY}")


def _places(view: TorchBackbone) -> Iterator[tuple[str, Any]]:
    """Name and the linear map that holds the tensor."""
    for path, module in view.model.named_modules():
        if isinstance(module, LoraLayer):
            for part in _PARTS:
                held = getattr(module, part)
                if _ADAPTER not in held:
                    raise BackboneError(f"{view.name}: targets: {path} is no linear map")
                yield f"{path}.{part}", held[_ADAPTER]


def _start(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Depends on nothing but these three, so that a layer starts alike whatever else there is."""
    if name.endswith(_PARTS[1]):
        return torch.zeros(shape)
    salt = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:7], "little")
    bound = shape[1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=torch.Generator().manual_seed(salt))
