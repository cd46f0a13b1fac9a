"""Command-line flags made from a struct of settings: one for every plain field, helped by its docstring.

What a flag sets is an override for :func:`sidestream.host.toml.load_config`. Knows no setting by name.
"""

import argparse
import ast
import inspect as python_inspect
import itertools
import textwrap
from collections.abc import Collection, Mapping
from typing import Any

import msgspec
from msgspec import inspect

_PREFIX = "setting:"
_PLAIN = (inspect.StrType, inspect.IntType, inspect.FloatType, inspect.LiteralType)


def add_flags(
    parser: argparse.ArgumentParser,
    kind: type[msgspec.Struct],
    *,
    short: Mapping[str, str] | None = None,
    hidden: Collection[str] = (),
) -> None:
    """Give ``parser`` one flag for every string, number, choice and yes-or-no in ``kind`` and its tables.

    Args:
        parser: Gets ``--log-level`` for the field ``log_level``, and ``--data.text-column`` for the field
            ``text_column`` of the table ``data``.
        kind: The struct.
        short: Further spellings by dotted name, such as ``{"broker.url": "--broker"}``.
        hidden: Dotted names that get no flag; secrets, because a command line is public.
    """
    for name, field, help_text in _plain_fields(kind, ""):
        if name not in hidden:
            options = [*((short[name],) if short and name in short else ()), f"--{name.replace('_', '-')}"]
            _add_flag(parser, options, name, field, help_text)


def overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags that were given set, by dotted name."""
    return {
        name[len(_PREFIX) :]: value for name, value in vars(arguments).items() if name.startswith(_PREFIX)
    }


def _add_flag(
    parser: argparse.ArgumentParser, options: list[str], name: str, field: inspect.Field, help_text: str
) -> None:
    shown = _default(field)
    text = f"{help_text} (default: {shown})".strip() if shown else help_text
    common: dict[str, Any] = {
        "dest": _PREFIX + name,
        "default": argparse.SUPPRESS,
        "help": text.replace("%", "%%"),
    }
    if isinstance(field.type, inspect.BoolType):
        parser.add_argument(*options, action=argparse.BooleanOptionalAction, **common)
    elif isinstance(field.type, inspect.LiteralType):
        parser.add_argument(*options, choices=field.type.values, **common)
    else:
        metavar = options[0].lstrip("-").rpartition(".")[2].upper().replace("-", "_")
        parser.add_argument(*options, metavar=metavar, **common)


def _default(field: inspect.Field) -> str:
    plain = isinstance(field.default, str | int | float) and not isinstance(field.default, bool)
    return str(field.default) if plain else ""


def _plain_fields(kind: type[msgspec.Struct], prefix: str) -> list[tuple[str, inspect.Field, str]]:
    """Dotted name, field and help text of every plain field, depth first."""
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    helps = field_help(kind)
    found: list[tuple[str, inspect.Field, str]] = []
    for field in info.fields:
        name = f"{prefix}{field.encode_name}"
        if isinstance(field.type, inspect.StructType):
            found += _plain_fields(field.type.cls, f"{name}.")
        elif isinstance(field.type, (*_PLAIN, inspect.BoolType)):
            found.append((name, field, helps.get(field.name, "")))
    return found


def field_help(kind: type) -> dict[str, str]:
    """The docstring under each field of a class, as one line; empty where there is no source to read."""
    try:
        tree = ast.parse(textwrap.dedent(python_inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return {}
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    helps: dict[str, str] = {}
    for field, after in itertools.pairwise(body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and is_text:
            assert isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            helps[field.target.id] = " ".join(str(after.value.value).replace("``", "").split())
    return helps
