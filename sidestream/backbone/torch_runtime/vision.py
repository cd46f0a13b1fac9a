"""Vision transformers that torch computes: as :mod:`.backbone` has it of text models, with images for texts.

What a model's image processor does is done by :mod:`sidestream.backbone.images.scaling`, which takes neither
torch nor transformers; at load it is held against transformers' own on two pictures.

Legend: K images, T vectors an image, d hidden size.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel

from sidestream.accelerator.torch_device import HERE, Placement
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.images.image_input import ImageInput, Pixels
from sidestream.backbone.images.scaling import Scaling, scaling_of
from sidestream.backbone.preprocessor import Prepared
from sidestream.backbone.torch_runtime.fingerprint import digests_of, fingerprint_of
from sidestream.backbone.torch_runtime.layer_stack import Stack, is_above, placed, read_taps
from sidestream.backbone.torch_runtime.mapped_weights import MappedWeights
from sidestream.backbone.torch_runtime.precision import convert
from sidestream.backbone.torch_runtime.saved_model import read_vision_model
from sidestream.backbone.torch_runtime.trial import explained, find_stack, is_close, refusal
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from sidestream.contract.tensors import Floats

_ALIKE: Final = 0.02
"""How far our picture may lie from transformers' own, in the mean: other libraries round otherwise."""
_TRIED: Final = ((61, 47), (40, 90))
"""Width and height of the two pictures that are tried."""
T = TypeVar("T", bound="TorchVisionBackbone")
log = logging.getLogger(__name__)


class TorchVisionBackbone(Backbone):
    """A vision transformer of transformers: ViT, DeiT, DINOv2, BEiT and their like.

    Args:
        model: Without a head.
        processor: Its image processor.
        layers: Keep only the first so many layers; 0 for all.
        name: For messages.
        precision: How to keep it, as of text models.

    Raises:
        BackboneError: it has no stack of layers of one width that can be tapped, or fewer than ``layers``, or
            takes no images, or its image processor does what cannot be done here.
    """

    is_decoder = False

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        layers: int = 0,
        name: str = "backbone",
        precision: Precision = "f32",
    ) -> None:
        self._model = model.float().eval().requires_grad_(False)
        if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
            raise refusal(model, name, "it takes no images; this job's samples are images")
        scaling = scaling_of(processor.to_dict(), name)
        tried = pictures()
        _check_scaling(scaling, processor, tried, name)
        super().__init__(name, ImageInput(scaling, name))
        values = torch.from_numpy(np.stack([scaling.apply(picture) for picture in tried]))
        with explained(self._model, name):
            self._stack = find_stack(self._model, layers, {"pixel_values": values}, name)
            self.depth = len(self._stack.layers)
            states = self._every_state(values)
            self._check_alone(values, states, name)
        self.image_input.tokens = states[0].shape[1]
        self.width = int(states[0].shape[2])
        self._preprocessing = hashlib.blake2b(msgspec.json.encode(scaling, order="sorted")).digest()
        weights = MappedWeights(one for _, one in self.parameters()).sparing(self.parameters())
        self._digests = digests_of(weights)
        self.fingerprint = self.fingerprint_of_first(self.depth)
        self.precision: Precision = precision
        """How it is kept."""
        self.placement = HERE
        """Where it is computed."""
        convert(self._model, precision, lambda: self._every_state(values)[-1], name)

    @classmethod
    def load(cls: type[T], reference: str, layers: int = 0, precision: Precision = "f32") -> T:
        """Load a saved one; :func:`sidestream.backbone.runtimes.load_backbone` says from where.

        Raises:
            BackboneError: it cannot be found or loaded, or used.
        """
        started = time.perf_counter()
        model, processor = read_vision_model(reference, AutoModel)
        found = cls(model, processor, layers=layers, name=reference, precision=precision)
        log.info(
            "backbone %s: %d layers of width %d in %s, %d vectors an image, fingerprint %s…, %.1f s to load",
            *(found.name, found.depth, found.width, precision),
            *(found.image_input.tokens, found.fingerprint[:8], time.perf_counter() - started),
        )
        return found

    @property
    def image_input(self) -> ImageInput:
        """Its preprocessor."""
        assert isinstance(self.preprocessor, ImageInput)
        return self.preprocessor

    def place(self, placement: Placement) -> None:
        """Compute somewhere else from now on."""
        with self._lock:
            self.placement = placed(self._model, self.precision, placement, self.name)

    @property
    def model(self) -> nn.Module:
        """The model itself, cut and frozen."""
        return self._model

    @property
    def stack(self) -> Stack:
        """Its layers."""
        return self._stack

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Every weight in use, by name."""
        return self._model.named_parameters()

    def fingerprint_of_first(self, layers: int) -> str:
        """What the fingerprint is where only the first so many layers are loaded."""
        above = is_above(self._model, layers)
        kept = (digest for name, digest in self._digests.items() if not above(name))
        return fingerprint_of(kept, self._preprocessing, self._model)

    def _run(self, prepared: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        assert isinstance(prepared, Pixels)
        with torch.inference_mode():
            values = self.placement.send(torch.from_numpy(prepared.values))
            self._read(values, taps, lambda tap: take(self.placement.fetch(tap.float()).numpy()))

    def _read(self, values: Tensor, taps: Sequence[int], take: Callable[[Tensor], None]) -> None:
        kind = next(self._model.parameters()).dtype
        read_taps(self._model, self._stack, {"pixel_values": values.to(kind)}, taps, take, self.name)

    def _every_state(self, values: Tensor) -> list[Tensor]:
        """[K, 3, H, W] -> for each layer [K, T, d]."""
        states: list[Tensor] = []
        with torch.inference_mode():
            self._read(values, range(1, self.depth + 1), lambda state: states.append(state.clone()))
        return states

    def _check_alone(self, values: Tensor, together: Sequence[Tensor], name: str) -> None:
        """See that an image gives the same alone as beside another, and another gives something else."""
        for layer, (both, alone) in enumerate(
            zip(together, self._every_state(values[:1]), strict=True), start=1
        ):
            if not is_close(both[:1], alone):
                raise refusal(self._model, name, f"layer {layer}'s states change with the rest of the batch")
        if not torch.isfinite(together[-1]).all() or torch.equal(together[-1][0], together[-1][1]):
            raise refusal(self._model, name, "two different pictures give no two different states")


def pictures() -> list[Any]:
    """Pictures in RGB, of odd sizes: gradients with some noise, as a photograph has both."""
    from PIL import Image

    rng = np.random.default_rng(0)
    found = []
    for width, height in _TRIED:
        ramp = np.linspace(0, 200, width)[None, :, None] * np.linspace(0.2, 1, height)[:, None, None]
        noise = rng.integers(0, 50, (height, width, 3))
        found.append(Image.fromarray((ramp + noise).astype(np.uint8)))
    return found


def _check_scaling(scaling: Scaling, processor: Any, tried: Sequence[Any], name: str) -> None:
    """Hold our pictures against what the model's own processor makes.

    Raises:
        BackboneError: they differ.
    """
    try:
        wanted = [np.asarray(processor(one, return_tensors="np")["pixel_values"])[0] for one in tried]
    except Exception as exc:  # transformers raises whatever its parts raise
        raise BackboneError(f"{name}: its image processor does not work: {exc}") from exc
    for one, other in zip(tried, wanted, strict=True):
        ours = scaling.apply(one)
        if ours.shape != other.shape or np.abs(ours - other).mean() > _ALIKE:
            raise BackboneError(
                f"{name}: its {type(processor).__name__} does more than scale, cut and normalise, and cannot "
                "be used here; docs/images.md lists models that can"
            )
