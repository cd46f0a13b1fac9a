"""From a file's bytes to a picture: RGB, the right way up, and never larger than what a board can hold.

Pillow reads; it is imported when the first image is. What cannot be read is one line, whatever Pillow's parts
raise. Only formats of photographs are tried: others of Pillow's start programs (EPS) or are hardly ever met.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from sidestream.backbone.inputs import ImageFile, digest_of
from sidestream.contract.errors import BackboneError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS: Final = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SUFFIXES: Final = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
"""Of files that are taken for images."""
MOST_BYTES: Final = 64 * 2**20
"""Of a file."""
MOST_PIXELS: Final = 64_000_000
"""Of a picture: as many as the largest camera module for boards gives. A small file may claim any number."""
_WHITE: Final = (255, 255, 255, 255)
_DEEP: Final = 257  # 16 bits to 8


def image_at(path: Path) -> ImageFile:
    """An input for a file as it is now; what is in it is not looked at.

    Raises:
        DataError: it cannot be read.
    """
    return ImageFile(str(path.absolute()), digest_of(_bytes_of(path)))


def check_image(one: ImageFile) -> None:
    """See that a picture can be had of it.

    Raises:
        DataError: in one line, why not.
    """
    read_image(one, least=1)


def read_image(one: ImageFile, least: int = 0) -> Image:
    """The picture, in RGB.

    Args:
        one: Where it is, and what was there when it was found.
        least: Pixels that each side should still have: a JPEG of many more is scaled down while it is read.

    Raises:
        DataError: it is gone, has changed meanwhile, or is no image that can be read.
        BackboneError: Pillow is not installed.
    """
    data = one.data or _bytes_of(Path(one.path))
    if digest_of(data) != one.digest:
        raise DataError(f"{one.path}: has been written to since it was found")
    return decode(data, one.path, least)


def decode(data: bytes, name: str, least: int = 0) -> Image:
    """As :func:`read_image`, of bytes."""
    pillow = _pillow()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes: those are held to a limit of our own
            image = pillow.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MOST_PIXELS:
            raise DataError(
                f"{name}: has {width} x {height} pixels; {MOST_PIXELS // 10**6} million at most are read"
            )
        if least:
            image.draft(None, (least, least))
        image.load()
        return _as_rgb(_upright(image))
    except DataError:
        raise
    except Exception as exc:  # Pillow raises whatever its parts raise
        raise DataError(f"{name}: {_why(data, exc)}") from exc


def _why(data: bytes, error: Exception) -> str:
    if not data:
        return "is empty"
    if type(error).__name__ == "DecompressionBombError":
        return f"claims more pixels than the {MOST_PIXELS // 10**6} million that are read"
    said = next(iter(str(error).strip().splitlines()), type(error).__name__)[:150]
    if type(error).__name__ == "UnidentifiedImageError":
        return f"is no image that can be read here ({', '.join(FORMATS)})"
    return f"is a broken image, or only half of one: {said}"


def _bytes_of(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as exc:
        raise DataError(f"{path}: cannot be read: {exc.strerror or exc}") from exc
    if len(data) > MOST_BYTES:
        raise DataError(f"{path}: is larger than {MOST_BYTES >> 20} MiB")
    return data


def _upright(image: Image) -> Image:
    """Turned as its EXIF says; where that cannot be read, as it is."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # of broken EXIF Pillow raises whatever its parts raise
        return image


def _as_rgb(image: Image) -> Image:
    """Of any mode; what can be seen through lies on white, and deeper colours are cut to 8 bits."""
    pillow = _pillow()
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        if values.max(initial=0) > np.iinfo(np.uint8).max:
            values = values / _DEEP
        deep: Image = pillow.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
        return deep
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        flat: Image = pillow.alpha_composite(pillow.new("RGBA", rgba.size, _WHITE), rgba).convert("RGB")
        return flat
    return image.convert("RGB")


def _pillow() -> Any:
    """``PIL.Image``.

    Raises:
        BackboneError: it is not installed.
    """
    try:
        import PIL.Image
    except ModuleNotFoundError as exc:
        raise BackboneError("images take Pillow: pip install 'sidestream[images]'") from exc
    return PIL.Image
