"""A tiny vision transformer, taught with generated signs: the backbone of ``sidestream demo --images``.

No hub is needed. It is taught to name shape and mark of signs that the demo's devices never see
(:mod:`sidestream.demo.pictures`), as a model from the hub was taught with other photographs than a fleet's.

    python -m benchmarks.vision_pretrain --out sidestream/data/tiny_vit     # what is shipped

The same seed, steps and version of torch give the same bytes on one machine with one thread.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.program import run_program
from sidestream.backbone.runtimes import load_backbone
from sidestream.contract.tasks import Task
from sidestream.demo.pictures import MARKS, OUTER, SIGNS, every_sign, picture

SIDE = 32
_PICTURES = 4096
_BATCH = 32
_TELL_EVERY = 100


def config() -> transformers.ViTConfig:
    """Four layers of width 64; an image is 4 x 4 patches."""
    return transformers.ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=SIDE,
        patch_size=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def lessons(
    processor: transformers.ViTImageProcessor, count: int, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [N, 3, H, W] of signs that the demo has not, and for each its shape and mark [N, 2]."""
    signs = [sign for sign in every_sign() if sign not in SIGNS]
    chosen = [signs[index] for index in rng.integers(len(signs), size=count)]
    pixels = processor([picture(sign, rng) for sign in chosen], return_tensors="pt")["pixel_values"]
    parts = [sign.split("-") for sign in chosen]
    return pixels, torch.tensor([[list(OUTER).index(outer), MARKS.index(mark)] for outer, mark in parts])


def teach(
    steps: int, seed: int, pictures: int = _PICTURES
) -> tuple[transformers.ViTModel, transformers.ViTImageProcessor]:
    """The model, and its image processor."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    processor = transformers.ViTImageProcessor(size={"height": SIDE, "width": SIDE})
    model = transformers.ViTModel(config(), add_pooling_layer=False)
    heads = nn.ModuleList([nn.Linear(64, len(OUTER)), nn.Linear(64, len(MARKS))])
    pixels, truth = lessons(processor, pictures, rng)
    weights = [*model.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.05)
    plan = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps, pct_start=0.1)
    began, losses = time.monotonic(), list[float]()
    for step in range(1, steps + 1):
        rows = torch.from_numpy(rng.integers(pictures, size=_BATCH))
        pooled = model(pixel_values=_varied(pixels[rows], rng)).last_hidden_state.mean(dim=1)
        parts = [nn.functional.cross_entropy(head(pooled), truth[rows, at]) for at, head in enumerate(heads)]
        loss = torch.stack(parts).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        plan.step()
        losses.append(loss.item())
        if step % _TELL_EVERY == 0:
            mean, took_s = np.mean(losses[-_TELL_EVERY:]), time.monotonic() - began
            print(f"step {step} of {steps}: loss {mean:.3f}, {took_s:.0f} s", flush=True)
    return model, processor


def _varied(pixels: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """The same pictures, moved a little, mirrored perhaps, and in other colours."""
    down, right = (int(value) for value in rng.integers(-2, 3, size=2))
    pixels = torch.roll(pixels, (down, right), dims=(2, 3))[:, torch.from_numpy(rng.permutation(3))]
    return pixels.flip(3) if rng.random() < 0.5 else pixels


def main(argv: list[str] | None = None) -> int:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vision_pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--steps", type=int, default=1200, metavar="N", help="updates (default: 1200)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pictures (default: 0)")
    return run_program(parser, written, argv)


def written(args: argparse.Namespace) -> str:
    """Teach, and write the folder."""
    torch.set_num_threads(1)
    model, processor = teach(args.steps, args.seed)
    model.half().save_pretrained(args.out)
    processor.save_pretrained(args.out)
    backbone = load_backbone(str(args.out), task=Task.IMAGE_CLASSIFICATION)
    return f"wrote {args.out}: {backbone.depth} layers of width {backbone.width}, {backbone.fingerprint[:8]}…"


if __name__ == "__main__":
    raise SystemExit(main())
