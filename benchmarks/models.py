"""Which of transformers' text models can be backbones: each built tiny, and taken or refused as agents do.

    python -m benchmarks.models                        # print the table
    python -m benchmarks.models --write docs/models.md # put it where docs/models.md has it

What works has passed the agent's own trial; tests/agent/test_models.py compares it once more, by other code.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.program import run_program
from benchmarks.zoo import build, is_language_model, text_models, tokenizer
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.torch_runtime.layer_stack import REMEDY
from sidestream.contract.errors import BackboneError

CUT: Final = 2
"""Layers that a truncated model keeps, of four."""
_BEGIN: Final = "<!-- made by python -m benchmarks.models --write docs/models.md -->"
_END: Final = "<!-- end -->"
_HEAD: Final = (
    "| model type | class | backbone | its first layers | `causal-lm` | why not |\n|---|---|---|---|---|---|"
)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of one model type."""

    kind: str
    """As ``model_type`` stands in config.json."""
    made: str
    """The class."""
    whole: str
    """``works`` or ``refused``: as a backbone for texts."""
    cut: str
    """Likewise with ``layers`` set."""
    decoder: str
    """Likewise in a ``causal-lm`` job; ``none`` where transformers has no such class."""
    why: str = ""
    """The first reason there was."""

    def row(self) -> str:
        """Of the table."""
        why = self.why.replace("|", "/")
        return f"| {self.kind} | {self.made} | {self.whole} | {self.cut} | {self.decoder} | {why} |"


def judge(kind: str) -> Verdict | None:
    """Take a model type or refuse it; None if it cannot be built tiny."""
    model = build(kind)
    if model is None:
        return None
    whole, why = _attempt(lambda: TorchBackbone(model, tokenizer(), name=kind))
    uncut = build(kind)
    assert uncut is not None
    cut, why_cut = _attempt(lambda: TorchBackbone(uncut, tokenizer(), layers=CUT, name=kind))
    decoder, why_decoder = "none", ""
    if is_language_model(kind) and (headed := build(kind, head=True)) is not None:
        decoder, why_decoder = _attempt(lambda: TorchLanguageModel(headed, tokenizer(), name=kind))
    reason = _brief(why, kind)
    if not why and why_cut:
        reason = f"cut: {_brief(why_cut, kind)}"
    elif not why and why_decoder:
        reason = f"`causal-lm`: {_brief(why_decoder, kind)}"
    made = type(model).__name__
    return Verdict(kind=kind, made=made, whole=whole, cut=cut, decoder=decoder, why=reason)


def table(verdicts: Iterable[Verdict]) -> str:
    """How many work, and one row for each."""
    rows = list(verdicts)
    works = sum(one.whole == "works" for one in rows)
    decoders = sum(one.decoder == "works" for one in rows)
    said = (
        f"Of {len(rows)} model types {works} work as backbones and {len(rows) - works} are refused; "
        f"{decoders} work in `causal-lm` jobs."
    )
    return "\n".join([said, "", _HEAD, *(one.row() for one in rows)])


def rows_of(page: Path) -> dict[str, list[str]]:
    """The cells of a page's table, by model type."""
    lines = [line for line in _parts(page)[1].splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {one[0]: one for one in cells}


def write(page: Path, made: str) -> None:
    """Put a table where the page has one."""
    before, _, after = _parts(page)
    page.write_text(f"{before}{_BEGIN}\n\n{made}\n\n{_END}{after}")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", type=Path, help="the page to put the table into")
    parser.add_argument("kinds", nargs="*", help="model types; all that there are")
    return run_program(parser, _run, argv)


def _run(args: argparse.Namespace) -> str:
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(1)
    verdicts = [verdict for kind in args.kinds or text_models() if (verdict := judge(kind)) is not None]
    made = table(verdicts)
    if args.write is None:
        return made
    write(args.write, made)
    return f"{args.write}: {len(verdicts)} rows"


def _attempt(load: Callable[[], Any]) -> tuple[str, str]:
    try:
        load()
    except BackboneError as exc:
        return "refused", str(exc)
    return "works", ""


def _brief(why: str, kind: str) -> str:
    """Without the name before it and the remedy after it."""
    brief = why.removeprefix(f"{kind}: ").removesuffix(f"; {REMEDY}")
    _, found, reason = brief.partition(" cannot be a backbone here: ")
    return reason if found else brief


def _parts(page: Path) -> tuple[str, str, str]:
    """What stands before the table, the table, and what stands after it."""
    before, _, rest = page.read_text().partition(_BEGIN)
    made, _, after = rest.partition(_END)
    return before, made, after


if __name__ == "__main__":
    raise SystemExit(main())
