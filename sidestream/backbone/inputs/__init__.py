"""What goes through a backbone: a text, a pair, an image file; opaque to all between source and model."""

from sidestream.backbone.inputs.kinds import (
    ImageFile,
    Input,
    about,
    content_of,
    digest_of,
    from_kept,
    is_blank,
    pair_of,
    seeds_of,
    shown,
    size_of,
    text_of,
    texts_of,
    to_kept,
)
from sidestream.backbone.inputs.text import Text

__all__ = [
    "ImageFile",
    "Input",
    "Text",
    "about",
    "content_of",
    "digest_of",
    "from_kept",
    "is_blank",
    "pair_of",
    "seeds_of",
    "shown",
    "size_of",
    "text_of",
    "texts_of",
    "to_kept",
]
