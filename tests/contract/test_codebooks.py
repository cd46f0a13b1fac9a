"""Product quantisation: the nearest centroids are written, whatever is read is checked, rows stand alone."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.backbone.codebook_file import About, CodebookFile
from sidestream.contract.codebooks import Codebook, Codebooks, Floats
from sidestream.contract.errors import BackboneError, DecodeError
from sidestream.contract.tensors import Codec, Tensor, decode, encode, encoded_sizes, join, take
from sidestream.contract.wire import pack, unpack
from tests.contract.examples import batch, codebooks

BOOKS = codebooks()
CODED = pytest.mark.parametrize("codec", [Codec.PQ1, Codec.PQ2])


def _vectors(seed: int = 0, count: int = 5) -> Floats:
    return np.random.default_rng(seed).normal(size=(2, count, 16)).astype(np.float32) * 3


def _file(**changes: object) -> CodebookFile:
    about = About(model="m", fingerprints=("aa", "bb", "cc"), texts={"a.txt": "00"})
    return CodebookFile(about=about, by_layer=dict(zip((1, 3), BOOKS.by_tap, strict=True)))


def test_each_eight_values_become_the_number_of_the_nearest_centroid() -> None:
    values = _vectors()
    tensor = encode(values, Codec.PQ1, BOOKS.id)
    codes = np.frombuffer(tensor.data, np.uint8).reshape(2, 5, 2)
    for tap, book in enumerate(BOOKS.by_tap):
        turned = (values[tap] @ book.rotation.astype(np.float32)).reshape(5, 2, 8)
        distances = np.square(turned[:, :, None] - book.centroids[0].astype(np.float32)).sum(axis=-1)
        assert np.array_equal(codes[tap], distances.argmin(axis=-1))


def test_a_second_stage_comes_closer() -> None:
    values = _vectors()
    first, second = (decode(encode(values, codec, BOOKS.id)) for codec in (Codec.PQ1, Codec.PQ2))
    assert np.square(values - second).sum() < 0.9 * np.square(values - first).sum()


@CODED
def test_a_code_takes_a_byte_a_stage_and_eight_values(codec: Codec) -> None:
    assert encoded_sizes(codec, (3, 7, 384)) == (3 * 7 * 48 * codec.stages, 0)
    assert encode(_vectors(), codec, BOOKS.id).nbytes == 2 * 5 * 2 * codec.stages


@CODED
@given(st.lists(st.integers(0, 199), min_size=1, max_size=8), st.integers(0, 2**32))
def test_a_vector_is_read_alike_alone_and_among_others(codec: Codec, rows: list[int], seed: int) -> None:
    whole = encode(_vectors(seed, 200), codec, BOOKS.id)
    assert np.array_equal(decode(take(whole, np.array(rows))), decode(whole)[:, rows])


@CODED
def test_what_was_kept_apart_is_joined_as_it_stands(codec: Codec) -> None:
    values = _vectors()
    parts = [encode(values[:, start : start + 1], codec, BOOKS.id) for start in range(5)]
    assert join(parts) == encode(values, codec, BOOKS.id)


@CODED
@given(st.data())
def test_any_codes_of_the_right_number_are_read_as_finite_values(codec: Codec, data: st.DataObject) -> None:
    size, _ = encoded_sizes(codec, (2, 3, 16))
    codes = data.draw(st.binary(min_size=size, max_size=size))
    tensor = Tensor(codec=codec, shape=(2, 3, 16), data=codes, codebooks=BOOKS.id)
    assert np.isfinite(decode(tensor)).all()


@CODED
@pytest.mark.parametrize("more", [-1, 1])
def test_a_code_more_or_less_is_refused(codec: Codec, more: int) -> None:
    size, _ = encoded_sizes(codec, (2, 3, 16))
    with pytest.raises(DecodeError, match="takes"):
        Tensor(codec=codec, shape=(2, 3, 16), data=bytes(size + more), codebooks=BOOKS.id)


@CODED
@pytest.mark.parametrize("shape", [(16,), (2, 3, 15), (1, 2, 3, 16)])
def test_a_shape_without_whole_groups_is_refused(codec: Codec, shape: tuple[int, ...]) -> None:
    with pytest.raises(DecodeError, match="width that 8 divides"):
        Tensor(codec=codec, shape=shape, data=bytes(9), codebooks=BOOKS.id)


@CODED
@pytest.mark.parametrize("name", [b"", b"short", bytes(17), msgspec.UNSET])
def test_codebooks_are_named_by_sixteen_bytes(codec: Codec, name: bytes | msgspec.UnsetType) -> None:
    size, _ = encoded_sizes(codec, (2, 3, 16))
    with pytest.raises(DecodeError, match="names its codebooks"):
        Tensor(codec=codec, shape=(2, 3, 16), data=bytes(size), codebooks=name)


def test_other_codecs_name_none() -> None:
    with pytest.raises(DecodeError, match="takes no codebooks"):
        Tensor(codec=Codec.F16, shape=(1,), data=bytes(2), codebooks=BOOKS.id)
    assert b"codebooks" not in pack(batch())


def test_codebooks_that_are_not_here_are_an_error_of_the_sender() -> None:
    tensor = Tensor(codec=Codec.PQ1, shape=(2, 1, 16), data=bytes(4), codebooks=bytes(16))
    with pytest.raises(DecodeError, match="are not here"):
        decode(tensor)
    with pytest.raises(DecodeError, match="are not here"):
        encode(_vectors(), Codec.PQ1)


@pytest.mark.parametrize(("shape", "size"), [((3, 2, 16), 12), ((2, 3, 24), 18), ((3, 16), 6)])
def test_codebooks_of_other_taps_or_widths_read_nothing(shape: tuple[int, ...], size: int) -> None:
    with pytest.raises(DecodeError, match="not of its codebooks"):
        decode(Tensor(codec=Codec.PQ1, shape=shape, data=bytes(size), codebooks=BOOKS.id))


def test_one_tap_is_written_without_its_dimension() -> None:
    book = codebooks(taps=1)
    values = _vectors()[0]
    assert np.array_equal(
        decode(encode(values, Codec.PQ2, book.id)), decode(encode(values[None], Codec.PQ2, book.id))[0]
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_never_written(bad: float) -> None:
    values = _vectors()
    values[0, 0, 0] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        encode(values, Codec.PQ1, BOOKS.id)


def test_an_id_changes_with_any_value_and_with_the_order_of_taps() -> None:
    book, other = BOOKS.by_tap
    changed = book.centroids.copy()
    changed[1, 1, 255, 7] += np.float16(0.5)
    found = {
        BOOKS.id,
        Codebooks((other, book)).id,
        Codebooks((Codebook(centroids=changed, rotation=book.rotation), other)).id,
        Codebooks((book.first(1), other.first(1))).id,
    }
    assert len(found) == 4


def test_a_batch_keeps_its_codes_through_the_wire_and_in_parts() -> None:
    sent = batch(activations=encode(_vectors(count=6), Codec.PQ1, BOOKS.id))
    back = unpack(type(sent), pack(sent))
    assert back == sent
    kept = back.select([2, 0]).activations
    assert np.array_equal(decode(kept), decode(sent.activations)[:, [3, 4, 5, 0, 1]])


# --- the file --------------------------------------------------------------------------------------------


def test_a_file_says_whose_it_is_and_gives_back_what_was_written() -> None:
    again = CodebookFile.from_bytes(_file().to_bytes())
    assert again.about == _file().about and list(again.by_layer) == [1, 3]
    assert again.of_taps((1, 3), 2).id == BOOKS.id
    assert again.cut_to((3,), 1).of_taps((3,), 1).id == Codebooks((BOOKS.by_tap[1].first(1),)).id


def test_a_file_of_another_backbone_a_missing_layer_and_a_missing_stage_are_named() -> None:
    file = _file()
    file.check("bb", 2)
    for fingerprint, layers in (("bb", 3), ("dd", 1), ("aa", 4), ("aa", 0)):
        with pytest.raises(BackboneError, match=r"of another backbone .*sidestream backbone codebooks"):
            file.check(fingerprint, layers)
    with pytest.raises(BackboneError, match=r"no codebook for layer 2, .*--layers 1,2,3"):
        file.of_taps((1, 2), 1)
    with pytest.raises(BackboneError, match="--stages 2"):
        file.cut_to((1,), 1).of_taps((1,), 2)


@given(st.binary(max_size=300) | st.integers(0, 2**32).map(lambda seed: _broken(seed)))
def test_bytes_that_are_no_file_raise_one_error(data: bytes) -> None:
    try:
        found = CodebookFile.from_bytes(data)
    except DecodeError:
        return
    assert all(np.isfinite(one.centroids).all() for one in found.by_layer.values())


def _broken(seed: int) -> bytes:
    """A file with some bytes of its head changed, or cut short."""
    rng = np.random.default_rng(seed)
    data = bytearray(_file().to_bytes())
    for place in rng.integers(0, 500, rng.integers(1, 4)):
        data[place] = rng.integers(0, 256)
    return bytes(data[: rng.integers(1, len(data))]) if rng.random() < 0.3 else bytes(data)
