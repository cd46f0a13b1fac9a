"""A language model adapted to other text, on devices and otherwise: perplexity and cost in one table.

    python benchmarks/lm.py --pretrain wikitext2_valid.txt wikitext2_test.txt --adapt tinyshakespeare.txt

First a small decoder is pretrained on the one text (once: it is cached), then it is adapted to the other,
whose last tenth is held out. Rows: ``frozen``, the model as it is; ``fleet``, real agents on disjoint parts
of the text and the real trainer; ``central``, the same from one device that has all of it; ``lora``, r = 8 on
attention, and ``full``, every weight, both on one machine that has all of it; ``split-lora`` and
``split-frozen``, the methods that split the model, as benchmarks/split_accuracy.py runs them. Perplexity is a
token's, over the same windows for all. Device CPU seconds are summed over all devices, memory is measured in
a process of its own, bytes are payloads.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.lm_data import read_lm_workload, trainer_settings
from benchmarks.lm_pretrain import PretrainSettings, pretrained, read_text
from benchmarks.lm_rows import ROWS, LmBench, LmOptions
from benchmarks.lm_table import LmMeasured, fleet_over_central, gap_closed, lm_table
from benchmarks.program import Tell, names_of, run_program, teller
from benchmarks.result import about_this_run, write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(args.threads)
    about, tell = about_this_run(), teller()
    read_text(args.adapt)  # what may be wrong, before anything that takes long
    trainer_settings("none yet", args.max_tokens, dict(args.set))
    backbone, model = _model(args, tell)
    work = read_lm_workload(
        args.adapt, backbone=backbone, devices=args.devices, max_tokens=args.max_tokens, share=args.share
    )
    torch.set_num_threads(1)
    options = LmOptions(
        lora_epochs=args.lora_epochs,
        lora_rate=args.lora_rate,
        full_epochs=args.full_epochs,
        full_rate=args.full_rate,
        settings=dict(args.set),
        memory=not args.no_memory,
    )
    results: list[LmMeasured] = []
    with tempfile.TemporaryDirectory(prefix="sidestream-lm-") as folder:
        bench = LmBench(work, options, Path(folder), tell)
        tell(f"{bench.tokens:,} tokens to adapt to, on {args.devices} devices")
        for seed in args.seeds:
            for row in args.rows:
                if row == "frozen" and seed != args.seeds[0]:
                    continue
                results.append(measured := bench.run(row, seed))
                tell(f"{row}, seed {seed}: perplexity {measured.perplexity:.2f}, {measured.wall_s:.0f} s")
                if args.json:
                    _write(args, about, model, bench.tokens, results)
    return lm_table(results)


def _model(args: argparse.Namespace, tell: Tell) -> tuple[str, dict[str, Any]]:
    """The frozen model's folder, and what is known of how it came to be."""
    if args.backbone:
        return args.backbone, {"backbone": args.backbone}
    settings = PretrainSettings(
        minutes=args.pretrain_minutes,
        vocabulary=args.vocabulary,
        width=args.width,
        layers=args.layers,
        heads=max(1, args.width // 64),
        inner=args.width * 11 // 4,
    )
    folder, report = pretrained(args.pretrain, settings, args.cache, tell)
    return str(folder), {"settings": msgspec.to_builtins(settings), "report": msgspec.to_builtins(report)}


def _write(
    args: argparse.Namespace, about: Any, model: dict[str, Any], tokens: int, results: list[LmMeasured]
) -> None:
    write_json(
        args.json,
        about,
        {
            "settings": {
                key: [str(one) for one in value] if key == "pretrain" else str(value)
                for key, value in vars(args).items()
                if key != "json" and value is not None
            },
            "model": model,
            "tokens": tokens,
            "results": [asdict(one) for one in results],
            "gap_closed": {one.row: gap_closed(results, one.row) for one in results},
            "fleet_over_central": fleet_over_central(results),
        },
    )


def _setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME=VALUE")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lm", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--pretrain", type=Path, nargs="+", metavar="FILE", help="plain text to pretrain on")
    source.add_argument("--backbone", metavar="MODEL", help="adapt this model instead of pretraining one")
    add("--adapt", type=Path, required=True, metavar="FILE", help="plain text to adapt to")
    add("--devices", type=int, default=8, help="that the text is dealt out to")
    add("--rows", type=names_of(ROWS), default=",".join(ROWS), metavar="ROW,…", help=", ".join(ROWS))
    add("--seeds", type=int, nargs="+", default=[0], help="of the order and the learner")
    add("--share", type=float, default=1.0, help="adapt to so much of the text only")
    add("--max-tokens", type=int, default=128, help="tokens of a window")
    add("--pretrain-minutes", type=float, default=6.0, help="processor time, all threads together")
    add("--vocabulary", type=int, default=4096, help="of the tokenizer")
    add("--width", type=int, default=256, help="hidden size of the model, a multiple of 64 or less")
    add("--layers", type=int, default=6, help="depth of the model")
    add("--threads", type=int, default=2, help="of pretraining; everything else has one")
    add("--cache", type=Path, default=Path.home() / ".cache" / "sidestream", help="for pretrained models")
    add("--lora-epochs", type=float, default=3.0, help="of LoRA")
    add("--lora-rate", type=float, default=8e-3, help="learning rate of LoRA")
    add("--full-epochs", type=float, default=3.0, help="of full fine-tuning")
    add("--full-rate", type=float, default=5e-4, help="learning rate of full fine-tuning")
    add(
        "--set",
        type=_setting,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="of the trainer, such as learner.passes=3 or tier.codec=int4",
    )
    add("--no-memory", action="store_true", help="do not measure memory")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
