"""The frontier of accuracy against bytes is run, added up and drawn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.bytes import main
from benchmarks.frontier import Found, frontier, frontier_text, lines_of, parse_point
from benchmarks.recall import RecallingBackbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.sampling import Sampling, parse_sampling
from tests.agent.tiny import save_tiny


@pytest.fixture
def data(arguments: list[str]) -> list[str]:
    """Training and evaluation data, and the backbone."""
    return arguments[: arguments.index("--tiers")]


def test_fewer_bytes_are_sent_point_by_point_and_drawn(
    data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    to_files = ["--json", str(out), "--plot", str(picture), "--seeds", "0"]
    assert main([*data, *to_files, "--points", "2/segments:4/int4,3/mean/int2"]) == 0
    found = {one["point"]: one for one in json.loads(out.read_text())["results"]}
    sizes = [found[name]["bytes_per_sample"] for name in ("2/all/f16", "2/segments:4/int4", "3/mean/int2")]
    assert sizes == sorted(sizes, reverse=True)
    # Nine tokens, two taps, 32 wide, two bytes each; and less than a third more for the message.
    assert 1 < sizes[0] / (9 * 2 * 32 * 2) < 1.3
    assert found["2/all/f16"]["accuracy"] > 0.8
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "at most 2,300 bytes a sample: " in capsys.readouterr().out
    again = tmp_path / "again.json"
    assert (
        main([*data, "--have", str(out), "--points", "3/mean/int2", "--seeds", "0", "--json", str(again)])
        == 0
    )
    assert json.loads(again.read_text())["results"] == list(found.values())
    assert " forwarded" not in capsys.readouterr().err
    assert main([*data, "--have", str(out), "--max-samples", "9"]) == 1
    assert "is of max_samples 0, not 9" in capsys.readouterr().err


def test_what_is_recalled_is_what_the_backbone_gives(tmp_path: Path) -> None:
    inner = TorchBackbone.load(str(save_tiny(tmp_path / "backbone", "bert")))
    recalling = RecallingBackbone(inner, [1, 2, 4])
    texts = ["turn the lights on now", "warm", "a light"]
    for policy, taps in (("all", [2, 4]), ("segments:2", [1, 4]), ("important:2", [4])):
        choose = _always(policy)
        for order in (texts, texts[::-1]):
            wanted = inner.forward(order, taps, 32, choose)
            given = recalling.forward(order, taps, 32, choose)
            assert np.array_equal(given.lengths, wanted.lengths)
            np.testing.assert_allclose(given.vectors, wanted.vectors, rtol=2e-3, atol=2e-3)


def test_the_frontier_is_what_no_point_beats() -> None:
    results = [
        _found("2/all/f16", 36_000, 0.85),
        _found("2/all/int4", 9_000, 0.86),
        _found("2/segments:8/int4", 4_000, 0.83),
        _found("3/segments:4/int4", 2_200, 0.846),
        _found("3/mean/int2", 430, 0.7),
        _found("3/mean/int4", 700, 0.9, seed=2),
    ]
    lines = lines_of(results)
    assert [str(line.point) for line in frontier(lines)] == ["3/mean/int2", "3/segments:4/int4", "2/all/int4"]
    text = frontier_text(results)
    assert "at most 2,300 bytes a sample: 3/segments:4/int4 (2,200 bytes), -0.40 points" in text
    assert "seed 2" not in text and "3/mean/int4" not in text, "the reference has no such seed"
    assert text.count("reached") == 1 and text.count("missed") == 2
    assert "no point" in frontier_text(results[:1])


def test_differences_are_to_the_reference_of_the_same_seed() -> None:
    results = [
        *(_found("2/all/f16", 36_000, 0.8 + 0.1 * seed, seed=seed) for seed in (0, 1)),
        _found("2/all/int4", 9_000, 0.89, seed=1),
    ]
    line = next(line for line in lines_of(results) if line.point.codec.value == "int4")
    assert line.difference == pytest.approx(-1)


@pytest.mark.parametrize(
    "text", ["", "2/all", "0/all/f16", "x/all/f16", "2/some/f16", "2/all/f17", "2/all/f16/"]
)
def test_a_wrong_point_is_named(data: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError):
        parse_point(text)
    with pytest.raises(SystemExit):
        main([*data, "--points", text])
    assert "write TAPS/SAMPLING/CODEC" in capsys.readouterr().err


def test_more_taps_than_the_network_has_blocks_are_refused(
    data: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*data, "--points", "4/all/int4", "--seeds", "0"]) == 1
    assert "4 taps are more than side_network.blocks = 3" in capsys.readouterr().err


def _always(policy: str) -> Callable[[npt.NDArray[np.int64]], Sampling]:
    return lambda lengths: parse_sampling(policy)


def _found(point: str, size: float, accuracy: float, seed: int = 0) -> Found:
    return Found(point=point, seed=seed, bytes_per_sample=size, accuracy=accuracy)
