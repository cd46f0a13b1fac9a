"""``sidestream metrics``: the files that a Prometheus and a Grafana want."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from metrics.shipping import DEFAULT_TARGET, render

_RENDER_HELP: Final = """\
Write what a Prometheus and a Grafana want to watch a fleet: prometheus.yml with the trainers to scrape,
recording rules, alert rules, and a dashboard to import. docs/operations.md says what each alert means and
what to do about it.

    sidestream metrics render --out monitoring --target 192.168.1.11:9464
"""


def add_parser(subparsers: Any) -> None:
    """Add ``metrics`` with ``render``; the chosen handler arrives as ``args.handler``."""
    parser = subparsers.add_parser(
        "metrics",
        help="write scrape config, rules, alerts and dashboard",
        description="Write what a Prometheus and a Grafana want to watch a fleet.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    renders = commands.add_parser(
        "render",
        help="write the files",
        description=_RENDER_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    renders.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder to write into; made if need be"
    )
    renders.add_argument(
        "--target",
        metavar="HOST:PORT",
        action="append",
        help=f"a trainer's metrics, once for each trainer (default: {DEFAULT_TARGET})",
    )
    renders.set_defaults(handler=run_render)


def run_render(args: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    for path in render(args.out, args.target or (DEFAULT_TARGET,)):
        print(f"wrote {path}")
    print(f"try it with: prometheus --config.file={args.out / 'prometheus.yml'}")
    return 0
