"""The preprocessor of a backbone that takes images.

Legend: K images, T vectors an image, H and W height and width of what the model sees.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sidestream.backbone.images.decoding import read_image
from sidestream.backbone.images.scaling import Scaling
from sidestream.backbone.inputs import ImageFile, Input
from sidestream.backbone.sampled import Bools
from sidestream.backbone.text_input import Words
from sidestream.contract.errors import BackboneError, DataError
from sidestream.contract.tensors import Floats

log = logging.getLogger(__name__)


class Pixels(NamedTuple):
    """Images as a model takes them."""

    values: Floats
    """[K, 3, H, W]."""
    mask: Bools
    """[K, T]: which vectors are real: all."""
    unreadable: Bools
    """[K]: of which no picture could be had; what stands for them is black."""


class ImageInput:
    """Pictures scaled and normalised as the model has it.

    Args:
        scaling: What is done with each.
        name: The model's, for messages.
        tokens: Vectors that the model makes of one; whoever tries it finds out.
    """

    def __init__(self, scaling: Scaling, name: str, *, tokens: int = 0) -> None:
        self.scaling = scaling
        """What is done with each."""
        self.tokens = tokens
        """Vectors that the model makes of one: patches, and what it puts before them."""
        self._name = name

    def read(self, inputs: Sequence[Input], max_tokens: int) -> Pixels:
        """Pictures of files; an image is never cut.

        Raises:
            BackboneError: the model makes more vectors of an image than are wanted.
        """
        if self.tokens > max_tokens:
            raise BackboneError(
                f"{self._name}: makes {self.tokens} vectors of an image, and the plan's max_tokens is "
                f"{max_tokens}; raise it in the trainer's settings"
            )
        values = np.zeros((len(inputs), 3, *self.scaling.size), np.float32)
        unreadable = np.zeros(len(inputs), bool)
        for row, one in enumerate(inputs):
            try:
                values[row] = self.scaling.apply(read_image(_image(one), self.scaling.least))
            except DataError as exc:
                log.warning("an image is skipped: %s", exc)
                unreadable[row] = True
        return Pixels(values, np.ones((len(inputs), self.tokens), bool), unreadable)

    def read_words(self, inputs: Sequence[Input], max_tokens: int, *, last: bool) -> tuple[Pixels, Words]:
        """There are none.

        Raises:
            BackboneError: always.
        """
        raise BackboneError(f"{self._name}: takes images, in which there are no words")

    def check(self, inputs: Sequence[Input]) -> None:
        """Every image is as good as another."""


def _image(one: Input) -> ImageFile:
    if not isinstance(one, ImageFile):
        raise TypeError("a text is no image")
    return one
