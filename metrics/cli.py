"""``sidestream metrics``: the files that a Prometheus and a Grafana want."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from metrics.shipping import DEFAULT_TARGET, DOCS, render
from sidestream.host.commands import add_command, add_group

_RENDER_HELP: Final = """\
Write what a Prometheus and a Grafana want to watch a fleet: prometheus.yml with the trainers to scrape,
recording rules, alert rules, and a dashboard to import. docs/operations.md says what each alert means and
what to do about it.

    sidestream metrics render --out monitoring --target 192.168.1.11:9464
"""


def add_parser(subparsers: Any) -> None:
    """Add ``metrics`` with ``render``; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "metrics",
        "write scrape config, rules, alerts and dashboard",
        "Write the files with which Prometheus and Grafana watch a fleet.",
    )
    renders = add_command(commands, "render", run_render, "write the files", _RENDER_HELP)
    renders.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="folder to write into; made if need be"
    )
    renders.add_argument(
        "--target",
        metavar="HOST:PORT",
        action="append",
        help=f"a trainer's metrics, once for each trainer (default: {DEFAULT_TARGET})",
    )
    renders.add_argument(
        "--docs",
        metavar="URL",
        default=DOCS,
        help="where alerts link to, such as http://TRAINER:9465/help.html (default: %(default)s)",
    )


def run_render(args: argparse.Namespace) -> int:
    """Write the files and say what to do with them."""
    for path in render(args.out, args.target or (DEFAULT_TARGET,), args.docs):
        print(f"wrote {path}")
    print(f"try it with: prometheus --config.file={args.out / 'prometheus.yml'}")
    return 0
