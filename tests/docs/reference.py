"""``docs/wire.md``, written from the messages themselves: ``python -m tests.docs.reference``."""

from __future__ import annotations

import inspect as python_inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import inspect

from sidestream.contract import plan, quality, signing, tasks, tensors, topics
from sidestream.contract.messages import activations, device, query, split, trainer
from sidestream.contract.wire import MAX_MESSAGE_BYTES, TARGET_MESSAGE_BYTES, WIRE_VERSION, Message
from sidestream.host.flags import field_help
from sidestream.side_network import bundle

PAGE: Final = Path(__file__).resolve().parents[2] / "docs" / "wire.md"
_MODULES: Final = (activations, device, split, query, trainer, plan)

_HEAD: Final = f"""# The wire

What travels between agents, trainer and broker, written from the code by `python -m tests.docs.reference`.

A payload is one msgpack map. Its key `v` holds the schema version, {WIRE_VERSION}; the other keys are the
fields below. Unknown keys are stepped over, missing ones take their default, and one without a default makes
the message unreadable: so a field may be added at the end of a message, and none is ever retyped or given
another meaning. No message is larger than {MAX_MESSAGE_BYTES:,} bytes; senders stay under
{TARGET_MESSAGE_BYTES:,}. Integers in `bytes` are little-endian. `tests/contract/golden` holds messages of
every kind byte by byte.
"""


def page() -> str:
    """The page as it should stand."""
    kinds = [kind for module in _MODULES for kind in _messages_of(module)]
    parts = [
        _HEAD,
        f"## Topics\n\n{_verbatim(topics)}\n\n{_topics()}",
        "## Messages\n\n" + "\n\n".join(_section(kind) for kind in kinds),
        f"## Tensors\n\n{_verbatim(tensors)}\n\n{_section(tensors.Tensor)}",
        f"## Targets\n\n{_verbatim(tasks)}",
        f"## Quality\n\n{_verbatim(quality)}\n\n{_section(quality.Tally)}",
        f"## Weights\n\n{_verbatim(bundle)}\n\n{_section(bundle.About)}",
        f"## Signatures\n\n{_verbatim(signing)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _topics() -> str:
    tree = topics.Topics("JOB")
    rows = {
        tree.plan: "Plan, retained",
        tree.activations("<tier>", "<device>"): "ActivationBatch",
        tree.adapter("<tier>", "<device>"): "AdapterGradient, AdapterUpload or Reuse, of a split job",
        tree.query("<tier>", "<device>"): "Query, of a split job",
        tree.status("<tier>", "<device>"): "Status, retained; also the last will",
        tree.telemetry("<tier>", "<device>"): "Telemetry, QoS 0",
        tree.weights("<tier>"): "WeightsManifest of every version, retained",
        tree.final_weights("<tier>"): "WeightsManifest of finished versions, or the first good one; retained",
        tree.weights_chunk("<tier>", 0, 0).replace("/0/0", "/<version>/<n>"): "WeightsChunk, retained",
        tree.receipt("<tier>", "<device>"): "Receipt, retained",
        tree.gradient("<tier>", "<device>", 0)[:-1] + "<slot>": "GradientReply, retained",
        tree.prediction("<tier>", "<device>", 0)[:-1] + "<place>": "QueryReply",
        tree.flow("<tier>"): "Flow, retained",
        tree.trainer_status: "TrainerStatus, retained; also the last will",
        tree.trainer_claim: "TrainerClaim",
        tree.rejected("<tier>", "<device>"): "Rejection",
        tree.question("<tier>", "<device>"): "a question, in JSON, for `sidestream agent serve`",
        tree.home("<tier>", "<device>"): "what Home Assistant reads, in JSON, retained",
        tree.echo("<tier>", "<device>"): "any bytes: a device asks whether it may write and read here",
        tree.trainer_echo: "any bytes: the trainer asks the same",
    }
    shown = [(f"`{topic.replace('JOB', '<job>')}`", what) for topic, what in rows.items()]
    return _table(("topic", "payload"), shown)


def _messages_of(module: Any) -> list[type[Message]]:
    """In the order in which they are defined."""
    own = [one for one in vars(module).values() if isinstance(one, type) and issubclass(one, Message)]
    told = [one for one in own if one.__struct_fields__ or one.__struct_config__.tag is not None]
    parts = {base for one in told for base in one.__bases__}  # shown where they are a part
    return [one for one in told if one.__module__ == module.__name__ and one not in parts]


def _section(kind: type[msgspec.Struct]) -> str:
    info = inspect.type_info(kind)
    assert isinstance(info, inspect.StructType)
    helps: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if issubclass(part, Message) and part is not Message:
            helps |= field_help(part)
    rows = [
        (f"`{field.encode_name}`", _type(field.type), _default(field), _plain(_meaning(field, helps)))
        for field in info.fields
    ]
    if info.tag is not None:
        rows.insert(0, (f"`{info.tag_field}`", f"`{info.tag}`", "", "Which of the kinds this is."))
    doc = _plain(python_inspect.cleandoc(kind.__doc__ or ""))
    return f"### {kind.__name__}\n\n{doc}\n\n{_table(('field', 'type', 'default', 'meaning'), rows)}"


def _meaning(field: inspect.Field, helps: dict[str, str]) -> str:
    """In the type's own words where it has some, as a counter's has."""
    if isinstance(field.type, inspect.Metadata) and field.type.extra_json_schema:
        return f"{field.type.extra_json_schema['description']}."
    return helps.get(field.name, "")


def _plain(text: str) -> str:
    """Docstring mark-up as Markdown's."""
    return re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text).replace("``", "`")


def _type(kind: inspect.Type) -> str:
    if isinstance(kind, inspect.Metadata):
        return _type(kind.type)
    if isinstance(kind, inspect.UnionType):
        return " or ".join(_type(one) for one in kind.types)
    if isinstance(kind, inspect.StructType):
        return kind.cls.__name__
    if isinstance(kind, inspect.EnumType):
        return ", ".join(f"`{one.value}`" for one in kind.cls)
    if isinstance(kind, inspect.LiteralType):
        return ", ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, inspect.VarTupleType):
        return f"list of {_type(kind.item_type)}{_bounds(kind, 'length')}"
    if isinstance(kind, inspect.DictType):
        return f"map of {_type(kind.key_type)} to {_type(kind.value_type)}{_bounds(kind, 'length')}"
    if isinstance(kind, inspect.StrType):
        return f"text{_bounds(kind, 'length')}"
    name = {
        inspect.BytesType: "bytes",
        inspect.IntType: "int",
        inspect.FloatType: "float",
        inspect.BoolType: "bool",
        inspect.NoneType: "nil",
    }[type(kind)]
    return name + _bounds(kind, "")


def _bounds(kind: Any, of: str) -> str:
    if of:
        low, high = kind.min_length, kind.max_length
    else:
        low, high = getattr(kind, "ge", None), getattr(kind, "le", None)
    if low is None and high is None:
        return ""
    unbounded = high is None or high >= 2**62
    shown = [f"{low:,}…" if low is not None else "…", "" if unbounded else f"{high:,}"]
    return f" ({'length ' if of else ''}{''.join(shown)})"


def _default(field: inspect.Field) -> str:
    if field.default is not msgspec.NODEFAULT:
        plain = msgspec.to_builtins(field.default)
        return "" if isinstance(plain, dict) else f"`{plain!r}`"
    return "" if field.default_factory is msgspec.NODEFAULT else "empty"


def _verbatim(module: Any) -> str:
    """A module's own words; its tables and formulas are laid out by hand."""
    return f"```text\n{python_inspect.cleandoc(module.__doc__)}\n```"


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
