"""What makes a model's own numbers of inputs: it belongs to the backbone, as its weights do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

from sidestream.backbone.images.image_input import Pixels
from sidestream.backbone.inputs import Input
from sidestream.backbone.text_input import Tokens, Words

Prepared: TypeAlias = Tokens | Pixels
"""Inputs as a model takes them."""


class Preprocessor(Protocol):
    """Of one backbone. Not for two threads at once."""

    def read(self, inputs: Sequence[Input], max_tokens: int) -> Prepared:
        """Inputs as the model takes them; longer ones are cut, also to what it can take."""

    def read_words(self, inputs: Sequence[Input], max_tokens: int, *, last: bool) -> tuple[Prepared, Words]:
        """The same, and where in them words are.

        Args:
            inputs: K of them.
            max_tokens: As in :meth:`read`.
            last: Whether a word's last token stands for it.

        Raises:
            BackboneError: the preprocessor does not tell where words are.
        """

    def check(self, inputs: Sequence[Input]) -> None:
        """Refuse inputs of which the model can make next to nothing.

        Args:
            inputs: The first ones of a device's own; none is as good as known.

        Raises:
            BackboneError: saying what to do.
        """
