"""The side-network's form: what its parameters are called, their shapes, and which part stands where. Pure.

Both forwards go by it, the one that trains (:mod:`.network`) and the one that answers (:mod:`.inference`).

Legend: B blocks, r the side-network's width, C numbers in an answer, d a backbone's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import TASKS, TaskSpec
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import About, Bundle

APART_SHARE: Final = 0.5
"""How much of what a block that stands apart says is added."""
_OF_A_MAP: Final = ("aligns", "outs", "starts")
Shape = tuple[int, ...]


def stands_apart(spec: SideNetworkSpec, task: TaskSpec, block: int) -> bool:
    """Whether block number ``block``, from 1, sees its own tap alone; a language model's never do."""
    return 0 < spec.apart <= block and not task.generates


def align_key(name: str) -> str:
    """How a map is called within a parameter's name, where dots part levels; map names hold no '@' or '%'."""
    return "@" + name.replace(".", "%")


def align_name(key: str) -> str:
    """The inverse of :func:`align_key`."""
    return key[1:].replace("%", ".")


def align_of(parameter: str) -> str | None:
    """The alignment map that a parameter belongs to, or None if all tiers share it."""
    level, _, rest = parameter.partition(".")
    return align_name(rest.partition(".")[0].partition("/")[0]) if level in _OF_A_MAP else None


def start_key(align: str, taps: int) -> str:
    """How a linear start of so many taps is called within a parameter's name; map names hold no '/'."""
    return f"{align_key(align)}/{taps}"


def starts_among(parameters: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Which linear starts are among some parameters: by alignment map, of how many taps."""
    found: dict[str, set[int]] = {}
    for name in parameters:
        level, _, rest = name.partition(".")
        if level == "starts":
            align, _, taps = rest.partition(".")[0].partition("/")
            found.setdefault(align_name(align), set()).add(int(taps))
    return {align: tuple(sorted(taps)) for align, taps in sorted(found.items())}


def first_blocks(tensors: Mapping[str, Floats], blocks: int) -> dict[str, Floats]:
    """The parameters of the same network with its first ``blocks`` blocks only.

    A row of so many taps leaves there, so the deeper blocks have no part in its answer, nor has a linear
    start of another number of taps.
    """
    kept: dict[str, Floats] = {}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        if part in ("adapters", "steps") and int(rest.partition(".")[0]) >= blocks:
            continue
        if part == "starts" and int(rest.partition(".")[0].partition("/")[2]) != blocks:
            continue
        kept[name] = array[: {"aligns": blocks, "gates": blocks - 1}.get(part)]
    return kept


def check_parameters(bundle: Bundle) -> None:
    """See that a bundle holds the parameters that its description asks for, and no others.

    Raises:
        DecodeError: naming one that is missing, too much, or of another shape.
    """
    wanted = dict(shapes_of(bundle.about))
    found = {name: array.shape for name, array in bundle.tensors.items()}
    wrong = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if wrong:
        what = f"{wrong[0]} has shape {found.get(wrong[0])}, not {wanted.get(wrong[0])}"
        raise DecodeError(f"weights do not fit the side-network: {what[:300]}")


def shapes_of(about: About) -> Iterator[tuple[str, Shape]]:
    """Every parameter of the side-network that is described, with its shape."""
    spec, task = about.side_network, TASKS[about.task]
    r, outputs = spec.width, task.outputs(len(about.labels))
    yield "gates", (spec.blocks - 1,)
    for block in range(spec.blocks):
        yield from _norm(f"adapters.{block}.norm", r)
        yield from _linear(f"adapters.{block}.down", spec.inner, r)
        yield from _linear(f"adapters.{block}.up", r, spec.inner)
    for name, d in about.aligns.items():
        yield f"aligns.{align_key(name)}.weight", (spec.blocks, d, r)
        yield f"aligns.{align_key(name)}.bias", (spec.blocks, r)
        if task.generates:
            yield f"outs.{align_key(name)}.weight", (d, r)
    for name, counts in about.starts.items():
        for taps in counts:
            yield f"starts.{start_key(name, taps)}.weight", (taps, about.aligns[name], outputs)
            yield f"starts.{start_key(name, taps)}.bias", (outputs,)
    if task.generates:
        yield from _norm("norm", r)
    else:
        for block in range(spec.blocks):
            yield from _norm(f"steps.{block}.norm", r)
            yield from _linear(f"steps.{block}.head", outputs, r)


def _norm(name: str, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _linear(name: str, out: int, width: int) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, width)
    yield f"{name}.bias", (out,)
