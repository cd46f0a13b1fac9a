"""Torch is one runtime of the frozen model, and the trainer's tool; nothing else needs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

ROOT = Path(__file__).parents[1]
ROOMS = ("edge_agent", "broker_config", "metrics", "sidestream.contract", "sidestream.host")
FREE = (*ROOMS, "sidestream.backbone", "sidestream.side_network")
WITH_TORCH = (
    "sidestream.backbone.torch_runtime",
    "sidestream.side_network.network",
    "sidestream.side_network.output_head",
)
"""All there is of it beside the trainer."""
_IMPORT_ALL = """\
import importlib, pkgutil, sys
free, with_torch = (argument.split(",") for argument in sys.argv[1:])
met = 0
for room in free:
    package = importlib.import_module(room)
    for found in pkgutil.walk_packages(package.__path__, room + "."):
        if not found.name.startswith(tuple(with_torch)) and not found.name.endswith("__main__"):
            importlib.import_module(found.name)
            met += 1
print(met, *({"torch", "transformers"} & set(sys.modules)))
"""


def test_everything_but_the_torch_runtime_and_what_trains_is_imported_without_torch() -> None:
    command = [sys.executable, "-c", _IMPORT_ALL, ",".join(FREE), ",".join(WITH_TORCH)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    met, *loaded = done.stdout.split()
    assert int(met) > 100 and not loaded


def test_the_linter_forbids_it_in_every_module_that_there_is() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in contracts if "torch" in one.get("forbidden_modules", ())]
    assert {"torch", "transformers"} <= set(contract["forbidden_modules"])
    for room in FREE:
        for module in (ROOT / room.replace(".", "/")).rglob("*.py"):
            name = ".".join(module.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            known = [one for one in contract["source_modules"] if f"{name}.".startswith(f"{one}.")]
            assert known or name in FREE or name.startswith(WITH_TORCH), f"{name} is not in the contract"


def test_a_command_imports_what_it_takes_and_no_other_commands() -> None:
    script = (
        "import sys; from sidestream.cli import build_parser; build_parser('trainer'); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert "side_trainer.operator.commands" in loaded
    assert not loaded & {"torch", "sidestream.fleet.cli", "edge_agent.commands.agent", "rich", "starlette"}
