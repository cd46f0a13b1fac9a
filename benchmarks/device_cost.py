"""What a training step costs a device: Sidestream's agent beside LoRA, full fine-tuning and split LoRA.

    python benchmarks/device_cost.py --shapes minilm opt-125m --seq 64 256

Methods that begin with ``lm-`` are of a language-model job: a decoder with its head, all tokens predicted.
Random weights of the real classes, one thread, each measurement in a process of its own. Compare the ratios:
they are taken within a run, and hold on other machines better than the figures do.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.lm_steps import LM_STEPS
from benchmarks.probe import Cost, ProbeError, Request, measure
from benchmarks.program import teller
from benchmarks.result import about_this_run, write_json
from benchmarks.shapes import SHAPES, random_texts
from benchmarks.steps import STEPS
from benchmarks.table import render

_COPIES: Final = {"agent": 1.3, "trainer": 1.3, "lora": 1.6, "full": 4.3, "split-lora": 1.6}
_LEAST: Final = 1.6
"""Memory that a method may need, in models: weights, gradients, the optimiser's two moments."""
_DEFAULT: Final = ["agent", "lora", "full", "split-lora"]
_ACTIVATIONS_BYTES: Final = 2**30
_HEADINGS: Final = (
    *("shape", "tokens", "method", "CPU ms/sample", "of LoRA's", "peak MiB", "of LoRA's"),
    *("up B/sample", "down B/sample", "KiB/round each way"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    args = _parser().parse_args(arguments)
    about, tell = about_this_run(), teller()
    costs: dict[tuple[str, int, str], Cost] = {}
    for shape in args.shapes:
        for tokens in args.seq:
            for method in args.methods:
                if lacking := _lacking(shape, method):
                    tell(f"{shape}, {tokens} tokens, {method}: skipped, {lacking}")
                    continue
                request = Request(
                    method=method,
                    batches=[random_texts(args.batch, tokens + 1)] * (args.steps + 1),
                    max_tokens=tokens,
                    shape=shape,
                )
                try:
                    cost = costs[shape, tokens, method] = measure(request)
                except ProbeError as exc:
                    tell(f"{shape}, {tokens} tokens, {method}: {exc}")
                    continue
                tell(
                    f"{shape}, {tokens} tokens, {method}: {1000 * cost.cpu_s_per_sample:.1f} ms a sample, "
                    f"{cost.peak_bytes / 2**20:.0f} MiB"
                )
    print(_table(costs))
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        write_json(
            args.json, about, {"settings": settings, "results": [_entry(*key, costs) for key in costs]}
        )
    return 0 if costs else 1


def _entry(shape: str, tokens: int, method: str, costs: dict[tuple[str, int, str], Cost]) -> dict[str, Any]:
    cost, lora = costs[shape, tokens, method], costs.get((shape, tokens, _lora(method)))
    return {
        "shape": shape,
        "tokens": tokens,
        "method": method,
        **msgspec.to_builtins(cost),
        "cpu_of_lora": cost.cpu_s_per_sample / lora.cpu_s_per_sample if lora else None,
        "peak_of_lora": cost.peak_bytes / lora.peak_bytes if lora and lora.peak_bytes else None,
    }


def _table(costs: dict[tuple[str, int, str], Cost]) -> str:
    rows = []
    for shape, tokens, method in costs:
        entry = _entry(shape, tokens, method, costs)
        rows.append(
            [
                shape,
                str(tokens),
                method,
                f"{1000 * entry['cpu_s_per_sample']:.1f}",
                _ratio(entry["cpu_of_lora"]),
                f"{entry['peak_bytes'] / 2**20:.0f}",
                _ratio(entry["peak_of_lora"]),
                f"{entry['up_bytes_per_sample']:,.0f}",
                f"{entry['down_bytes_per_sample']:,.0f}",
                f"{4 * entry['trainable'] / 1024:,.0f}" if entry["trainable"] else "-",
            ]
        )
    return render(_HEADINGS, rows)


def _lora(method: str) -> str:
    """What a method is held against."""
    return "lm-lora" if method in LM_STEPS else "lora"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _lacking(shape: str, method: str) -> str:
    """Why a measurement does not fit into memory, or nothing."""
    needed = 4 * SHAPES[shape][0] * _COPIES.get(method.removeprefix("lm-"), _LEAST) + (
        _ACTIVATIONS_BYTES if not shape.startswith("tiny") else 0
    )
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = 1024 * int(line.split()[1])
            return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free" if needed > free else ""
    return ""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="device_cost", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--shapes", nargs="+", choices=list(SHAPES), default=["minilm", "opt-125m", "opt-350m"])
    add("--seq", nargs="+", type=int, default=[64, 256], help="tokens a sample")
    add("--batch", type=int, default=8, help="samples a step")
    add("--steps", type=int, default=5, help="measured, after one that is not")
    add("--methods", nargs="+", choices=[*STEPS, *LM_STEPS], default=_DEFAULT)
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
