"""``sidestream demo``: its arguments. The demo itself, and torch with it, is imported when it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from sidestream.contract.errors import ConfigError
from sidestream.contract.tasks import TASKS, Task
from sidestream.host.commands import add_command
from sidestream.host.logs import set_up
from sidestream.host.signals import stop_event
from sidestream.host.state_dir import make_private

_HELP: Final = """\
Run a whole fleet on this machine: a broker, a trainer, and agents on frozen backbones of three sizes, each
with its own share of the data. Watch it learn, and see what it cost.

  sidestream demo                                       the shipped commands, 24 intents
  sidestream demo --data train.csv --eval test.csv      your own texts and labels
  sidestream demo --devices 6 --alpha 0.1 --seed 3      fewer devices, more skewed
  sidestream demo --images --devices 6                  images: generated signs, a tiny vision transformer
  sidestream demo --method mobillm                      one device, and a timeline of it with --trace FILE
  sidestream demo --method split-lora                   LoRA on the first layers, split between both ends
  sidestream demo --keep /tmp/fleet                     keep everything, then try
      sidestream agent predict --state-dir /tmp/fleet/devices/full-01/state "dim the lights"
"""


_DEVICES: Final = {"fed-mobillm": 12, "mobillm": 1, "split-lora": 12, "split-frozen": 12}
"""By method: how many agents."""


def add_parser(subparsers: Any) -> None:
    """Add ``demo``; the handler arrives as ``args.handler``."""
    parser = add_command(subparsers, "demo", run, "run a whole fleet on this machine", _HELP)
    add = parser.add_argument
    add(
        "--devices",
        type=int,
        metavar="N",
        help="agents, dealt out to three tiers (default: 12; with --method mobillm, 1)",
    )
    add(
        "--method",
        choices=list(_DEVICES),
        default="fed-mobillm",
        help="fed-mobillm: a fleet, a side-network; mobillm: one device, all its tokens; split-lora: devices "
        "hold the first layers with LoRA, and are answered with gradients; split-frozen: without gradients "
        "(default: fed-mobillm; docs/methods.md compares them)",
    )
    add(
        "--images",
        action="store_true",
        help="the samples are images: --task image-classification, on a tiny vision transformer that is "
        "shipped; without --data, generated signs",
    )
    add("--data", default="", metavar="TRAIN", help="training data: JSONL, CSV or TSV; a folder of images")
    add("--eval", default="", metavar="EVAL", help="evaluation data, in the same columns")
    add("--text-column", default="text", metavar="NAME", help="column of the texts (default: text)")
    add("--label-column", default="label", metavar="NAME", help="column of the labels (default: label)")
    add(
        "--text-pair-column",
        default="text_pair",
        metavar="NAME",
        help="column of the second texts of pairs, where there is one (default: text_pair)",
    )
    add(
        "--task",
        choices=[task.value for task in Task if not TASKS[task].generates],
        default=Task.TEXT_CLASSIFICATION.value,
        help="what to learn (default: text-classification); see docs/tasks.md for the data that each takes",
    )
    add(
        "--alpha", type=float, default=0.5, help="Dirichlet label skew; smaller is more skewed (default: 0.5)"
    )
    add("--seed", type=int, default=0, help="of the deal and the learner (default: 0)")
    add("--max-samples", type=int, default=0, metavar="N", help="use only N training samples (default: all)")
    add("--broker", default="", metavar="URL", help="use this broker (default: an embedded one)")
    add("--metrics-port", type=int, default=0, metavar="PORT", help="for the metrics (default: a free one)")
    add("--keep", type=Path, metavar="DIR", help="keep settings, data, state and logs in this new folder")
    add("--trace", type=Path, metavar="FILE", help="write a timeline of it all, for ui.perfetto.dev")
    add("--json", type=Path, metavar="FILE", help="write the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its report."""
    devices = _DEVICES[args.method] if args.devices is None else args.devices
    if not 1 <= devices <= 500:
        raise ConfigError("--devices", f"{devices} is not 1 to 500")
    if not 0.001 <= args.alpha <= 1e6:
        raise ConfigError("--alpha", f"{args.alpha:g} is not 0.001 to 1000000")
    if args.seed < 0 or args.max_samples < 0:
        raise ConfigError("--seed" if args.seed < 0 else "--max-samples", "must not be negative")
    for flag, path in (("--json", args.json), ("--trace", args.trace)):
        if path is not None and not path.absolute().parent.is_dir():
            raise ConfigError(flag, f"there is no folder {path.absolute().parent}")
    task = Task.IMAGE_CLASSIFICATION if args.images else Task(args.task)
    if args.images and args.task not in (Task.TEXT_CLASSIFICATION.value, task.value):
        raise ConfigError("--images", f"does not go with --task {args.task}; leave that out")
    set_up("warning")
    from sidestream.demo.files import DemoSettings
    from sidestream.demo.report import to_json, to_table
    from sidestream.demo.run import Demo

    settings = DemoSettings(
        devices=devices,
        method=args.method,
        train=args.data,
        evaluation=args.eval,
        text_column=args.text_column,
        label_column=args.label_column,
        text_pair_column=args.text_pair_column,
        task=task,
        alpha=args.alpha,
        seed=args.seed,
        max_samples=args.max_samples,
        broker=args.broker,
        metrics_port=args.metrics_port,
        trace=args.trace is not None,
    )
    with _folder(args.keep) as folder, stop_event() as stop:
        demo = Demo(settings, folder, lambda line: print(line, flush=True))
        report = demo.run(stop)
        if args.trace is not None:
            _write_json("--trace", args.trace, demo.timeline())
    print("\n" + to_table(report))
    if args.json is not None:
        _write_json("--json", args.json, to_json(report))
    if args.keep is not None:
        print(f"\nkept in {args.keep}; try")
        asked = f"{args.keep}/images/eval/*/000.png" if args.images else '"dim the lights"'
        print(f"  sidestream agent predict --state-dir {args.keep}/devices/full-01/state {asked}")
        print(f"  sidestream trainer verify --state-dir {args.keep}/trainer")
    return 0 if report.lost == 0 and report.duplicated == 0 else 1


def _write_json(flag: str, path: Path, content: object) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except OSError as exc:
        raise ConfigError(flag, f"cannot write {path}: {exc.strerror or exc}") from exc


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to keep, or a temporary one."""
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="sidestream-demo-") as folder:
            yield Path(folder)
        return
    if keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        raise ConfigError("--keep", f"{keep} is there already and not empty; name a new folder")
    try:
        make_private(keep)
    except OSError as exc:
        raise ConfigError("--keep", f"cannot make {keep}: {exc.strerror or exc}") from exc
    yield keep.absolute()
