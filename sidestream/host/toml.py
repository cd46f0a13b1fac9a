"""Settings: a TOML file and command-line overrides into one checked, typed struct.

Agent and trainer both read their settings here. Knows no setting by name: the struct says which there are, of
which type, and with which default. Environment variables are the owner's business
(:meth:`broker_config.settings.BrokerSettings.endpoint`).
"""

import difflib
import math
import re
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import msgspec
from msgspec import inspect

from sidestream.contract.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]

T = TypeVar("T")
_WHERE = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<path>[^`]*)`)?$", re.DOTALL)


def load_config(
    kind: type[T],
    path: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    complete: Callable[[dict[str, Any]], dict[str, Any]] = lambda settings: settings,
) -> T:
    """Read a struct of settings.

    Args:
        kind: A ``msgspec.Struct`` type; nested structs are TOML tables.
        path: The TOML file; None for defaults and overrides only.
        overrides: By dotted name (``data.path``); they win over the file. Strings are read as the field's
            type, as flags are.
        complete: Fills in defaults that depend on other settings.

    Raises:
        ConfigError: naming the file or the dotted field, if the file cannot be read or is not TOML, or a
            setting is unknown, missing, or of the wrong type or value.
    """
    settings = {} if path is None else read_table(path)
    info = _info(cast(Any, kind))
    _check_names(settings, info, "")
    for name, value in (overrides or {}).items():
        _set(settings, name, _typed(value, _field_type(info, name), name))
    settings = complete(settings)
    _check_values(settings, info, "")
    return _convert(settings, kind)


@cache
def _info(kind: Any) -> inspect.Type:
    """What a type of settings holds; a crew reads hundreds of files of one type."""
    return inspect.type_info(kind)


def read_table(path: Path) -> dict[str, Any]:
    """A TOML file as it stands, unchecked.

    Raises:
        ConfigError: it cannot be read, or is none.
    """
    try:
        with path.open("rb") as file:
            settings: dict[str, Any] = tomllib.load(file)
    except FileNotFoundError as exc:
        raise ConfigError(str(path), "there is no such file") from exc
    except OSError as exc:
        raise ConfigError(str(path), f"cannot be read: {exc.strerror or exc}") from exc
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(str(path), f"is not valid TOML: {exc}") from exc
    return settings


def _convert(settings: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(settings, type=kind)
    except msgspec.ValidationError as exc:
        raise _refused(str(exc), _info(cast(Any, kind))) from exc


def _refused(message: str, info: inspect.Type) -> ConfigError:
    """Msgspec's message, in the words of a settings file."""
    match = _WHERE.match(message)
    what, where = (match["what"], (match["path"] or "").strip(".")) if match else (message, "")
    missing = re.fullmatch(r"Object missing required field `(.*)`", what)
    if missing:
        return ConfigError(f"{where}.{missing[1]}".strip("."), "is missing, and has no default")
    inside = re.sub(r"\[\d+\].*", "", where.replace("[...]", ".*"))  # what a list holds has no name
    field = _field_type(info, inside) if inside else info
    if isinstance(field, inspect.LiteralType):
        return ConfigError(where, f"write one of {', '.join(map(repr, field.values))}")
    if isinstance(field, inspect.EnumType):
        return ConfigError(where, f"write one of {', '.join(repr(one.value) for one in field.cls)}")
    return ConfigError(where or "settings", (what[:1].lower() + what[1:]).replace("`", ""))


def _typed(value: Any, kind: inspect.Type, name: str) -> Any:
    """Read an override as its field's type; the struct as a whole is then converted strictly."""
    if not isinstance(value, str) or isinstance(kind, inspect.StrType):
        return value
    for python in _python_types(kind):
        try:
            return msgspec.convert(value, type=python, strict=False)
        except msgspec.ValidationError:
            continue
    return value


def _python_types(kind: inspect.Type) -> list[type]:
    """The scalar types that a string on the command line may stand for."""
    if isinstance(kind, inspect.UnionType):
        return [python for member in kind.types for python in _python_types(member)]
    if isinstance(kind, inspect.LiteralType):
        return sorted({type(value) for value in kind.values} - {str}, key=str)
    if isinstance(kind, inspect.BoolType):
        return [bool]
    if isinstance(kind, inspect.IntType):
        return [int]
    return [float] if isinstance(kind, inspect.FloatType) else []


def _set(settings: dict[str, Any], name: str, value: Any) -> None:
    *tables, last = name.split(".")
    for table in tables:
        below = settings.setdefault(table, {})
        if not isinstance(below, dict):
            raise ConfigError(table, f"is a table; write [{table}] with its settings below")
        settings = below
    settings[last] = value


def _field_type(info: inspect.Type, name: str) -> inspect.Type:
    """The type of the field at a dotted name.

    Raises:
        ConfigError: if there is none.
    """
    for depth, part in enumerate(name.split("."), start=1):
        fields = _fields(info)
        if fields is not None:
            if part not in fields:
                raise _unknown(".".join(name.split(".")[:depth]), part, fields)
            info = fields[part]
        elif isinstance(info, inspect.DictType):
            info = info.value_type
        else:
            raise ConfigError(name, "there is no such setting")
    return info


def _fields(info: inspect.Type) -> dict[str, inspect.Type] | None:
    if isinstance(info, inspect.StructType):
        return {field.encode_name: field.type for field in info.fields}
    return None


def _check_names(settings: Any, info: inspect.Type, prefix: str) -> None:
    """Refuse unknown names before anything else: a typing error explains most of what would follow."""
    if isinstance(info, inspect.UnionType):
        structs = [member for member in info.types if isinstance(member, inspect.StructType)]
        info = structs[0] if len(structs) == 1 else info
    if not isinstance(settings, dict):
        return
    fields = _fields(info)
    for name, value in settings.items():
        dotted = f"{prefix}{name}"
        if fields is not None and name not in fields:
            raise _unknown(dotted, name, fields)
        below = fields[name] if fields is not None else getattr(info, "value_type", inspect.AnyType())
        _check_names(value, below, f"{dotted}.")


def _check_values(settings: Any, info: inspect.Type, prefix: str) -> None:
    """Refuse what msgspec takes, or refuses without naming the table: infinities, and entries of a dict."""
    if isinstance(settings, float) and not math.isfinite(settings):
        raise ConfigError(prefix.rstrip("."), f"is {settings}; write a finite number")
    if not isinstance(settings, dict):
        return
    fields = _fields(info)
    for name, value in settings.items():
        below = fields.get(name) if fields is not None else getattr(info, "value_type", None)
        if below is not None:
            _check_values(value, below, f"{prefix}{name}.")
        if isinstance(info, inspect.DictType) and isinstance(info.value_type, inspect.StructType):
            try:
                msgspec.convert(value, type=info.value_type.cls)
            except msgspec.ValidationError as exc:
                refusal = _refused(str(exc), info.value_type)
                field = "" if refusal.field == "settings" else f".{refusal.field}"
                raise ConfigError(f"{prefix}{name}{field}", refusal.message) from exc


def _unknown(dotted: str, name: str, fields: Mapping[str, Any]) -> ConfigError:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.5)
    if near:
        return ConfigError(dotted, f"there is no such setting; did you mean {near[0]!r}?")
    return ConfigError(dotted, f"there is no such setting; there are: {', '.join(sorted(fields))}")
