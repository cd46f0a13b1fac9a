"""Weights as a file: equal states give equal bytes, and no file does harm, whatever it says of itself."""

from __future__ import annotations

import json
import random
import tracemalloc
import zlib
from typing import Any, get_args

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import (
    MAX_HEADER_BYTES,
    About,
    Bundle,
    WeightsCodec,
    decode_bundle,
    digest,
    encode_bundle,
    state_digest,
)
from sidestream.side_network.form import first_blocks, starts_among
from sidestream.side_network.network import SideNetwork, from_bundle
from tests.contract.examples import STREAM

SPEC = SideNetworkSpec(blocks=2, width=8, inner=12)


def _about(**changes: Any) -> About:
    fields: dict[str, Any] = {
        "job": "assist",
        "run": STREAM,
        "version": 9,
        "labels": ("on", "off", "größer"),
        "side_network": SPEC,
        "aligns": {"default": 16, "big.v2": 24},
        "tiers": {"pi": "default", "jetson": "big.v2"},
        **changes,
    }
    return About(**fields)


def _network() -> SideNetwork:
    network = SideNetwork(SPEC, labels=3, seed=1)
    for name, width in _about().aligns.items():
        network.add_align(name, width)
    return network


def _file(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _crafted(tensors: str, data: bytes = bytes(8), about: bytes | None = None) -> bytes:
    """A file with a good description and a tensor header of our making."""
    words = json.dumps((about or msgspec.json.encode(_about())).decode())
    return _file(f'{{"__metadata__":{{"sidestream":{words}}}{tensors}}}'.encode(), data)


def _open(data: bytes) -> Bundle | None:
    """Read a file and build its network; anything but a DecodeError fails the test."""
    try:
        bundle = decode_bundle(data)
        assert all(np.isfinite(array).all() for array in bundle.tensors.values())
        from_bundle(bundle)
    except DecodeError as exc:
        assert len(str(exc)) < 1000
        return None
    return bundle


BUNDLE = encode_bundle(_about(), _network().arrays())


def test_weights_and_description_come_back_as_they_were() -> None:
    arrays, bundle = _network().arrays(), decode_bundle(BUNDLE)
    assert bundle.about == _about()
    assert set(bundle.tensors) == set(arrays)
    assert state_digest(bundle.tensors) == state_digest(arrays)
    assert all(array.flags.writeable and array.dtype == np.float32 for array in bundle.tensors.values())


def test_the_network_of_a_bundle_is_the_one_that_was_written() -> None:
    network = from_bundle(decode_bundle(BUNDLE))
    assert state_digest(network.arrays()) == state_digest(_network().arrays())
    assert sorted(network.align_names) == ["big.v2", "default"]


def test_equal_states_give_equal_bytes_in_whatever_order() -> None:
    arrays = _network().arrays()
    again = encode_bundle(_about(), dict(reversed(arrays.items())))
    assert again == BUNDLE and digest(again) == digest(BUNDLE)


def test_half_precision_halves_the_bytes_and_clips_what_does_not_fit() -> None:
    arrays: dict[str, Floats] = {"w": np.array([1.0, 1e6, -1e6, 1 / 3], np.float32)}
    back = decode_bundle(encode_bundle(_about(), arrays, codec="f16")).tensors["w"]
    assert back.tolist() == [1.0, 65504.0, -65504.0, pytest.approx(1 / 3, rel=2**-11)]
    assert len(encode_bundle(_about(), _network().arrays(), codec="f16")) < 0.7 * len(BUNDLE)


@pytest.mark.parametrize("shape", [(3, 5), (2, 7, 4), (1, 1), (0, 4)])
def test_int8_is_within_half_a_step_of_each_output_and_takes_a_quarter_of_the_bytes(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(4)
    sizes = 10.0 ** rng.integers(-9, 3, (shape[0], 1, *shape[2:]))
    array = (rng.standard_normal(shape) * sizes).astype("f4")
    back = decode_bundle(encode_bundle(_about(), {"w": array}, codec="int8")).tensors["w"]
    assert back.dtype == np.float32 and back.shape == shape
    steps = np.abs(array).max(axis=1, initial=0, keepdims=True) / 127
    assert (np.abs(back - array) <= 0.5 * (steps * (1 + 2**-10) + 2**-24) * (1 + 1e-6)).all()
    assert (
        len(encode_bundle(_about(), {"w": np.ones((256, 256), np.float32)}, codec="int8")) < 256 * 256 * 1.05
    )


def test_int8_keeps_zeros_and_signs_and_clips_what_no_scale_can_hold() -> None:
    arrays: dict[str, Floats] = {
        "w": np.array([[0, 0, 0], [-2, 1, 0], [3e38, -3e38, 1.0]], np.float32),
        "bias": np.array([0.5, -70000.0], np.float32),
    }
    back = decode_bundle(encode_bundle(_about(), arrays, codec="int8")).tensors
    assert back["w"][0].tolist() == [0, 0, 0] and back["w"][1].tolist() == pytest.approx([-2, 1, 0], abs=0.01)
    assert back["w"][2].tolist() == [127 * 65504.0, -127 * 65504.0, 0]
    assert back["bias"].tolist() == [0.5, -65504.0]


@pytest.mark.parametrize("codec", get_args(WeightsCodec))
def test_a_network_of_every_codec_is_built_and_equal_states_give_equal_bytes(codec: WeightsCodec) -> None:
    data = encode_bundle(_about(), _network().arrays(), codec=codec)
    assert _open(data) is not None
    assert encode_bundle(_about(), _network().arrays(), codec=codec) == data
    for length in range(0, len(data), 97):
        assert _open(data[:length]) is None


@pytest.mark.parametrize("shape", [(3, 500), (2, 300, 4)])
def test_packed_is_within_a_sixth_of_an_outputs_root_mean_square_and_takes_half_of_int8(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(4)
    array = (rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 3, (shape[0], 1, *shape[2:]))).astype("f4")
    back = decode_bundle(encode_bundle(_about(), {"w": array}, codec="packed")).tensors["w"]
    size = np.sqrt(np.square(array).mean(axis=1, keepdims=True))
    assert (np.abs(back - array) <= size / 6 * 1.01 + 1e-6).all()
    wide = {"w": rng.standard_normal((256, 256)).astype("f4")}
    sizes = {codec: len(encode_bundle(_about(), wide, codec=codec)) for codec in ("int8", "packed")}
    assert sizes["packed"] < 0.55 * sizes["int8"]


def test_packed_keeps_what_stands_far_out() -> None:
    array = np.ones((1, 4096), np.float32)
    array[0, 7] = -900.0
    back = decode_bundle(encode_bundle(_about(), {"w": array}, codec="packed")).tensors["w"]
    assert back[0, 7] == pytest.approx(-900, rel=0.01)


def test_what_is_packed_is_read_whole_and_by_our_own_code_only() -> None:
    data = encode_bundle(_about(), _network().arrays(), codec="packed")
    mark, body = data[:4], zlib.decompress(data[4:])
    bomb = mark + zlib.compress(body + bytes(10_000_000))
    for broken in (data + b"\0", data[:-1], mark, mark + b"rubbish", mark + body, bomb):
        with pytest.raises(DecodeError, match="packed"):
            decode_bundle(broken)
    assert _open(body) is not None


@pytest.mark.parametrize(
    "tensors",
    [
        ',"w":{"dtype":"I8","shape":[2,4],"data_offsets":[0,8]}',
        ',"w":{"dtype":"I8","shape":[4],"data_offsets":[0,4]},"w:scale":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}',
        ',"w":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},"w:scale":{"dtype":"F32","shape":[1,1],"data_offsets":[4,8]}',
        ',"w":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},"w:scale":{"dtype":"F16","shape":[2],"data_offsets":[4,8]}',
        ',"w":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},"w:scale":{"dtype":"F16","shape":[1,2],"data_offsets":[4,8]}',
        ',"w":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]},"w:scale":{"dtype":"I8","shape":[4,1],"data_offsets":[4,8]}',
        ',"w":{"dtype":"U8","shape":[2,2],"data_offsets":[0,4]},"w:scale":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}',
        ',"w":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},"w:scale":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}',
        ',"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"v:scale":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}',
        ',"w":{"dtype":"I8","shape":[0,9999999],"data_offsets":[0,0]},"w:scale":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}',
    ],
)
def test_int8_without_the_scales_that_go_with_it_is_refused(tensors: str) -> None:
    with pytest.raises(DecodeError, match=r"scale|int8"):
        decode_bundle(_crafted(tensors))


@pytest.mark.parametrize("scale", [b"\x00\x7e", b"\x00\x7c", b"\x00\xbc"])
def test_scales_are_finite_and_not_negative(scale: bytes) -> None:
    tensors = (
        ',"w":{"dtype":"I8","shape":[2,2],"data_offsets":[0,4]}'
        ',"w:scale":{"dtype":"F16","shape":[2,1],"data_offsets":[4,8]}'
    )
    assert decode_bundle(_crafted(tensors, b"\x01\xff\x01\x81" + b"\x00\x3c" * 2)).tensors["w"].tolist() == [
        [1, -1],
        [1, -127],
    ]
    with pytest.raises(DecodeError, match=r"scale|NaN"):
        decode_bundle(_crafted(tensors, b"\x01\xff\x01\x81" + b"\x00\x3c" + scale))


@pytest.mark.parametrize("codec", get_args(WeightsCodec))
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_matrix_that_is_not_finite_is_never_read_as_one_that_is_nan(
    bad: float, codec: WeightsCodec
) -> None:
    data = encode_bundle(_about(), {"w": np.array([[bad, 1.0]], np.float32)}, codec=codec)
    try:
        assert np.isfinite(decode_bundle(data).tensors["w"]).all()
    except DecodeError:
        return


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DecodeError, match="NaN or infinite"):
        decode_bundle(encode_bundle(_about(), {"w": np.array([bad], np.float32)}))


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert _open(data) is None
    assert _open(_file(data)) is None


def test_a_truncated_bundle_is_refused() -> None:
    for length in range(0, len(BUNDLE), 97):
        assert _open(BUNDLE[:length]) is None


@pytest.mark.slow
def test_a_bundle_with_some_bytes_changed_is_read_or_refused() -> None:
    rng, header = random.Random(1), int.from_bytes(BUNDLE[:8], "little")
    for _ in range(600):
        mutated = bytearray(BUNDLE)
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(8 + header)
            action = rng.randrange(4)
            if action == 0:
                mutated[place] = rng.randrange(256)
            elif action == 1:
                mutated[place] = rng.choice(b'0123456789-"[]{},:')
            elif action == 2:
                mutated[place:place] = rng.choice((b"9", b"-", b"[", b"null", b"\xff"))
            else:
                del mutated[place]
        if rng.random() < 0.5:  # keep the length true, so that the header is looked at
            mutated[:8] = (header + len(mutated) - len(BUNDLE)).to_bytes(8, "little")
        _open(bytes(mutated))


@pytest.mark.parametrize(
    "tensors",
    [
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,16]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551615]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,18446744073709551616]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,1e400]}',
        ',"w":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[9223372036854775807,3],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[0,9223372036854775807,4],"data_offsets":[0,0]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"v":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',
        ',"w":{"dtype":"BF16","shape":[4],"data_offsets":[0,8]}',
        ',"w":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}',
        ',"w":{"dtype":"BOOL","shape":[8],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}',
        ',"w":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}',
        ',"w":{"dtype":"O","shape":[1],"data_offsets":[0,8]}',
        ',"w":{"dtype":["F32"],"shape":[2],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":"2","data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[2.0],"data_offsets":[0,8]}',
        ',"w":{"dtype":"F32","shape":[2]}',
        ',"w":null',
        ',"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',
        "",
    ],
)
def test_a_tensor_header_that_lies_is_refused(tensors: str) -> None:
    assert _open(_crafted(tensors)) is None


def test_scalars_and_empty_tensors_do_no_harm() -> None:
    scalar = ',"w":{"dtype":"F32","shape":[],"data_offsets":[0,4]}'
    assert decode_bundle(_crafted(scalar, bytes(4))).tensors["w"].shape == ()
    empty = ',"w":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}'
    assert decode_bundle(_crafted(empty, b"")).tensors["w"].shape == (0, 7)
    assert _open(_crafted(scalar, bytes(4))) is None, "but they are no side-network"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("job", "a/b"),
        ("run", "1"),
        ("version", -1),
        ("version", 2**70),
        ("version", 10**400),
        ("version", 1.5),
        ("labels", []),
        ("labels", ["on", "on"]),
        ("labels", None),
        ("side_network", {"blocks": 0}),
        ("side_network", {"width": 10**9}),
        ("aligns", {}),
        ("aligns", {"default": 0, "big.v2": 24}),
        ("aligns", {"default": 16, "big.v2": 65537}),
        ("aligns", {"default": 16, "big.v2": 24, "": 8}),
        ("aligns", {"default": 16, "big.v2": 24, "a b": 8}),
        ("aligns", {"default": 16, "big.v2": 24, **{f"a{n}": 8 for n in range(64)}}),
        ("tiers", {"pi": "nowhere"}),
        ("tiers", {"p/i": "default"}),
        ("tiers", {f"t{n}": "default" for n in range(65)}),
    ],
)
def test_a_description_that_no_job_may_have_is_refused(key: str, value: Any) -> None:
    body = {**msgspec.to_builtins(_about()), key: value}
    with pytest.raises(DecodeError):
        decode_bundle(_crafted("", b"", json.dumps(body).encode()))


def test_keys_that_a_newer_description_has_are_stepped_over() -> None:
    body = {**msgspec.to_builtins(_about()), "optimiser": {"name": "adamw"}}
    one = ',"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    assert decode_bundle(_crafted(one, bytes(8), json.dumps(body).encode())).about == _about()


@pytest.mark.parametrize(
    "header",
    [
        b"{}",
        b"[]",
        b"null",
        b'{"__metadata__":null}',
        b'{"__metadata__":{}}',
        b'{"__metadata__":{"sidestream":5}}',
        b'{"__metadata__":{"sidestream":"{"}}',
        b'{"__metadata__":{"sidestream":"{}"}}',
        b'{"__metadata__":[[' + b"[" * 100_000,
        b'{"__metadata__":{"sidestream":"' + b"[" * 100_000 + b'"}}',
        b'{"__metadata__":{"sidestream":"\xff"}}',
    ],
)
def test_a_header_that_describes_nothing_is_refused(header: bytes) -> None:
    assert _open(_file(header)) is None


@pytest.mark.parametrize("name", ["keys", "items", "forward", "training", "pop", "weight", "a.b", "0", "A_B"])
def test_an_alignment_map_may_have_any_name_that_a_topic_may(name: str) -> None:
    about = _about(aligns={name: 16}, tiers={"pi": name})
    network = SideNetwork(SPEC, labels=3, seed=1)
    network.add_align(name, 16)
    built = from_bundle(decode_bundle(encode_bundle(about, network.arrays())))
    assert built.align_names == [name]


def test_names_that_look_alike_are_different_maps() -> None:
    network = SideNetwork(SPEC, labels=3, seed=1)
    for name in ("a.b", "a_b", "a-b"):
        network.add_align(name, 16)
    assert network.align_names == ["a.b", "a_b", "a-b"]


@pytest.mark.parametrize("change", ["missing", "extra", "shape", "name"])
def test_tensors_that_are_not_the_networks_are_refused(change: str) -> None:
    arrays = _network().arrays()
    name = next(iter(arrays))
    array = arrays.pop(name)
    if change == "extra":
        arrays |= {name: array, "more": array}
    elif change == "shape":
        arrays[name] = np.zeros((3, 3, 3), np.float32)
    elif change == "name":
        arrays[name + "_"] = array
    with pytest.raises(DecodeError, match="do not fit"):
        from_bundle(decode_bundle(encode_bundle(_about(), arrays)))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"starts": {"other": (2,)}}, "a linear start is of an alignment map that the bundle does not hold"),
        ({"starts": {"default": (9,)}}, "a linear start has more taps than the side-network has blocks"),
        ({"starts": {"default": (0,)}}, "or none"),
        ({"starts": {"default": (1,)}, "task": Task.TOKEN_CLASSIFICATION}, "has no linear start"),
    ],
)
def test_a_linear_start_that_cannot_be_is_refused(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        _about(**changes)


def test_a_device_gets_the_linear_start_of_its_own_number_of_taps() -> None:
    network = _network()
    for taps in range(1, SPEC.blocks + 1):
        network.add_start("default", taps)
    assert starts_among(first_blocks(network.arrays(), 1)) == {"default": (1,)}
    built = from_bundle(
        decode_bundle(encode_bundle(_about(starts=starts_among(network.arrays())), network.arrays()))
    )
    assert sorted(built.arrays()) == sorted(network.arrays())


def test_nothing_is_allocated_on_the_word_of_a_description() -> None:
    """256 blocks of 8,192 by 32,768 would be half a terabyte; the file has eight bytes of weights."""
    huge = SideNetworkSpec(blocks=256, width=8192, inner=32768)
    about = _about(
        side_network=huge,
        aligns={f"a{n}": 65536 for n in range(64)},
        tiers={"pi": "a0"},
        labels=tuple(f"l{n}" for n in range(1024)),
    )
    data = encode_bundle(about, {"w": np.zeros(2, np.float32)})
    assert _open(data) is None


def _peak(data: bytes) -> int:
    """Bytes that Python allocates at the most while the file is refused."""
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode_bundle(data)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_header_over_the_limit_is_not_looked_at() -> None:
    header = b'{"x":[' + b"[]," * (MAX_HEADER_BYTES // 3) + b"[]]}"
    assert _peak(_file(header)) < 100_000
    assert _peak((2**63).to_bytes(8, "little") + b"{}") < 100_000


def test_a_header_of_empty_lists_costs_little_more_than_its_size() -> None:
    header = b'{"x":[' + b"[]," * 300_000 + b"[]]}"
    assert _peak(_file(header)) < 4 * len(header)


_STATES = st.dictionaries(
    st.text(max_size=3),
    st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda row: np.array(row, np.float32)),
    max_size=3,
)


@given(_STATES, _STATES)
def test_two_states_have_one_digest_only_if_they_are_equal(
    one: dict[str, Floats], other: dict[str, Floats]
) -> None:
    equal = one.keys() == other.keys() and all(one[k].tobytes() == other[k].tobytes() for k in one)
    assert (state_digest(one) == state_digest(other)) == equal


def test_a_digest_depends_on_name_shape_and_every_bit_but_not_on_order() -> None:
    array = np.arange(6, dtype=np.float32)
    base = state_digest({"a": array, "b": array})
    assert state_digest({"b": array, "a": array}) == base
    assert state_digest({"a": array.astype(">f4"), "b": np.repeat(array, 2)[::2]}) == base
    assert state_digest({"a": array.astype(np.float64), "b": array}) != base
    nudged = np.nextafter(array, np.float32(9), dtype=np.float32)
    for changed in (
        {"a": array},
        {"a": array, "c": array},
        {"a": array.reshape(2, 3), "b": array},
        {"a": nudged, "b": array},
    ):
        assert state_digest(changed) != base


def test_the_digest_is_pinned() -> None:
    state = {"head.bias": np.array([0.5, -2.0], np.float32), "gates": np.zeros((1, 2), np.float32)}
    assert state_digest(state) == "98f27c4859259346aa8f17550c62751cbd8d425e6a3cd9195a8fe131fb8ac909"
