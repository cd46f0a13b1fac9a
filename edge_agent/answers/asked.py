"""What predictors take, by what the job's samples are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sidestream.backbone.images.decoding import check_image, image_at
from sidestream.backbone.inputs import ImageFile, Input, digest_of
from sidestream.contract.tasks import Modality


def as_inputs(asked: Sequence[Any], modality: Modality) -> list[Input]:
    """What was asked, as inputs. Images come as paths of their files, or as what is in these.

    Raises:
        TypeError: it is no such list; it says what to write.
        DataError: an image cannot be read.
    """
    if modality is Modality.TEXT:
        if isinstance(asked, str) or not all(map(_is_text, asked)):
            raise TypeError('predict takes a list of texts: predict(["dim the lights"])')
        return list(asked)
    if isinstance(asked, str | bytes | Path) or not all(map(_is_image, asked)):
        raise TypeError('predict takes a list of image files: predict(["photo.jpg"])')
    images = [_image(one, number) for number, one in enumerate(asked, start=1)]
    for one in images:
        check_image(one)
    return list(images)


def _image(one: Any, number: int) -> ImageFile:
    if isinstance(one, bytes):
        return ImageFile(f"image {number}", digest_of(one), one)
    return one if isinstance(one, ImageFile) else image_at(Path(one))


def _is_image(value: object) -> bool:
    return isinstance(value, str | Path | bytes | ImageFile)


def _is_text(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return pair or isinstance(value, str)
