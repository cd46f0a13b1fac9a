"""Codebooks on a device: fitted once by a command, found beside the backbone, or handed out and checked."""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edge_agent.weights.codebooks import CodebooksInbox, find_codebooks
from sidestream.backbone.codebook_file import FILE_NAME, About, CodebookFile, read, write
from sidestream.backbone.codebook_fitting import codebook
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.cli import main
from sidestream.contract.codebooks import Codebooks
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import CodebooksChunk
from sidestream.contract.plan import TierPlan
from sidestream.contract.tensors import Codec
from tests.agent.fleet import sentence
from tests.contract.examples import codebooks

BOOKS = codebooks()
ABOUT = About(model="m", fingerprints=("a", "b", "c"), texts={})
FILE = CodebookFile(about=ABOUT, by_layer=dict(zip((1, 3), BOOKS.by_tap, strict=True)))


def _tier(books: Codebooks = BOOKS, **changes: Any) -> TierPlan:
    facts = {"depth": 3, "width": 16, "taps": (1, 3), "fingerprint": "c", "codec": Codec.PQ1}
    return TierPlan(**{"backbone": "m", "codebooks": books.id.hex(), **facts, **changes})


def _chunks(content: CodebookFile = FILE, parts: int = 3, id_: bytes = BOOKS.id) -> list[CodebooksChunk]:
    data = zlib.compress(content.to_bytes())
    size = -(-len(data) // parts)
    return [
        CodebooksChunk(id=id_.hex(), index=index, chunks=parts, data=data[index * size : (index + 1) * size])
        for index in range(parts)
    ]


def _other() -> CodebookFile:
    """Of the same layers and shape, and fitted to something else."""
    return CodebookFile(about=ABOUT, by_layer=dict(zip((3, 1), BOOKS.by_tap, strict=True)))


def test_parts_in_any_order_make_codebooks_that_a_restart_finds_again(tmp_path: Path) -> None:
    inbox = CodebooksInbox(tmp_path, "nowhere")
    assert not inbox.look(_tier())
    for chunk in (*_chunks()[::-1][:2], *_chunks()[2:], *_chunks()[:1]):
        assert not inbox.found.is_set()
        inbox.on_chunk(chunk)
    assert inbox.found.is_set()
    assert CodebooksInbox(tmp_path, "nowhere").look(_tier())


@pytest.mark.parametrize(
    ("chunks", "told"),
    [
        (_chunks(_other()), "not those that the plan names"),
        ([*_chunks()[:2], msgspec.structs.replace(_chunks()[2], data=b"")], "cut short"),
        ([msgspec.structs.replace(_chunks(parts=1)[0], data=b"junk")], "damaged"),
        ([msgspec.structs.replace(_chunks(parts=1)[0], data=zlib.compress(b"junk"))], "no file of codebooks"),
    ],
)
def test_what_the_plan_does_not_name_is_refused_and_the_right_ones_are_still_taken(
    tmp_path: Path, chunks: list[CodebooksChunk], told: str
) -> None:
    inbox = CodebooksInbox(tmp_path, "nowhere")
    inbox.look(_tier())
    for chunk in chunks[:-1]:
        inbox.on_chunk(chunk)
    with pytest.raises(DecodeError, match=told):
        inbox.on_chunk(chunks[-1])
    assert not inbox.found.is_set() and not list(tmp_path.iterdir())
    for chunk in _chunks():
        inbox.on_chunk(chunk)
    assert inbox.found.is_set()


def test_parts_of_codebooks_that_nobody_asked_for_are_passed_over(tmp_path: Path) -> None:
    inbox = CodebooksInbox(tmp_path, "nowhere")
    inbox.on_chunk(_chunks(parts=1)[0])
    inbox.look(_tier())
    inbox.on_chunk(_chunks(parts=1, id_=bytes(16))[0])
    assert not inbox.found.is_set()


def test_what_unzips_to_more_than_codebooks_ever_take_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.weights.codebooks.MAX_BYTES", 1000)
    inbox = CodebooksInbox(tmp_path, "nowhere")
    inbox.look(_tier())
    bomb = msgspec.structs.replace(_chunks(parts=1)[0], data=zlib.compress(bytes(2000)))
    with pytest.raises(DecodeError, match="too large"):
        inbox.on_chunk(bomb)


def test_those_beside_the_backbone_are_used_if_the_plan_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, beside = tmp_path / "state", tmp_path / "backbone"
    state.mkdir()
    beside.mkdir()
    write(beside / FILE_NAME, FILE)
    first = Codebooks(tuple(one.first(1) for one in BOOKS.by_tap))
    assert find_codebooks(_tier(), state, str(beside))
    assert find_codebooks(_tier(first), state, str(beside)), "a second stage is no hindrance"
    assert find_codebooks(_tier(codebooks="", codec=Codec.INT4), state, "nowhere")
    write(beside / FILE_NAME, _other())
    with caplog.at_level(logging.INFO):
        assert not find_codebooks(_tier(), state, str(beside))
    assert "holds other codebooks than the plan's" in caplog.text
    (beside / FILE_NAME).write_bytes(b"junk")
    assert not find_codebooks(_tier(), state, str(beside))
    assert "fit them again: sidestream backbone codebooks" in caplog.text


def test_fitted_codes_follow_what_varies() -> None:
    """Correlated values cost a plain cut into groups dear; the rotation finds what varies."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(3, 24)).astype(np.float32)
    vectors = rng.normal(size=(5000, 3)).astype(np.float32) @ mixed
    vectors += rng.normal(size=vectors.shape).astype(np.float32) * 0.05
    found = codebook(vectors, 2, np.random.default_rng(2))
    turned = found.rotation.astype(np.float64)
    assert np.abs(turned.T @ turned - np.eye(24)).max() < 0.02
    lost = [
        np.square(vectors - found.decode(found.encode(vectors, stages))).sum() / np.square(vectors).sum()
        for stages in (1, 2)
    ]
    assert lost[0] < 0.02 and lost[1] < 0.5 * lost[0]


def _fit(model: Path, tmp_path: Path, *more: str, out: str = "out", lines: int = 400) -> int:
    text = tmp_path / "public.txt"
    text.write_text("\n".join(sentence(number) for number in range(lines)) + "\n\n")
    return main(
        ["backbone", "codebooks", str(model), "--text", str(text), "--out", str(tmp_path / out), *more]
    )


def test_the_command_fits_layers_to_named_text_the_same_each_time(
    tiny: Callable[[str], Path], bert: TorchBackbone, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for out in ("out", "again"):
        assert _fit(tiny("bert"), tmp_path, "--layers", "4,2", "--stages", "1", out=out) == 0
    told = capsys.readouterr()
    assert "layer 2: share of the variance that is lost, pq1: 0." in told.out
    assert 'name it in trainer.toml: codebooks = "' in told.out and "loading" in told.err
    data = [(tmp_path / out / FILE_NAME).read_bytes() for out in ("out", "again")]
    assert data[0] == data[1]
    file = read(tmp_path / "out" / FILE_NAME)
    assert list(file.by_layer) == [2, 4] and file.stages == 1 and list(file.about.texts) == ["public.txt"]
    file.check(bert.fingerprint, 4)
    file.check(bert.fingerprint_of_first(2), 2)
    assert file.about.fingerprints[1] != bert.fingerprint


@pytest.mark.parametrize(
    ("more", "lines", "told"),
    [
        (["--layers", "1,9"], 400, "--layers: there is no layer 9"),
        (["--text", "nowhere.txt"], 400, "--text: nowhere.txt cannot be read"),
        ([], 20, "name more text"),
    ],
)
def test_what_cannot_be_fitted_is_told_in_one_line(
    tiny: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    lines: int,
    told: str,
) -> None:
    assert _fit(tiny("bert"), tmp_path, *more, lines=lines) == 1
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out" / FILE_NAME).exists()
