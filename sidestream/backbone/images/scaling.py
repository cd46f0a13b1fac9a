"""From a picture to a model's numbers, as the model's own image processor has it. Knows no files, no model.

What the processors that vision transformers come with do with one picture is always this: scale it, cut its
middle out, and shift its values. Whether that is all that one does is not believed but tried where
transformers is (:mod:`sidestream.backbone.torch_runtime.vision`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import numpy as np

from sidestream.contract.errors import BackboneError
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import prepared

if TYPE_CHECKING:
    from PIL.Image import Image

_MOST: Final = 4096
Side = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
Three = tuple[float, float, float]


@prepared
class Scaling(msgspec.Struct, frozen=True, kw_only=True):
    """What is done with a picture."""

    resize: Literal["", "exact", "shortest"] = ""
    """To ``height`` and ``width``, whatever becomes of the proportions; or its shorter side to ``height``."""
    height: Side = 0
    width: Side = 0
    resample: Annotated[int, msgspec.Meta(ge=0, le=5)] = 2
    """How, in Pillow's numbers."""
    crop_height: Side = 0
    """What is cut out of the middle; 0: nothing."""
    crop_width: Side = 0
    factor: float = 1 / 255
    """Values are multiplied by it,"""
    mean: Three = (0.0, 0.0, 0.0)
    """less this, for each of red, green and blue,"""
    deviation: Three = (1.0, 1.0, 1.0)
    """and divided by this."""

    def __post_init__(self) -> None:
        if min(self.size) < 1 or min(self.deviation) <= 0:
            raise ValueError("an image processor needs a size and positive deviations")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of what the model sees."""
        return (self.crop_height, self.crop_width) if self.crop_height else (self.height, self.width)

    @property
    def least(self) -> int:
        """Pixels that a side of a picture should still have for this to lose nothing."""
        return 2 * max(self.height, self.width, *self.size)

    def apply(self, image: Image) -> Floats:
        """A picture in RGB -> [3, H, W]."""
        if self.resize:
            image = image.resize(self._target(*image.size), self.resample, reducing_gap=None)
        if self.crop_height:
            left = (image.width - self.crop_width) // 2
            top = (image.height - self.crop_height) // 2
            image = image.crop((left, top, left + self.crop_width, top + self.crop_height))
        values = np.asarray(image, dtype=np.float32) * np.float32(self.factor)
        values = (values - np.array(self.mean, np.float32)) / np.array(self.deviation, np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1), dtype=np.float32)

    def _target(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to scale to."""
        if self.resize == "exact":
            return self.width, self.height
        shorter, longer = sorted((width, height))
        other = int(self.height * longer / shorter)
        return (self.height, other) if width <= height else (other, self.height)


def scaling_of(said: Mapping[str, Any], name: str) -> Scaling:
    """What an image processor's own settings say, by transformers' names.

    Raises:
        BackboneError: they say nothing that can be done here.
    """
    try:
        found: dict[str, Any] = {"resample": int(said.get("resample", 2) or 0)}
        size = dict(said.get("size") or {}) if said.get("do_resize") else {}
        if "shortest_edge" in size:
            found |= {"resize": "shortest", "height": int(size["shortest_edge"])}
        elif size:
            found |= {"resize": "exact", "height": int(size["height"]), "width": int(size["width"])}
        if said.get("do_center_crop"):
            crop = said["crop_size"]
            crop = crop if isinstance(crop, Mapping) else {"height": crop, "width": crop}
            found |= {"crop_height": int(crop["height"]), "crop_width": int(crop["width"])}
        found["factor"] = float(said["rescale_factor"]) if said.get("do_rescale") else 1.0
        if said.get("do_normalize"):
            found |= {"mean": _three(said["image_mean"]), "deviation": _three(said["image_std"])}
        return Scaling(**found)
    except (KeyError, TypeError, ValueError) as exc:
        raise BackboneError(
            f"{name}: its image processor gives no pictures of one size ({exc}); "
            "use a vision transformer with a fixed size"
        ) from exc


def _three(values: Any) -> Three:
    one, two, three = (float(value) for value in values)
    return one, two, three
