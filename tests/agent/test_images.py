"""Image files: of every mode and in every state, in a folder or a list, while somebody writes them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from edge_agent.config import DataConfig
from edge_agent.samples.images import ImageSource
from edge_agent.samples.sample import Sample, why_unreadable
from edge_agent.samples.source import SampleSource, check_modality
from edge_agent.samples.sources import open_source, read_evaluation
from edge_agent.samples.survey import survey
from sidestream.backbone.images.decoding import decode, image_at, read_image
from sidestream.backbone.inputs import ImageFile, from_kept, to_kept
from sidestream.contract.errors import ConfigError, DataError
from sidestream.contract.tasks import Task
from tests.agent.tiny_vision import file_of, pixels, write_images

JPEG = file_of(pixels(1, (64, 48)), "JPEG", quality=95)
PNG = file_of(pixels(1, (64, 48)))


def source(path: Path, **more: Any) -> SampleSource:
    return open_source(DataConfig(path=str(path), **more))


def names(samples: list[Sample]) -> list[tuple[str, str | None]]:
    found = []
    for one in samples:
        assert isinstance(one.input, ImageFile)
        found.append((Path(one.input.path).name, one.label))
    return found


def forged(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# --- what is in a file -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_of_photographs_are_read(kind: str) -> None:
    assert decode(file_of(pixels(1), kind), "a").mode == "RGB"


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "RGBA", "LA", "I;16", "I", "F"])
def test_every_mode_becomes_the_colours_that_one_sees(mode: str) -> None:
    grey, deep = Image.new("L", (8, 8), 255 if mode == "1" else 200), np.full((8, 8), 200 * 257, np.uint16)
    image = Image.fromarray(deep) if mode == "I;16" else grey.convert(mode)
    seen = np.asarray(decode(file_of(image, "TIFF"), "a"), dtype=int)
    wanted = 255 if mode == "1" else 200
    assert seen.shape == (8, 8, 3) and np.abs(seen - wanted).max() <= 2


def test_what_can_be_seen_through_lies_on_white() -> None:
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert np.asarray(decode(file_of(clear), "a")).min() == 255


def test_a_photograph_is_turned_as_the_camera_says() -> None:
    left = Image.new("RGB", (40, 20), "black")
    left.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, clockwise
    turned = np.asarray(decode(file_of(left, "PNG", exif=exif.tobytes()), "a"))
    assert turned.shape[:2] == (40, 20) and turned[:15].mean() > 250 and turned[25:].mean() < 5


def test_a_huge_jpeg_is_scaled_down_while_it_is_read_and_stays_large_enough() -> None:
    large = file_of(pixels(1, (1600, 1200)), "JPEG")
    found = decode(large, "a", least=300)
    assert min(found.size) >= 300 and max(found.size) < 1600


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"not an image at all", "is no image that can be read here"),
        (JPEG[: len(JPEG) // 2], "is a broken image, or only half of one"),
        (PNG[: len(PNG) // 2], "is a broken image, or only half of one"),
        (forged(30_000, 30_000), "million"),
        (forged(9_000, 9_000), "has 9000 x 9000 pixels; 64 million at most"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image that can be read here"),
    ],
)
def test_what_is_no_image_is_one_line_that_names_the_file(data: bytes, said: str) -> None:
    with pytest.raises(DataError) as error:
        decode(data, "photo.jpg")
    assert str(error.value).startswith("photo.jpg: ") and said in str(error.value)
    assert "\n" not in str(error.value)


@given(st.data())
def test_damaged_files_raise_only_our_error(data: st.DataObject) -> None:
    whole = bytearray(
        data.draw(st.sampled_from([JPEG, PNG, file_of(pixels(2), "GIF"), file_of(pixels(2), "TIFF")]))
    )
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode(bytes(whole[: data.draw(st.integers(1, len(whole)))]), "a").mode == "RGB"
    except DataError as exc:
        assert "\n" not in str(exc)


def test_an_image_is_held_against_what_it_was_when_it_was_found(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    one = image_at(path)
    assert from_kept(to_kept(one)) == one and read_image(one).size == (64, 48)
    path.write_bytes(file_of(pixels(2)))
    with pytest.raises(DataError, match="has been written to since"):
        read_image(one)
    path.unlink()
    assert "cannot be read" in why_unreadable(one)


# --- folders and lists -----------------------------------------------------------------------------------


def test_a_label_is_the_first_sub_folder_and_files_beside_them_have_none(tmp_path: Path) -> None:
    write_images(tmp_path, ("cat", "dog"), 1)
    (tmp_path / "cat" / "2026").mkdir()
    (tmp_path / "cat" / "2026" / "b.JPG").write_bytes(JPEG)
    (tmp_path / "new.png").write_bytes(PNG)
    (tmp_path / ".part.png").write_bytes(PNG)
    found = source(tmp_path)
    assert isinstance(found, ImageSource) and found.labels(lambda label: [label]) == ("cat", "dog")
    assert names(list(found.read())) == [
        ("new.png", None),
        ("0000.png", "cat"),
        ("b.JPG", "cat"),
        ("0000.png", "dog"),
    ]
    assert found.ended


def test_equal_files_with_equal_labels_are_one_sample_under_every_name(tmp_path: Path) -> None:
    for name in ("a/1.png", "a/2.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PNG)
    keys = [one.key for one in source(tmp_path).read()]
    assert keys[0] == keys[1] != keys[2]
    (tmp_path / "a/1.png").rename(tmp_path / "a/9.png")
    assert {one.key for one in source(tmp_path).read()} == set(keys)


def test_a_list_names_images_relative_to_itself(tmp_path: Path) -> None:
    write_images(tmp_path / "images", ("cat",), 2)
    listed = tmp_path / "list.csv"
    listed.write_text("image,label\nimages/cat/0000.png,cat\nimages/gone.png,dog\nimages/cat/0001.png,\n")
    found = list(source(listed, format="images").read())
    assert [one.broken for one in found] == [False, True, False]
    assert names([one for one in found if not one.broken]) == [("0000.png", "cat"), ("0001.png", None)]
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text(json.dumps({"photo": str(tmp_path / "images/cat/0000.png"), "label": "cat"}) + "\n")
    assert names(list(source(jsonl, format="images", image_column="photo").read())) == [("0000.png", "cat")]


def test_a_watched_file_is_taken_up_once_it_is_the_same_twice(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    watched = source(tmp_path, format="images", watch=True)
    path = tmp_path / "cat" / "a.jpg"
    assert list(watched.read()) == [] and not watched.ended
    path.write_bytes(JPEG[:100])
    assert list(watched.read()) == []
    with path.open("ab") as file:
        file.write(JPEG[100:])
    assert list(watched.read()) == [] and names(list(watched.read())) == [("a.jpg", "cat")]
    assert list(watched.read()) == []


def test_a_half_written_file_is_told_of_and_used_when_it_is_whole(tmp_path: Path) -> None:
    watched, path = source(tmp_path, format="images", watch=True), tmp_path / "a.jpg"
    path.write_bytes(JPEG[: len(JPEG) // 2])
    (half,) = [one for _ in range(2) for one in watched.read()]
    assert "only half of one" in why_unreadable(half.input)
    path.write_bytes(JPEG)
    (whole,) = [one for _ in range(2) for one in watched.read()]
    assert why_unreadable(whole.input) == "" and whole.key != half.key


def test_an_image_that_is_overwritten_is_another_sample_and_a_touched_one_is_not(tmp_path: Path) -> None:
    watched, path = source(tmp_path, format="images", watch=True), tmp_path / "latest.png"
    path.write_bytes(PNG)
    (first,) = [one for _ in range(2) for one in watched.read()]
    path.write_bytes(file_of(pixels(7)))
    (second,) = [one for _ in range(2) for one in watched.read()]
    os.utime(path, ns=(1, 1))
    again = [one for _ in range(2) for one in watched.read()]
    assert first.key != second.key and {one.key for one in again} <= {second.key}


def test_a_list_may_name_an_image_before_it_is_there(tmp_path: Path) -> None:
    listed = tmp_path / "list.csv"
    listed.write_text("image,label\na.png,cat\n")
    watched = source(listed, format="images", watch=True)
    assert list(watched.read()) == []
    (tmp_path / "a.png").write_bytes(PNG)
    assert names([one for _ in range(2) for one in watched.read()]) == [("a.png", "cat")]


def test_a_folder_without_images_and_one_that_is_gone_are_told_of(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.path: no image in .*\.jpg"):
        source(tmp_path, format="images")
    with pytest.raises(DataError, match=r"data\.path: there is no folder of images"):
        source(tmp_path / "gone", format="images")
    with pytest.raises(ConfigError, match=r"data\.format: images come as files"):
        DataConfig(path="-", format="images")


def test_files_whose_names_are_no_images_are_counted_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "b.heic").write_bytes(b"x")
    with caplog.at_level("WARNING"):
        assert len(list(source(tmp_path).read())) == 1
    assert "1 files are left out, for their names are no image's, such as b.heic" in caplog.text


def test_a_source_of_the_wrong_kind_is_refused_with_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "rows.csv").write_text("text,label\na,b\n")
    with pytest.raises(DataError, match=r"whose samples are texts; give a file of texts"):
        check_modality(source(tmp_path, format="images"), Task.TEXT_CLASSIFICATION)
    with pytest.raises(DataError, match=r"whose samples are images; set data\.format to images"):
        check_modality(source(tmp_path), Task.IMAGE_CLASSIFICATION)
    check_modality(open_source(DataConfig()), Task.IMAGE_CLASSIFICATION)


def test_a_survey_counts_what_can_be_read(tmp_path: Path) -> None:
    write_images(tmp_path, ("cat",), 2)
    (tmp_path / "new.png").write_bytes(PNG)
    (tmp_path / "half.jpg").write_bytes(JPEG[:300])
    found = survey(DataConfig(path=str(tmp_path), watch=True))
    assert str(found) == "4 rows, of which 1 unreadable, 1 without a label"


def test_images_for_evaluation_are_shared_out_as_rows_are(tmp_path: Path) -> None:
    write_images(tmp_path, ("cat", "dog"), 3)
    config = DataConfig(evaluation_path=str(tmp_path), format="images")
    parts = [read_evaluation(config, (part, 2)) for part in range(2)]
    assert [len(part) for part in parts] == [3, 3]
    assert {row.label for part in parts for row in part} == {"cat", "dog"}
