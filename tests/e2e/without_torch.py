"""``python -m tests.e2e.without_torch …``: the command line with only requirements/agent.txt installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path
from types import ModuleType

from packaging.requirements import Requirement

FILE = Path(__file__).parents[2] / "requirements" / "agent.txt"
OURS = {"sidestream"}


def lines() -> list[str]:
    """What the file asks for."""
    return [line for line in FILE.read_text().splitlines() if not line.startswith("#")]


def installed() -> set[str]:
    """The distributions that the file brings, by normal name, as this environment has them."""
    found: set[str] = set()
    pending = lines()
    while pending:
        wanted = Requirement(pending.pop())
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        if (name := _normal(wanted.name)) not in found:
            found.add(name)
            try:
                pending += requires(name) or []
            except PackageNotFoundError:
                found.discard(name)
    return found


def absent() -> set[str]:
    """Top-level modules that an environment with only those lacks."""
    there = installed() | OURS
    return {
        module
        for module, brought_by in packages_distributions().items()
        if not there & set(map(_normal, brought_by)) and module not in sys.stdlib_module_names
    }


class NotInstalled(MetaPathFinder):
    """Says of some modules that they are not there."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if name.partition(".")[0] in self._names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> int:
    sys.meta_path.insert(0, NotInstalled(absent()))
    from sidestream.start import main as run

    code = run()
    print("modules:", sorted({"torch", "transformers"} & set(sys.modules)))
    return code


if __name__ == "__main__":
    sys.exit(main())
