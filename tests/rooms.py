"""The rooms of the house, read from the code: what each is for, what it lets out, and who imports whom.

A room is a package within a wing, as top-level packages are called here. Its ``__init__`` names in
``__all__`` the modules that others may import; the rest is its own, and that of the rooms within it.
``scripts/check`` holds the code to that (:class:`PrivateModules`), and ``docs/rooms.md`` is drawn from it:
``python -m tests.rooms``.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grimp
from importlinter import Contract, ContractCheck, output

ROOT: Final = Path(__file__).resolve().parents[1]
PAGE: Final = ROOT / "docs" / "rooms.md"
HOUSE: Final = ("sidestream", "edge_agent", "side_trainer", "broker_config", "metrics")
_HEAD: Final = """# The rooms

Written from the code by `python -m tests.rooms`. Each room's `__init__` says what it is for and which modules
others may import; those that stand in a wing itself are open to all. `scripts/check` refuses other imports,
and imports against the arrows. An arrow that follows from others is left out.
"""


@dataclass(frozen=True, kw_only=True)
class Room:
    """A package."""

    name: str
    """With the rooms around it."""
    about: str
    """The first line of its docstring."""
    lets_out: frozenset[str]
    """Modules, and rooms within it, that others may import."""
    files: int
    """In it, without those of rooms within it."""


def rooms() -> dict[str, Room]:
    """Every room by name, in the order of the folders."""
    found = {}
    for house in HOUSE:
        for init in sorted((ROOT / house).rglob("__init__.py")):
            name = ".".join(init.parent.relative_to(ROOT).parts)
            tree = ast.parse(init.read_text("utf-8"))
            about = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[name] = Room(
                name=name,
                about=about,
                lets_out=frozenset(_all_of(tree)),
                files=len(list(init.parent.glob("*.py"))),
            )
    return found


def _all_of(tree: ast.Module) -> list[str]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(node.value)]
    return []


def room_of(module: str, known: Mapping[str, Room]) -> str:
    """The room that a module stands in."""
    return module if module in known else module.rpartition(".")[0]


def trespasses(graph: grimp.ImportGraph, known: Mapping[str, Room]) -> list[tuple[str, str]]:
    """Imports, from and to, of modules that their room does not let out."""
    found = []
    for importer in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(importer)):
            room = room_of(imported, known)
            if room not in known or room in HOUSE or imported in known:
                continue
            if _is_within(room_of(importer, known), room):
                continue
            if imported.rpartition(".")[2] not in known[room].lets_out:
                found.append((importer, imported))
    return found


def _is_within(room: str, other: str) -> bool:
    return f"{room}.".startswith(f"{other}.")


class PrivateModules(Contract):
    """A module is imported from outside its room only if the room's ``__all__`` names it."""

    type_name = "private_modules"

    def check(self, graph: grimp.ImportGraph, verbose: bool) -> ContractCheck:
        found = trespasses(graph, rooms())
        return ContractCheck(kept=not found, metadata={"found": found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for importer, imported in check.metadata["found"]:
            room, _, name = imported.rpartition(".")
            output.print_error(
                f"{importer} imports {imported}; use what {room} lets out, or name {name} there"
            )


def arrows(graph: grimp.ImportGraph, known: Mapping[str, Room]) -> dict[str, set[str]]:
    """By room, the rooms that it imports from; what follows from others is left out.

    Modules that stand in a wing itself are rooms of their own here.
    """
    direct: dict[str, set[str]] = defaultdict(set)
    for importer in graph.modules:
        start = _drawn_as(importer, known)
        for imported in graph.find_modules_directly_imported_by(importer):
            end = _drawn_as(imported, known)
            if start != end and start not in HOUSE and end not in HOUSE:
                direct[start].add(end)
    return {
        start: {end for end in ends if not any(_leads(direct, other, end) for other in ends if other != end)}
        for start, ends in direct.items()
    }


def _drawn_as(module: str, known: Mapping[str, Room]) -> str:
    """A room; a module that stands in a wing itself, by its own name."""
    room = room_of(module, known)
    return module if room in HOUSE else room


def _leads(direct: Mapping[str, set[str]], start: str, end: str) -> bool:
    seen, waiting = {start}, [start]
    while waiting:
        for following in direct.get(waiting.pop(), set()):
            if following == end:
                return True
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return False


def page() -> str:
    """``docs/rooms.md`` as it should stand."""
    known = rooms()
    graph = grimp.build_graph(*HOUSE)
    lines = [_HEAD, "```mermaid", "flowchart TD"]
    drawn = arrows(graph, known)
    for house in HOUSE:
        shown = sorted({_drawn_as(module, known) for module in graph.modules} - {*HOUSE})
        lines.append(f"  subgraph {house}")
        lines += [f'    {_id(name)}["{name}"]' for name in shown if _is_within(name, house)]
        lines.append("  end")
    lines += [f"  {_id(start)} --> {_id(end)}" for start in sorted(drawn) for end in sorted(drawn[start])]
    lines += ["```", "", "| room | what it is for | lets out |", "| --- | --- | --- |"]
    for room in known.values():
        names = ", ".join(f"`{name}`" for name in sorted(room.lets_out))
        lines.append(f"| `{room.name}` | {room.about.replace('``', '`')} | {names} |")
    return "\n".join(lines) + "\n"


def _id(name: str) -> str:
    return name.replace(".", "_")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
