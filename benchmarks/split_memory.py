"""What split LoRA costs in memory and processor time: a device by its cut, and the trainer by its devices.

    python benchmarks/split_memory.py --json benchmarks/out/split_memory.json

Random weights of the real classes, one thread, each measurement in a process of its own. A device is held
against the same LoRA on the whole model, the trainer against a submodel for each device, all under way at
once. Compare the ratios: they are taken within a run, and hold on other machines better than the figures do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.probe import Request, measure
from benchmarks.program import Tell, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.shapes import SHAPES, random_texts
from benchmarks.split_server import ServerCost, ServerRequest, measure_server
from benchmarks.steps import CUTS
from benchmarks.table import render

_WHOLE: Final = "lora-plain"
_MORE: Final = 10
"""As many devices again, to see what one costs."""
_DEVICE: Final = (
    "shape",
    "tokens",
    "form",
    "CPU ms/sample",
    "of LoRA's",
    "peak MB",
    "of LoRA's",
    "loaded MB",
)
_TRAINER: Final = ("trainer", "devices", "loaded MB", "peak MB", "of submodels'")
_MB: Final = 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    about, tell = about_this_run(), teller()
    devices = [
        entry for shape in args.shapes for tokens in args.seq for entry in _device(args, shape, tokens, tell)
    ]
    trainer = _trainer(args, tell)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(args.json, about, {"settings": settings, "devices": devices, "trainer": trainer})
    return f"{_device_table(devices)}\n\n{_trainer_table(trainer)}"


def _device(args: argparse.Namespace, shape: str, tokens: int, tell: Tell) -> list[dict[str, Any]]:
    """One entry a form, the whole model first."""
    entries: list[dict[str, Any]] = []
    for method in (_WHOLE, *CUTS):
        request = Request(
            method=method,
            batches=[random_texts(args.batch, tokens + 1)] * (args.steps + 1),
            max_tokens=tokens,
            shape=shape,
        )
        cost = measure(request)
        whole = entries[0] if entries else msgspec.to_builtins(cost)
        entries.append(
            {
                "shape": shape,
                "tokens": tokens,
                "form": method,
                **msgspec.to_builtins(cost),
                "cpu_of_lora": cost.cpu_s_per_sample / whole["cpu_s_per_sample"],
                "peak_of_lora": cost.peak_bytes / max(1, whole["peak_bytes"]),
            }
        )
        tell(f"{shape}, {tokens} tokens, {method}: {cost.peak_bytes / _MB:.0f} MB")
    return entries


def _trainer(args: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    cuts = list(args.cuts)

    def cost(form: str, cuts: list[int]) -> ServerCost:
        request = ServerRequest(
            form=form, shape=args.trainer_shape, cuts=cuts, batch=args.batch, tokens=args.trainer_seq
        )
        found = measure_server(request)
        tell(f"trainer, {form}, {len(cuts)} devices: {found.peak / _MB:.0f} MB")
        return found

    one, many, more = cost("one model", cuts), cost("submodels", cuts), cost("one model", cuts * (1 + _MORE))
    return {
        "shape": args.trainer_shape,
        "tokens": args.trainer_seq,
        "cuts": cuts,
        "one_model": msgspec.to_builtins(one),
        "submodels": msgspec.to_builtins(many),
        "saved": 1 - one.peak / many.peak,
        "one_model_more_devices": {"devices": len(cuts) * (1 + _MORE), **msgspec.to_builtins(more)},
        "bytes_a_device": (more.peak - one.peak) / (_MORE * len(cuts)),
    }


def _device_table(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            entry["shape"],
            str(entry["tokens"]),
            entry["form"],
            f"{1000 * entry['cpu_s_per_sample']:.1f}",
            f"{entry['cpu_of_lora']:.2f}",
            f"{entry['peak_bytes'] / _MB:.1f}",
            f"{entry['peak_of_lora']:.2f}",
            f"{entry['model_bytes'] / _MB:.0f}",
        ]
        for entry in entries
    ]
    return render(_DEVICE, rows)


def _trainer_table(trainer: dict[str, Any]) -> str:
    forms = (
        ("one model", trainer["one_model"], len(trainer["cuts"])),
        ("submodels", trainer["submodels"], len(trainer["cuts"])),
        ("one model", trainer["one_model_more_devices"], trainer["one_model_more_devices"]["devices"]),
    )
    many = trainer["submodels"]["peak"]
    rows = [
        [
            form,
            str(count),
            f"{cost['loaded'] / _MB:.0f}",
            f"{cost['peak'] / _MB:.0f}",
            f"{cost['peak'] / many:.2f}",
        ]
        for form, cost, count in forms
    ]
    return (
        f"{render(_TRAINER, rows)}\n\none model takes {100 * trainer['saved']:.1f} % less than submodels; "
        f"a device more takes {trainer['bytes_a_device'] / _MB:.3f} MB"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="split_memory", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=["minilm", "opt-125m"], help="of devices")
    add("--seq", nargs="+", type=int, default=[32, 128], help="tokens a sample, on a device")
    add("--batch", type=int, default=16, help="samples a step")
    add("--steps", type=int, default=5, help="measured, after one that is not")
    add("--trainer-shape", choices=["tiny", "minilm", "bert-base"], default="bert-base")
    add("--trainer-seq", type=int, default=64, help="tokens a sample, at the trainer")
    add("--cuts", nargs="+", type=int, default=[1, 2, 3, 4, 5, 6], help="one for each of its devices")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
