"""``sidestream agent samples`` and ``agent label``: samples that came without a label, and labels for them.

Both work beside a running agent and while it is stopped: they open its database as it does.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_agent.store.outbox_file import FILE_NAME, as_state_error
from edge_agent.store.unlabelled import SCHEMA, Listed, UnlabelledStore, staying
from sidestream.backbone import inputs
from sidestream.contract.errors import DataError, StateError
from sidestream.contract.tasks import TASKS, Task
from sidestream.host.commands import Handler, add_command
from sidestream.host.logs import set_up
from sidestream.service.state_choice import add_state_dir

if TYPE_CHECKING:
    from edge_agent.answers.answer import Answer

_AT_ONCE: Final = 64
_BUSY_S: Final = 30.0
_NAMED: Final = 20  # labels of the job that an error lists

_SAMPLES_HELP: Final = """\
List the samples that came to this device without a label: id, status, label, text. Also while the agent runs.

    sidestream agent samples --state-dir ~/.local/state/sidestream/agent/support-intents
    sidestream agent samples --state-dir DIR --unlabelled --predict
    sidestream agent samples --state-dir DIR --json

Status: waiting (no label yet), labelled (one came, and is not taken up yet), sent (in a batch with it),
evaluation (it measures with its label, and never leaves the device), refused (its label is of no use).
--predict shows what the adopted weights answer, from activations that are kept: the backbone is not run.
"""

_LABEL_HELP: Final = """\
Give a sample that came without a label its label, by the id that "sidestream agent samples" lists. A running
agent takes it up within seconds, a stopped one when it starts; no forward pass is made. Until then the last
label counts; afterwards it cannot be taken back.

    sidestream agent label bcdfghjk lights_on --state-dir DIR
    sidestream agent label --file labels.csv --state-dir DIR

A label is written as in the data: a name; names as JSON or with | between (multi-label); a number
(regression); a JSON list with a name for each word (token classification). The file is CSV, TSV or JSON lines
with id and label.
"""


def add_samples(commands: Any) -> None:
    """Add ``samples``."""
    parser = _command(commands, "samples", samples, "list samples that came without a label", _SAMPLES_HELP)
    parser.add_argument("--unlabelled", action="store_true", help="only those that still have none")
    parser.add_argument("--predict", action="store_true", help="with what the adopted weights answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def add_label(commands: Any) -> None:
    """Add ``label``."""
    parser = _command(commands, "label", label, "give such a sample its label", _LABEL_HELP)
    parser.add_argument("id", metavar="ID", nargs="?", help="the sample's id")
    parser.add_argument("label", metavar="LABEL", nargs="?", help="its label")
    parser.add_argument("--file", metavar="FILE", type=Path, help="read rows of id and label from here")


def _command(commands: Any, name: str, handler: Handler, text: str, about: str) -> argparse.ArgumentParser:
    parser = add_command(commands, name, handler, text, about)
    add_state_dir(parser, "agent")
    return parser


# --- samples ---------------------------------------------------------------------------------------------


def samples(args: argparse.Namespace) -> int:
    """Print the samples."""
    set_up("warning")
    with _unlabelled_store(args.state_dir) as store:
        listed = store.list(unlabelled=args.unlabelled)
    answers = _Answers(args.state_dir) if args.predict else None
    for start in range(0, len(listed), _AT_ONCE):
        some = listed[start : start + _AT_ONCE]
        found = answers.of(some) if answers is not None else {}
        for one in some:
            print(_as_json(one, found) if args.json else _as_line(one, found, predicted=args.predict))
    if not listed and not args.json:
        print("no sample waits for a label" if args.unlabelled else "no sample came without a label")
    return 0


class _Answers:
    """What the adopted weights answer, from kept activations."""

    def __init__(self, state_dir: Path) -> None:
        from edge_agent.weights.adopted import load_adopted
        from edge_agent.weights.codebooks import require_codebooks
        from sidestream.side_network.inference import InferenceNetwork

        kept = load_adopted(state_dir)
        if kept is None:
            raise StateError(
                f"{state_dir}: no weights have been adopted yet; list the samples without --predict"
            )
        self._state_dir = state_dir
        self._tier = kept.adopted.tier_plan
        require_codebooks(self._tier, state_dir, kept.adopted.backbone)
        self._about = kept.bundle.about
        self._network = InferenceNetwork(kept.bundle)

    def of(self, listed: Sequence[Listed]) -> dict[str, Answer]:
        """By id; those only whose activations are still kept, and fit the weights."""
        from edge_agent.answers.answer import answers_of
        from edge_agent.batches import coded as kept

        with _unlabelled_store(self._state_dir) as store:
            blobs = store.activations([one.id for one in listed], kept.made_by(self._tier, self._about.task))
        known = [one for one in listed if one.id in blobs]
        if not known:
            return {}
        sampled = kept.sampled_of([kept.read(blobs[one.id]) for one in known])
        numbers = self._network.predict(self._tier.align, sampled.vectors, sampled.lengths)
        texts = [one.row.input for one in known]
        task, labels, scale = self._about.task, self._about.labels, self._network.scale
        answers = answers_of(task, labels, numbers, sampled, texts, scale)
        return {one.id: answer for one, answer in zip(known, answers, strict=True)}


def _as_json(one: Listed, found: dict[str, Answer]) -> str:
    about: dict[str, Any] = {"id": one.id, "status": one.status, "label": one.row.label}
    about.update(inputs.about(one.row.input))
    if one.reason:
        about["reason"] = one.reason
    about["held_out"] = one.held_out
    if one.id in found:
        about["prediction"] = msgspec.to_builtins(found[one.id])
    return json.dumps(about, ensure_ascii=False)


def _as_line(one: Listed, found: dict[str, Answer], *, predicted: bool) -> str:
    answer = [str(found.get(one.id, "-")).replace("\t", " ")] if predicted else []
    return "\t".join([one.id, one.status, one.row.label or "-", *answer, inputs.shown(one.row.input)])


# --- label -----------------------------------------------------------------------------------------------


def label(args: argparse.Namespace) -> int:
    """Write labels down, all of them or none."""
    set_up("warning")
    given = _given(args)
    with _unlabelled_store(args.state_dir, writes=True) as store:
        job = store.job()
        for name, text in given:
            _check(job, name, text, store.text_of(name))
            store.label(name, text)
        if job is None:
            print("the job's labels are not known here yet; the agent checks them later", file=sys.stderr)
    print(f"{len(given)} label{'s' if len(given) != 1 else ''} noted; the agent takes them up within seconds")
    return 0


def _given(args: argparse.Namespace) -> list[tuple[str, str]]:
    if (args.file is None) == (args.id is None) or (args.file is None and args.label is None):
        raise DataError("give an ID and its LABEL, or --file with rows of id and label")
    if args.file is not None:
        return _read(args.file)
    if not args.label.strip():
        raise DataError("LABEL: is empty; in multi-label classification, write [] for none of the labels")
    return [(args.id, args.label.strip())]


def _read(path: Path) -> list[tuple[str, str]]:
    """Rows of id and label; a file of columns need not have a header."""
    from edge_agent.samples.rows import Format, RowParser

    kinds: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".tsv": "tsv"}
    kind = kinds.get(path.suffix.lower(), "csv")
    separator = {"csv": b",", "tsv": b"\t", "jsonl": b""}[kind]
    try:
        data = path.read_bytes()
    except OSError as exc:
        raise DataError(f"--file: {path} cannot be read: {exc.strerror}") from exc
    first = data.removeprefix(b"\xef\xbb\xbf").partition(b"\n")[0]
    header = [cell.strip(b' "\r') for cell in first.split(separator or None)]
    parser = RowParser(f"--file: {path}", kind, "id", "label")
    if kind != "jsonl" and b"id" not in header:
        list(parser.feed(separator.join([b"id", b"label"]) + b"\n"))
    try:
        rows = list(parser.feed(data, final=True))
    except DataError as exc:
        raise DataError(f"--file: {path} needs an id and a label in every row") from exc
    if parser.broken or not rows:
        raise DataError(
            f"--file: {path} has {parser.broken or 'no'} rows that cannot be used; nothing is noted"
        )
    if empty := next((row.text for row in rows if row.label is None), None):
        raise DataError(f"--file: {path}: sample {empty[:40]!r} has no label; nothing is noted")
    return [(row.text.strip(), row.label or "") for row in rows]


def _check(job: tuple[Task, Sequence[str]] | None, name: str, label: str, text: str) -> None:
    """Hold a label against the job, as the agent will."""
    from edge_agent.batches.targets import Unusable, names_in, targets_of

    if job is None:
        return
    task, labels = job
    try:
        targets_of(task, labels).read(label, text)
    except Unusable as exc:
        strange = [one for one in names_in(task, label) if one not in labels]
        hint = _labels_hint(labels, strange) if TASKS[task].named else ""
        raise DataError(f"sample {name}: {exc}{hint}") from exc


def _labels_hint(labels: Sequence[str], strange: Sequence[str]) -> str:
    near = [found for one in strange for found in difflib.get_close_matches(one, labels, 1)]
    nearest = f"; did you mean {near[0]!r}?" if near else ";"
    more = ", …" if len(labels) > _NAMED else ""
    return f"{nearest} the job's labels: {', '.join(labels[:_NAMED])}{more}"


@contextmanager
def _unlabelled_store(state_dir: Path, *, writes: bool = False) -> Iterator[UnlabelledStore]:
    """The unlabelled store of an agent that may be running; what is written stands once this is left.

    Raises:
        StateError: there is none, or it cannot be read or written to.
    """
    folder = state_dir.expanduser()
    path = folder / FILE_NAME
    if not path.is_file():
        raise StateError(f"{folder}: no agent has run with this state directory")
    with (
        as_state_error(path),
        staying(folder, alone=False),
        closing(sqlite3.connect(path, isolation_level=None, timeout=_BUSY_S)) as db,
    ):
        db.executescript(SCHEMA)
        db.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
        yield UnlabelledStore(db)
        db.execute("COMMIT")
