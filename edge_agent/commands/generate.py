"""``sidestream agent generate``: text from the decoder with the weights that this device's agent adopted."""

from __future__ import annotations

import argparse
import sys
from typing import Any, Final

from edge_agent.config import AgentConfig
from sidestream.contract.errors import DataError
from sidestream.host.commands import add_command
from sidestream.host.logs import set_up
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config
from sidestream.service.state_choice import add_state_dir

_HELP: Final = """\
Go on from a prompt with the weights that this device's agent adopted last, and print the text as it comes.
Needs no broker and no network. Without --temperature the likeliest token is taken every time.

    sidestream agent generate --state-dir ~/.local/state/sidestream/agent/assistant "To be, or"
    sidestream agent generate --state-dir DIR --temperature 0.8 --top-p 0.95 --seed 1 --stop "\\n" "To be, or"
    echo "To be, or" | sidestream agent generate --state-dir DIR --max-tokens 40
"""


def add_generate(commands: Any) -> None:
    """Add ``generate``."""
    parser = add_command(commands, "generate", generate, "go on from a prompt, offline", _HELP)
    parser.add_argument("prompt", metavar="PROMPT", nargs="?", help="the prompt (default: standard input)")
    add_adopted(parser)
    parser.add_argument(
        "--frozen", action="store_true", help="use the decoder alone, as it was before, to compare with"
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=128, help="so many tokens (default: 128)"
    )
    parser.add_argument(
        "--temperature", metavar="T", type=float, default=0.0, help="0, the default: take the likeliest token"
    )
    parser.add_argument("--top-k", metavar="K", type=int, default=0, help="draw only from the K likeliest")
    parser.add_argument(
        "--top-p", metavar="P", type=float, default=1.0, help="draw only from the likeliest that add up to P"
    )
    parser.add_argument("--seed", metavar="N", type=int, help="the same seed draws the same tokens")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated"
    )


def add_adopted(parser: argparse.ArgumentParser) -> None:
    """Add what names the weights that an agent adopted, and the backbone that they go with."""
    add_state_dir(parser, "agent")
    parser.add_argument(
        "--backbone", metavar="REFERENCE", default="", help="where the backbone is now, if it has moved"
    )


def generate(args: argparse.Namespace) -> int:
    """Print the prompt's continuation, piece by piece."""
    set_up("warning")
    prompt = args.prompt if args.prompt is not None else _read(sys.stdin)
    from edge_agent.answers.predictor import load

    whole = "auto" if args.config is None else load_config(AgentConfig, args.config).whole_model
    pieces = load(args.state_dir, backbone=args.backbone, whole_model=whole).stream(
        prompt,
        frozen=args.frozen,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop=tuple(stop.replace("\\n", "\n") for stop in args.stop),
    )
    with stop_event() as stopped:
        for piece in pieces:
            print(piece, end="", flush=True)
            if stopped.is_set():
                break
    print()
    return 0


def _read(source: Any) -> str:
    try:
        text: str = source.read()
    except UnicodeDecodeError as exc:
        raise DataError("standard input: the prompt is not UTF-8") from exc
    return text.removesuffix("\n")
