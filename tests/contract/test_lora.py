"""What a plan may say of LoRA."""

from __future__ import annotations

import msgspec
import pytest

from sidestream.contract.errors import DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.wire import pack, unpack


@pytest.mark.parametrize(
    "spec", [LoraSpec(), LoraSpec(rank=256, alpha=0.5, targets=("query", "attention.output.dense"))]
)
def test_it_travels(spec: LoraSpec) -> None:
    assert unpack(LoraSpec, pack(spec)) == spec


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"alpha": 0.0}, "alpha"),
        ({"alpha": 5000.0}, "alpha"),
        ({"targets": ("query", "query")}, "targets: one is named twice"),
        ({"targets": ("",)}, "targets: each is the name"),
        ({"targets": ("q.*",)}, "targets: each is the name"),
        ({"targets": ("q" * 129,)}, "targets: each is the name"),
        ({"targets": tuple(map(str, range(33)))}, "targets"),
    ],
)
def test_what_is_out_of_bounds_is_refused_by_name(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(DecodeError, match=told):
        unpack(LoraSpec, msgspec.msgpack.encode({"v": 1, **wrong}))
