"""What computes the backbone on a benchmark's devices, where it is not torch in f32: by tier."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, get_args

from benchmarks.program import Tell
from benchmarks.workload import Workload
from sidestream.backbone.runtimes import set_threads
from sidestream.backbone.torch_runtime.export import export
from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import Precision

KINDS: Final = ("torch-f32", "torch-bf16", "torch-int8", "onnx-f32", "onnx-int8")


class OnDevice(NamedTuple):
    """Where a device has its backbone."""

    reference: str
    precision: Precision


def parse_runtime(text: str) -> tuple[str, str]:
    """Read ``TIER=KIND``.

    Raises:
        ValueError: it is none.
    """
    tier, equals, kind = text.partition("=")
    if not tier or not equals or kind not in KINDS:
        raise ValueError(f"{text!r} is not TIER=KIND with a kind of {', '.join(KINDS)}")
    return tier, kind


def prepare(work: Workload, kinds: Mapping[str, str], folder: Path, tell: Tell) -> dict[str, OnDevice]:
    """What the devices of each tier load; folders for onnxruntime are exported, once for each model.

    Raises:
        ConfigError: a tier is none of the work's.
    """
    if strange := sorted(set(kinds) - set(work.tiers)):
        raise ConfigError("--tier-runtime", f"{strange[0]!r} is none of the tiers {', '.join(work.tiers)}")
    found, exported = {}, dict[tuple[str, str], Path]()
    for tier, kind in kinds.items():
        runtime, _, wanted = kind.partition("-")
        (precision,) = (one for one in get_args(Precision) if one == wanted)
        reference = work.backbone_of(tier)
        if runtime == "onnx":
            set_threads(1, "onnx")  # as torch here has
            key = (reference, wanted)
            if key not in exported:
                exported[key] = folder / f"exported-{len(exported)}"
                export(reference, exported[key], precision="int8" if wanted == "int8" else "f32", tell=tell)
            reference = str(exported[key])
        found[tier] = OnDevice(reference, precision)
    return found
