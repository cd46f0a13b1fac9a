"""``sidestream trainer verify``: what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.state import cell_dirs
from sidestream.contract.errors import ConfigError

if TYPE_CHECKING:
    from side_trainer.operator.audit import Verdict


def _outcome(verdict: Verdict) -> str:
    """In words."""
    if verdict.exact:
        return "the digest matches"
    if not verdict.elsewhere:
        return "THE DIGEST DIFFERS: these are not the journal's weights"
    apart = f"the weights lie {verdict.distance:.2g} apart (learnt on {verdict.elsewhere}: other bits)"
    if verdict.matches:
        return f"{apart}: within what is tolerated"
    return f"{apart}: MORE THAN IS TOLERATED, these are not the journal's weights"


def verify(args: argparse.Namespace) -> int:
    """Say whether the journal gives the checkpoint's weights."""
    if args.cells is not None:
        return _verify_cells(args)
    from side_trainer.operator.audit import verify as refold

    verdict = refold(args.state_dir, threads=args.threads, tell=_on_stderr)
    _show(verdict)
    return 0 if verdict.matches else 1


def _verify_cells(args: argparse.Namespace) -> int:
    config = SettingsFile(args.cells, {}).load()
    if not config.cells:
        raise ConfigError("--cells", f"{args.cells} has no [[cells]]; leave --cells out")
    from side_trainer.operator.audit_cells import verify_cells

    names = [cell.name for cell in config.cells]
    verdicts = verify_cells(names, cell_dirs(config), threads=args.threads, tell=_on_stderr)
    for name, verdict in zip(names, verdicts, strict=True):
        print(f"cell {name}")
        _show(verdict)
    return 0 if all(verdict.matches for verdict in verdicts) else 1


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def _show(verdict: Verdict) -> None:
    print(f"records {verdict.offset}, samples {verdict.samples}")
    print(f"checkpoint {verdict.checkpoint_digest}")
    print(f"re-fold    {verdict.refold_digest}")
    if verdict.begun_at:
        print(f"from the snapshot at record {verdict.begun_at} on: what came before is not kept any more")
    if verdict.unverified:
        print(f"not verified: {verdict.unverified}")
    if verdict.held_batches:
        print(f"{verdict.held_batches} batches of quarantined devices are held, as they came")
    print(_outcome(verdict))
