"""What ``sidestream top`` draws: a fleet as text of a given height. Pure.

What devices say of themselves is shown without control characters: a terminal obeys those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from metrics.fleet_page.troubles import TITLES
from metrics.fleet_page.view import DeviceView, FleetView, Point, RefusalView, TierView
from sidestream.top.source import Picture

STATES: Final = {
    "online": "green",
    "finished": "blue",
    "silent": "yellow",
    "lost": "red",
    "gone": "bright_black",
    "quarantined": "magenta",
}
_KINDS: Final = tuple(TITLES)
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_SPARK: Final = 24
_DIM: Final = "bright_black"


T = TypeVar("T")


@dataclass(frozen=True)
class _Column(Generic[T]):
    """A column of a table."""

    title: str
    cell: Callable[[T], str | Text]
    left: bool = False
    from_width: int = 0
    """Left out on narrower screens."""


@dataclass(frozen=True)
class Sort:
    """An order of the devices' table."""

    title: str
    key: Callable[[DeviceView], Any]


def _trouble(one: DeviceView) -> int:
    """The lower, the more somebody should look."""
    kinds = [_KINDS.index(trouble.kind) for trouble in one.troubles if trouble.kind in TITLES]
    return min(kinds, default=len(_KINDS))


SORTS: Final = (
    Sort("trouble", _trouble),
    Sort("device", lambda one: ()),
    Sort("last seen", lambda one: one.heard_unix_s),
    Sort("samples", lambda one: -one.samples),
    Sort("outbox", lambda one: -one.outbox_bytes),
    Sort("version", lambda one: one.weights_version),
    Sort("quality", lambda one: math.inf if one.quality is None else one.quality),
)
"""What the key s goes through; it begins with the troubled."""


def screen(
    picture: Picture,
    *,
    width: int,
    height: int | None = None,
    sort: int = 0,
    skip: int = 0,
    notice: str = "",
) -> RenderableType:
    """The whole screen.

    Args:
        picture: What is known; it has a view.
        width: Columns of the screen; narrow ones show less.
        height: Lines to fill, or None for as many as it takes.
        sort: Index into :data:`SORTS`.
        skip: Devices to leave out at the top of their table.
        notice: Something to say in red.
    """
    view = picture.view
    assert view is not None
    head = [_headline(view), _figures(picture, view)]
    if notice:
        head.append(Text(plain(notice), style="bold red", no_wrap=True, overflow="ellipsis"))
    tiers = _tiers(picture, view, width)
    few = 3 if height else 10
    stuck, refused = _stuck(picture.devices, view, few), _refused(view, picture.refusals, few)
    room = None
    if height is not None:
        taken = len(head) + len(view.tiers) + 5  # headers, gaps and the line of keys
        if height - taken - len(stuck) - len(refused) < 3:
            refused = []
        if height - taken - len(stuck) < 3:
            stuck = []
        room = max(1, height - taken - len(stuck) - len(refused))
    devices = _devices(picture, view, SORTS[sort], skip, room, width)
    parts: list[RenderableType] = [*head, Text(), tiers, Text(), *stuck, devices, *refused]
    if height is not None:
        keys = f"q quit   s sort: {SORTS[sort].title}   ↑↓ PgUp PgDn scroll"
        parts.append(Text(keys, style=_DIM, no_wrap=True, overflow="ellipsis"))
    return Group(*parts)


def plain(text: str) -> str:
    """Without control characters."""
    return "".join(char if char.isprintable() else "?" for char in text)


def _headline(view: FleetView) -> Text:
    trainer = view.trainer
    mood = ("learning", "green")
    if not trainer.connected:
        mood = ("trainer or broker away", "red")
    elif trainer.backlog > 1000:
        mood = (f"catching up, {trainer.backlog} behind", "yellow")
    elif trainer.final:
        mood = ("all learnt", "blue")
    return _line(
        ("sidestream top", "bold"),
        (plain(view.job), "bold cyan"),
        mood,
        (f"version {trainer.version}, published {trainer.published}", ""),
    )


def _figures(picture: Picture, view: FleetView) -> Text:
    fleet, trainer = view.fleet, view.trainer
    known = sum(fleet.states.values())
    return _line(
        (f"devices {fleet.online}/{known} online", ""),
        (f"{view.measure} {_ratio(fleet.quality)}", ""),
        (f"loss {_ratio(fleet.loss)}", ""),
        (_left(view), ""),
        (f"samples {trainer.samples} of {fleet.samples_read} read ({_rate(picture.rate('samples'))}/s)", ""),
        (f"up {size(fleet.bytes_up)}  down {size(fleet.bytes_down)}", ""),
    )


def _left(view: FleetView) -> str:
    """What is left to learn."""
    trainer = view.trainer
    if trainer.final or not trainer.samples:
        return "nothing left to learn" if trainer.final else "nothing to learn yet"
    wait = (
        f", {trainer.backlog} {'record waits' if trainer.backlog == 1 else 'records wait'}"
        if trainer.backlog
        else ""
    )
    if (answers := trainer.answers) is not None:
        return (
            f"{answers.waiting} batches wait, {answers.outstanding} answers with devices, gradient "
            f"{answers.gradient_norm:.2f}, {answers.staleness} stale"
        )
    passes = trainer.owed_rows / trainer.samples
    return f"{passes:.1f} of {trainer.passes:g} passes left{wait}" if trainer.passes else f"learning{wait}"


def _line(*parts: tuple[str, str]) -> Text:
    line = Text("  ", no_wrap=True, overflow="ellipsis").join(Text(*part) for part in parts)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _table(columns: Sequence[_Column[T]], rows: Iterable[T], width: int) -> Table:
    """Those of the columns that have room."""
    table = Table(box=None, pad_edge=False, header_style=_DIM, padding=(0, 2, 0, 0))
    shown = [column for column in columns if width >= column.from_width]
    for column in shown:
        table.add_column(
            column.title, justify="left" if column.left else "right", no_wrap=True, overflow="ellipsis"
        )
    for row in rows:
        table.add_row(*(column.cell(row) for column in shown))
    return table


def _tiers(picture: Picture, view: FleetView, width: int) -> Table:
    def lost(tier: TierView) -> Text:
        count = tier.states.get("lost", 0) + tier.states.get("silent", 0)
        return Text(str(count), style="red" if count else _DIM)

    def course(of: Callable[[Point], Mapping[str, float]], style: str) -> Callable[[TierView], Text]:
        return lambda tier: Text(spark([of(point).get(tier.name) for point in picture.points]), style=style)

    columns: list[_Column[TierView]] = [
        _Column("TIER", lambda tier: Text(plain(tier.name), style="bold"), left=True),
        _Column("ONLINE", lambda tier: f"{tier.online}/{sum(tier.states.values())}"),
        _Column("LOST", lost),
        _Column(view.measure.upper(), lambda tier: _ratio(tier.quality)),
        _Column("", course(lambda point: point.quality, "cyan"), left=True, from_width=105),
        _Column("LOSS", lambda tier: _ratio(tier.loss), from_width=60),
        _Column("", course(lambda point: point.loss, "magenta"), left=True, from_width=130),
        _Column("VERSION", _versions, from_width=72),
        _Column("SAMPLES", _samples),
        _Column("OUTBOXES", lambda tier: size(tier.outbox_bytes), from_width=84),
    ]
    return _table(columns, view.tiers, width)


def _devices(picture: Picture, view: FleetView, sort: Sort, skip: int, room: int | None, width: int) -> Table:
    def version(device: DeviceView) -> Text:
        wanted = view.trainer.finished if device.final_only else view.trainer.published
        behind = device.online and device.weights_version < wanted
        return Text(str(device.weights_version), style="yellow" if behind else "")

    def outbox(device: DeviceView) -> Text:
        return Text(size(device.outbox_bytes), style="red" if device.outbox_fill > 0.8 else "")

    columns: list[_Column[DeviceView]] = [
        _Column("DEVICE", lambda one: plain(one.name), left=True),
        _Column("TIER", lambda one: plain(one.tier), left=True, from_width=90),
        _Column("STATE", lambda one: Text(plain(one.state), style=STATES.get(one.state, _DIM)), left=True),
        _Column("SEEN", lambda one: span(view.now_unix_s - one.heard_unix_s)),
        _Column("SAMPLES", _samples, from_width=64),
        _Column("SENT", lambda one: size(one.bytes_up), from_width=100),
        _Column("OUTBOX", outbox, from_width=76),
        _Column("VERSION", version, from_width=54),
        _Column(view.measure.upper(), lambda one: _ratio(one.quality)),
        _Column("TROUBLE", _reasons, left=True, from_width=110),
    ]
    found = sorted(picture.devices, key=lambda one: (sort.key(one), one.tier, one.name))
    return _table(columns, found[skip : len(found) if room is None else skip + room], width)


def _samples(one: DeviceView | TierView) -> Text:
    """Those forwarded, of those read; yellow where some are of no use."""
    return Text(f"{one.samples}/{one.samples_read}", style="yellow" if one.samples_unused else "")


def _reasons(one: DeviceView) -> Text:
    """What is the matter with a device, in a few words each."""
    severe = any(trouble.severe for trouble in one.troubles)
    said = ", ".join(trouble.title.lower() for trouble in one.troubles)
    return Text(said, style="red" if severe else "yellow")


def _stuck(devices: Iterable[DeviceView], view: FleetView, most: int) -> list[Text]:
    """Who is stuck, and why: the worst first, a line each."""
    found = sorted(
        (one for one in devices if one.troubles), key=lambda one: (_trouble(one), one.tier, one.name)
    )
    if not found:
        return []
    noun = "device" if len(found) == 1 else "devices"
    lines = [Text(f"stuck: {len(found)} {noun}", style="yellow")]
    for one in found[:most]:
        for trouble in one.troubles:
            since = span(view.now_unix_s - trouble.since_unix_s)
            line = f"  {plain(one.name)} ({plain(one.tier)}): {plain(trouble.words)}, since {since}"
            lines.append(Text(line, style="red" if trouble.severe else ""))
    return [*map(_cut, lines), Text()]


def _cut(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _refused(view: FleetView, refusals: Sequence[RefusalView], most: int) -> list[Text]:
    counts = ", ".join(f"{one.count} {one.kind} {one.reason}" for one in view.trainer.refused)
    if not counts and not refusals:
        return []
    lines = [Text(f"refused: {plain(counts) or 'lately'}", style="yellow")]
    lines += [
        Text(f"  {plain(one.device)} ({plain(one.tier)}), {plain(one.kind)}: {plain(one.reason)}", style=_DIM)
        for one in refusals[:most]
    ]
    return [_cut(line) for line in lines]


def _versions(tier: TierView) -> str:
    if tier.version_min is None:
        return "-"
    same = tier.version_min == tier.version_max
    return str(tier.version_max) if same else f"{tier.version_min}-{tier.version_max}"


def spark(values: Iterable[float | None]) -> str:
    """The course of a figure in a line of blocks."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return ""
    if len(known) > _SPARK:
        known = [known[index * (len(known) - 1) // (_SPARK - 1)] for index in range(_SPARK)]
    low, high = min(known), max(known)
    if low == high:  # no course: neither low nor high
        return _BLOCKS[len(_BLOCKS) // 2 - 1] * len(known)
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((value - low) * scale)] for value in known)


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def span(seconds: float) -> str:
    """A time that has passed, for people."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h" if whole < 86400 else f"{whole // 86400} d"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
