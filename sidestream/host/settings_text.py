"""Settings as text: a commented TOML file to edit, and a reference to read. Both come from the struct itself.

What is said of a setting is the docstring under its field, its bounds, and its default. Knows no setting by
name.
"""

from __future__ import annotations

import enum
import json
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from msgspec import inspect

from sidestream.host.flags import field_help

_WIDTH: Final = 100


class Setting(NamedTuple):
    """One field of a struct of settings."""

    name: str
    type: inspect.Type
    help: str
    required: bool
    default: Any
    """None where it is required."""


class Table(NamedTuple):
    """One table of a settings file."""

    name: str
    """Dotted; ``*`` stands for a name that the user chooses. Empty for the file's head."""
    help: str
    settings: tuple[Setting, ...]


def tables(kind: type[msgspec.Struct]) -> list[Table]:
    """Every table of a settings file, the head first, in the order of the fields."""
    return list(_tables(kind, "", "", None))


def settings_file(kind: type[msgspec.Struct], values: Mapping[str, Any], head: str) -> str:
    """A settings file in which everything is explained.

    Args:
        kind: The struct.
        values: What is set, by dotted name; the rest is commented out, with its default.
        head: The first lines, without ``#``.
    """
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    left = dict(values)
    for table in tables(kind):
        for name in _instances(table.name, left):
            lines += ["", *_table(table, name, left)] if name else _table(table, name, left)
    assert not left, f"no such settings: {sorted(left)}"
    return "\n".join(lines) + "\n"


def reference(kind: type[msgspec.Struct]) -> str:
    """The same as Markdown, a table of the file a section."""
    parts = []
    for table in tables(kind):
        title = f"### `[{table.name.replace('*', 'NAME')}]`" if table.name else "### At the top"
        rows = [
            f"| `{one.name}` | {_type(one.type)} | {_default(one)} | {_cell(one.help)} |"
            for one in table.settings
        ]
        about = [table.help, ""] if table.help else []
        parts.append(
            "\n".join([title, "", *about, "| setting | type | default | |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts) + "\n"


def toml_value(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    assert isinstance(value, list | tuple)
    return f"[{', '.join(map(toml_value, value))}]"


def _tables(kind: type[msgspec.Struct], name: str, about: str, default: object) -> Iterator[Table]:
    """``default`` is the whole table's, where the struct that holds it says so."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    helps = field_help(kind)
    plain: list[Setting] = []
    below: list[tuple[type[msgspec.Struct], str, str, object]] = []
    for field in info.fields:
        dotted = f"{name}.{field.encode_name}".lstrip(".")
        text = helps.get(field.name, "")
        if isinstance(field.type, inspect.StructType):
            whole = None if field.default is msgspec.NODEFAULT else field.default
            below.append((field.type.cls, dotted, text, whole))
        elif isinstance(field.type, inspect.DictType) and isinstance(
            field.type.value_type, inspect.StructType
        ):
            below.append((field.type.value_type.cls, f"{dotted}.*", text, None))
        else:
            own = None if field.required else msgspec.to_builtins(getattr(default, field.name, field.default))
            plain.append(Setting(field.encode_name, field.type, text, field.required, own))
    yield Table(name, about, tuple(plain))
    for cls, dotted, text, whole in below:
        yield from _tables(cls, dotted, text, whole)


def _instances(table: str, values: Mapping[str, Any]) -> list[str]:
    """The names under which a table appears: its own, or those that the values give it."""
    if "*" not in table:
        return [table]
    before, _, after = table.partition("*")
    names = {
        name[len(before) :].split(".")[0]
        for name in values
        if name.startswith(before) and name.count(".") > table.count(".")
    }
    return [f"{before}{name}{after}" for name in sorted(names)] or [table]


def _table(table: Table, name: str, left: dict[str, Any]) -> Iterator[str]:
    dotted = [f"{name}.{one.name}".lstrip(".") for one in table.settings]
    given = any(one in left for one in dotted) or any(one.required for one in table.settings)
    if table.help:
        yield from _comment(table.help)
    if name:  # a table of which nothing is set is a comment as a whole where its name is still to be chosen
        yield f"[{name}]" if given or "*" not in name else f"# [{name.replace('*', 'NAME')}]"
    for setting, full in zip(table.settings, dotted, strict=True):
        yield ""
        yield from _comment(_sentence(setting))
        if full in left:
            yield f"{setting.name} = {toml_value(left.pop(full))}"
        elif setting.required:
            yield f'{setting.name} = ""'
        else:
            yield f"# {setting.name} = {toml_value(setting.default)}"


def _sentence(setting: Setting) -> str:
    bounds = _bounds(setting.type)
    return f"{setting.help} ({bounds})" if bounds else setting.help


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2)]


def _default(setting: Setting) -> str:
    return "*required*" if setting.required else f"`{toml_value(setting.default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _type(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(f"`{toml_value(value)}`" for value in kind.values)
    if isinstance(kind, inspect.EnumType):
        return ", ".join(f"`{toml_value(one)}`" for one in kind.cls)
    if isinstance(kind, inspect.UnionType):
        return ", or ".join(_type(one) for one in kind.types)
    if isinstance(kind, inspect.VarTupleType | inspect.ListType | inspect.TupleType):
        return "list"
    names = {
        inspect.BoolType: "yes or no",
        inspect.StrType: "text",
        inspect.IntType: "whole number",
        inspect.FloatType: "number",
    }
    bounds = _bounds(kind)
    return f"{names[type(kind)]}{', ' if bounds else ''}{bounds}"


def _bounds(kind: inspect.Type) -> str:
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        return ""
    if kind.ge is not None and kind.le is not None:
        return f"{kind.ge} to {kind.le}"
    words = {"ge": "{} or more", "gt": "over {}", "le": "{} at most", "lt": "under {}"}
    limits = {name: getattr(kind, name) for name in words}
    return ", ".join(words[name].format(limit) for name, limit in limits.items() if limit is not None)
