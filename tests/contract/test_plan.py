"""The plan says nothing that a device could not do; policies, taps and label lists follow their rules."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.plan import (
    MAX_TIERS,
    Plan,
    SideNetworkSpec,
    TierPlan,
    joining_taps,
    labels_id,
    nested_taps,
    tap_layers,
)
from sidestream.contract.sampling import (
    DEFAULT_LADDER,
    KINDS,
    MAX_COUNT,
    MAX_RUNGS,
    Assignable,
    Rung,
    Sampling,
    parse_sampling,
)
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, encoded_sizes
from sidestream.contract.wire import pack, unpack
from tests.contract.examples import plan


def _settled(**changes: Any) -> TierPlan:
    fields: dict[str, Any] = {"depth": 6, "width": 384, "taps": (1, 3, 6), "fingerprint": "ab", **changes}
    return TierPlan(backbone="package:m", **fields)


def test_a_plan_comes_back_as_it_was() -> None:
    assert unpack(Plan, pack(plan())) == plan()


def test_a_device_may_compute_once_labels_and_tier_are_known() -> None:
    assert plan().ready_for("full")
    assert not plan().ready_for("half"), "its depth is not known"
    assert not plan().ready_for("toaster")
    assert not plan(labels=()).ready_for("full")
    for missing in ({"depth": 0, "taps": ()}, {"width": 0}, {"fingerprint": ""}, {"taps": ()}):
        assert not _settled(**missing).settled


def test_tiers_of_one_alignment_map_have_one_width() -> None:
    with pytest.raises(DecodeError, match="'align' of its own"):
        plan(tiers={"a": _settled(), "b": _settled(width=512)})
    plan(tiers={"a": _settled(), "b": _settled(width=512, align="wide")})
    plan(tiers={"a": _settled(), "b": _settled(width=512, fingerprint="")})


def test_a_tier_has_no_more_taps_than_the_side_network_has_blocks() -> None:
    with pytest.raises(DecodeError, match="more than the side-network's 2 blocks"):
        plan(tiers={"a": _settled()}, side_network=SideNetworkSpec(blocks=2))


@pytest.mark.parametrize("taps", [(0,), (7,), (3, 2), (2, 2), (-1, 2), (1, 2**62)])
def test_taps_ascend_within_the_backbone(taps: tuple[int, ...]) -> None:
    with pytest.raises(DecodeError, match="taps"):
        _settled(taps=taps)


@pytest.mark.parametrize(
    "changes",
    [
        {"job": "a/b"},
        {"job": ""},
        {"run": "1"},
        {"labels": ("on", "on")},
        {"labels": ("on", "")},
        {"labels": ("x" * 129,)},
        {"labels": tuple(f"l{n}" for n in range(1025))},
        {"tiers": {"a/b": _settled()}},
        {"tiers": {"": _settled()}},
        {"tiers": {"#": _settled()}},
    ],
)
def test_a_plan_that_no_job_may_have_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(DecodeError):
        plan(**changes)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tiers",), {}),
        (("tiers",), {f"t{n}": {"backbone": "m"} for n in range(MAX_TIERS + 1)}),
        (("tiers", "full", "batch_size"), 257),
        (("tiers", "full", "max_tokens"), 3),
        (("tiers", "full", "codec"), "int3"),
        (("tiers", "full", "sampling"), "segments:65"),
        (("tiers", "full", "align"), "a/b"),
        (("tiers", "full", "precision"), "f16"),
        (("tiers", "full", "ladder"), [{"sampling": "some", "codec": "int4"}]),
        (("tiers", "full", "ladder"), [{"sampling": "mean", "codec": "int3"}]),
        (("tiers", "full", "ladder"), [{"sampling": "mean", "codec": "int4"}] * (MAX_RUNGS + 1)),
        (("side_network", "blocks"), 0),
        (("side_network", "width"), 8193),
        (("flow", "window"), 0),
        (("flow", "retry_s"), 0.0),
        (("flow", "retry_s"), float("nan")),
        (("flow", "retry_s"), float("inf")),
        (("task",), "haruspicy"),
    ],
)
def test_a_value_outside_its_bounds_is_refused_on_arrival(path: tuple[str, ...], value: Any) -> None:
    body = msgspec.to_builtins(plan())
    place = body
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(DecodeError):
        unpack(Plan, msgspec.msgpack.encode({"v": 1, **body}))


_LABELS = st.lists(st.text(max_size=4) | st.sampled_from(["a", "b", "a\0b", "1:a", "\0"]), max_size=4)


@given(_LABELS, _LABELS)
def test_two_label_lists_have_one_id_only_if_they_are_equal(one: list[str], other: list[str]) -> None:
    assert (labels_id(one) == labels_id(other)) == (one == other)
    assert len(labels_id(one)) == 16


def test_a_zero_byte_in_a_label_makes_no_other_list_of_it() -> None:
    assert labels_id(["a", "b"]) != labels_id(["a\0b"])


@given(st.integers(1, 100), st.integers(1, 40))
def test_taps_end_equal_parts_of_the_backbone(depth: int, blocks: int) -> None:
    taps = tap_layers(depth, blocks)
    assert len(taps) == min(depth, blocks)
    assert taps[-1] == depth and taps[0] >= 1
    gaps = {after - before for before, after in zip((0, *taps), taps, strict=False)}
    assert max(gaps) - min(gaps) <= 1 and min(gaps) >= 1


def test_known_taps_stay_as_they_are() -> None:
    assert tap_layers(6, 3) == (2, 4, 6)
    assert tap_layers(12, 5) == (3, 5, 8, 10, 12)
    assert tap_layers(2, 3) == (1, 2)


@pytest.mark.parametrize(
    ("depth", "taps", "joined"),
    [
        (6, (1, 3), (1, 3, 6)),
        (4, (1, 3, 6), (1, 3, 4)),
        (3, (1, 3, 6), (1, 3)),
        (2, (1, 3, 6), (1, 2)),
        (1, (2, 4, 6), (1,)),
        (12, (2, 4, 6), (2, 4, 12)),
    ],
)
def test_a_latecomer_taps_what_its_family_taps_and_its_own_last_layer(
    depth: int, taps: tuple[int, ...], joined: tuple[int, ...]
) -> None:
    assert joining_taps(depth, 3, taps) == joined


@given(st.lists(st.integers(1, 48), min_size=3, max_size=3).map(sorted), st.integers(1, 16))
def test_taps_of_a_family_are_nested(depths: list[int], blocks: int) -> None:
    shallowest, depth, deeper = depths
    taps, deep = nested_taps(depth, blocks, shallowest), nested_taps(deeper, blocks, shallowest)
    low = nested_taps(shallowest, blocks, shallowest)
    for one, layers in ((taps, depth), (deep, deeper), (low, shallowest)):
        assert list(one) == sorted(set(one)) and one[0] >= 1 and one[-1] <= layers and len(one) <= blocks
    assert taps[-1] == depth and deep[-1] == deeper
    if blocks > 1:
        assert set(low) <= set(taps), "a deep member sends what a shallow one would have sent"
        assert {tap for tap in taps if tap <= shallowest} == {tap for tap in deep if tap <= shallowest}


@given(st.text(max_size=20) | st.builds("{}:{}".format, st.sampled_from(KINDS), st.text(max_size=5)))
def test_a_policy_is_read_or_a_setting_to_correct(text: str) -> None:
    try:
        policy = parse_sampling(text, "tier.sampling")
    except ConfigError as exc:
        assert exc.field == "tier.sampling"
    else:
        assert text.split(":")[0] == policy.kind
        assert 1 <= policy.count <= MAX_COUNT


@pytest.mark.parametrize(
    ("text", "policy", "most"),
    [
        ("pivot", Sampling(kind="pivot"), 1),
        ("mean", Sampling(kind="mean"), 1),
        ("all", Sampling(kind="all"), 16),
        ("segments:4", Sampling(kind="segments", count=4), 4),
        ("segments:64", Sampling(kind="segments", count=64), 16),
        ("random:8", Sampling(kind="random", count=8), 8),
        ("important:32", Sampling(kind="important", count=32), 16),
    ],
)
def test_policies_say_how_many_vectors_they_send(text: str, policy: Sampling, most: int) -> None:
    assert parse_sampling(text) == policy
    assert policy.most_tokens(16) == most


def test_the_ladder_falls_for_a_sample_of_a_usual_length() -> None:
    sizes = [
        sum(encoded_sizes(rung.codec, (3, parse_sampling(rung.sampling).most_tokens(25), 384)))
        for rung in DEFAULT_LADDER
    ]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 80 * sizes[-1]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "segments",
            "segments:",
            "segments:0",
            "segments:65",
            "segments:-1",
            "segments: 4",
            "segments:4 ",
        ),
        *("random", "random:0", "random:65", "important", "important:", "important:-2"),
        *("segments:٤", "segments:²", "mean:1", "pivot:", "Mean", "all:2", "segments:4:4", "segments:1e1"),
    ],
)
def test_what_is_no_policy_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="sampling"):
        parse_sampling(text)


def test_what_may_be_assigned_may_be_uploaded_and_takes_codebooks_where_it_is_a_code() -> None:
    def assignable(*rungs: Rung) -> Assignable:
        return Assignable(batch_size_min=1, batch_size_max=2, max_tokens_min=8, max_tokens_max=9, rungs=rungs)

    pivot, coded = Rung(sampling="pivot", codec=Codec.F16), Rung(sampling="all", codec=Codec.PQ1)
    assert "pivot" in _settled(assignable=assignable(pivot)).policies(Task.TEXT_CLASSIFICATION)
    assert "pivot" not in _settled().policies(Task.TEXT_CLASSIFICATION)
    with pytest.raises(DecodeError, match="codebooks"):
        _settled(assignable=assignable(coded))


@pytest.mark.parametrize("field", ["batch_size", "max_tokens"])
def test_bounds_that_leave_nothing_are_none(field: str) -> None:
    bounds = {"batch_size_min": 4, "batch_size_max": 4, "max_tokens_min": 9, "max_tokens_max": 9}
    rungs = (Rung(sampling="mean", codec=Codec.INT8),)
    Assignable(**bounds, rungs=rungs)
    with pytest.raises(DecodeError, match="more than the most"):
        Assignable(**{**bounds, f"{field}_max": bounds[f"{field}_max"] - 1}, rungs=rungs)
