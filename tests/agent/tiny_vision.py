"""Tiny random vision transformers of real classes, with their image processors, and images to show them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    BeitConfig,
    BeitImageProcessor,
    BeitModel,
    BitImageProcessor,
    DeiTConfig,
    DeiTImageProcessor,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

WIDTH = 32
LAYERS = 3
TOKENS = 17
_SIDE = 32
_LARGER = {"height": 36, "width": 36}
_CROP = {"height": _SIDE, "width": _SIDE}


def save_tiny_vision(folder: Path, family: str = "vit", *, seed: int = 0) -> Path:
    """Write a random model of ``family``: vit, deit, dinov2, beit or swin."""
    torch.manual_seed(seed)
    model, processor = _made(family)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _made(family: str) -> tuple[Any, Any]:
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "intermediate_size": 2 * WIDTH,
        "image_size": _SIDE,
        "patch_size": 8,
    }
    if family == "vit":
        return ViTModel(ViTConfig(**shape), add_pooling_layer=False), ViTImageProcessor(size=_CROP)
    if family == "deit":
        return DeiTModel(DeiTConfig(**shape)), DeiTImageProcessor(size=_LARGER, crop_size=_CROP)
    if family == "dinov2":
        processor = BitImageProcessor(size={"shortest_edge": 36}, crop_size=_CROP)
        return Dinov2Model(Dinov2Config(**shape)), processor
    if family == "beit":
        return BeitModel(BeitConfig(**shape)), BeitImageProcessor(size=_LARGER, crop_size=_CROP)
    assert family == "swin"
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4
    )
    return SwinModel(config), ViTImageProcessor(size=_CROP)


def pixels(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    """A picture of its own: large patches of random colours."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize(size, Image.Resampling.NEAREST).convert(mode)


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """What its file holds."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_images(folder: Path, labels: tuple[str, ...], each: int, *, start: int = 0) -> Path:
    """So many images of each label, in a sub-folder for each; each label has colours of its own."""
    for place, label in enumerate(labels):
        (folder / label).mkdir(parents=True, exist_ok=True)
        for number in range(start, start + each):
            rng = np.random.default_rng([place, number])
            colour = np.zeros(3)
            colour[place % 3] = 180
            canvas = np.clip(colour + rng.normal(40, 30, (20, 24, 3)), 0, 255).astype(np.uint8)
            (folder / label / f"{number:04d}.png").write_bytes(file_of(Image.fromarray(canvas)))
    return folder
