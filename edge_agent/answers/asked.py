"""What predictors take."""

from __future__ import annotations

from collections.abc import Sequence

from sidestream.backbone.inputs import Input


def check_inputs(inputs: Sequence[Input]) -> None:
    """Refuse what is no list of texts and pairs.

    Raises:
        TypeError: saying what to write.
    """
    if isinstance(inputs, str) or not all(map(_is_text, inputs)):
        raise TypeError('predict takes a list of texts: predict(["dim the lights"])')


def _is_text(value: object) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) for part in value)
    return pair or isinstance(value, str)
