"""What was chosen for single devices, from a trainer's state directory. Safe beside a running trainer."""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from side_trainer.journal.records import AssignmentRecord, RecordKind
from side_trainer.operator.status import open_journal
from sidestream.contract.wire import prepared
from sidestream.host.commands import add_command
from sidestream.service.state_choice import add_state_dir

_TUNING_HELP: Final = """\
Print what autotune chose for each device, why, and which devices would do better in another tier. The trainer
applies batch size, token limit and way to send by itself. A move to another tier is advice, with what to do:
the broker's access list and the device's own outbox hold it to its tier.
"""


@prepared
class Chosen(msgspec.Struct, frozen=True, kw_only=True):
    """One choice, with its place in the journal."""

    offset: int
    """Of its record."""
    choice: AssignmentRecord
    """What it says."""


def chosen(state_dir: Path, device: str = "") -> list[Chosen]:
    """The choice in force for each device; of one device all there were, the oldest first.

    Raises:
        StateError: there is no journal.
    """
    with contextlib.closing(open_journal(state_dir)) as journal:
        found = [
            Chosen(offset=record.offset, choice=msgspec.json.decode(record.payload, type=AssignmentRecord))
            for record in journal.others(journal.tail, (RecordKind.ASSIGNMENT.value,))
        ]
    if device:
        return [one for one in found if one.choice.device == device]
    last = {(one.choice.tier, one.choice.device): one for one in found}
    return [last[key] for key in sorted(last)]


def in_words(found: Iterable[Chosen]) -> Iterator[str]:
    """Choices for people, with what to do where a move is advised."""
    for one in (each.choice for each in found):
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.unix_s))
        setting = f"batches of {one.batch_size}, {one.max_tokens} tokens, {one.sampling} {one.codec.value}"
        yield f"{one.device:24} {one.tier:12} since {since}  {setting}  ({one.why})"
        if one.advised != one.tier:
            yield f"  would do better in tier {one.advised}. Where the fleet folder is, if there is one:"
            yield f"    sidestream fleet add-device FLEET {one.device} --tier {one.advised} --again"
            yield f'  on the device, once its outbox is empty: tier = "{one.advised}" and another state_dir'
            yield "  in agent.toml, for an outbox stays in its tier. Rows still in its source are sent again."


def add_tuning(commands: Any) -> None:
    """Add ``trainer tuning``."""
    parser = add_command(
        commands, "tuning", show, "print what autotune chose for single devices", _TUNING_HELP
    )
    add_state_dir(parser, "trainer")
    text = "all that was ever chosen for this device, and why"
    parser.add_argument("--device", metavar="NAME", default="", help=text)
    parser.add_argument("--json", action="store_true", help="print JSON")


def show(args: argparse.Namespace) -> int:
    """Print what was chosen."""
    found = chosen(args.state_dir, args.device)
    if args.json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
        return 0
    for line in in_words(found):
        print(line)
    if not found:
        print("nothing was chosen" + (f" for {args.device}" if args.device else "; is autotune on?"))
    return 0
