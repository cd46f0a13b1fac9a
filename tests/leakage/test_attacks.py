"""What attacks find in uploads of a tiny random backbone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import load_backbone
from sidestream.cli import main
from sidestream.contract.errors import ConfigError
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.tensors import Codec
from sidestream.leakage.cli import parse_way
from sidestream.leakage.defences import under
from sidestream.leakage.measure import Material, Meter, Result
from sidestream.leakage.report import sentences, table
from sidestream.leakage.scores import found
from sidestream.leakage.way import Way
from tests.agent.tiny import WORDS, save_tiny


def texts(count: int, seed: int) -> list[str]:
    """Of five or six words each, none twice."""
    rng = np.random.default_rng(seed)
    return list({" ".join(rng.choice(WORDS, int(rng.integers(5, 7)))) for _ in range(count)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"), "bert")


@pytest.fixture(scope="module")
def meter(folder: Path) -> Meter:
    backbone: Backbone = load_backbone(str(folder))
    attacked = texts(6, seed=1)
    public = [text for text in texts(400, seed=2) if text not in attacked]
    material = Material(public, attacked, [])
    return Meter(
        backbone, material, (1, 4), seed=0, tell=lambda line: None, max_tokens=48, until=float("inf")
    )


def measured(meter: Meter, way: str) -> Result:
    return meter.measure(parse_way(way), 30.0)


@pytest.mark.parametrize("tap", [1, 4])
def test_all_tokens_come_back_from_any_tap(meter: Meter, tap: int) -> None:
    result = measured(meter, f"{tap}/all/int8")
    assert result.tokens > 0.95
    assert result.worst.exact == result.worst.texts


def test_means_of_segments_come_back(meter: Meter) -> None:
    result = measured(meter, "1,4/segments:3/int8")
    assert result.worst.exact >= 4
    assert result.nearest.right == 1.0


def test_noise_leaves_less(meter: Meter) -> None:
    plain, noisy = measured(meter, "1/mean/int8"), measured(meter, "1/mean/int8/noise:10")
    assert noisy.worst.exact == 0
    assert noisy.worst.words.f1 < plain.worst.words.f1
    assert noisy.epsilon is not None


def test_a_rotation_holds_until_texts_are_known(meter: Meter) -> None:
    scores = meter.rotated(parse_way("1/all/int8"))
    assert scores[0] < 0.6
    assert scores[200] > 0.95


def test_the_report_says_what_was_found_and_promises_nothing(meter: Meter) -> None:
    results = [measured(meter, "1/mean/int8"), measured(meter, "1/mean/int8/noise:1")]
    told = f"{table(results)}\n{sentences(results)}"
    assert "word for word" in told
    assert "δ = 1e-05" in told
    assert "private" not in told
    assert "anonym" not in told


def test_words_are_counted_as_often_as_they_stand_there() -> None:
    score = found(["the card the"], ["The card card"], [False], {"the"})
    assert score.words.precision == pytest.approx(2 / 3)
    assert score.content == (1.0, 0.5)


@pytest.mark.parametrize(
    "text", ["3,1/all/int8", "1/none/int8", "1/all/int3", "1/all", "1/all/int8/mean", "0/all/f16"]
)
def test_a_way_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--way"):
        parse_way(text)


def test_a_defence_on_a_way() -> None:
    way = Way(taps=(1, 3, 6), sampling="segments:4", codec=Codec.INT4)
    assert under(way, "deep:2, mean, noise:1") == Way(
        taps=(3, 6), sampling="mean", codec=Codec.INT4, privacy=parse_privacy("noise:1")
    )


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, rows in (("public", texts(150, 3)), ("mine", texts(4, 4))):
        lines = [json.dumps({"text": text, "label": "a"}) for text in rows]
        (tmp_path / name).with_suffix(".jsonl").write_text("\n".join(lines))
    public, mine = str(tmp_path / "public.jsonl"), str(tmp_path / "mine.jsonl")
    given = ["leakage", "--backbone", str(folder), "--public", public, "--minutes", "0.2", "--threads", "1"]
    out = tmp_path / "out.json"
    assert main([*given, "--texts", mine, "--way", "1/all/int8", "--json", str(out)]) == 0
    assert "all int8" in capsys.readouterr().out
    (result,) = json.loads(out.read_text())["results"]
    assert result["tokens_in_place"] > 0.9
    assert result["attacks"].keys() == {"search", "linear", "without_upload"}
    assert main([*given]) == 1
    assert "--texts" in capsys.readouterr().err
    assert main([*given, "--texts", str(tmp_path / "none.jsonl")]) == 1
    assert "--texts" in capsys.readouterr().err
    assert main([*given, "--texts", mine, "--way", "1/all/pq1"]) == 1
    assert "--codebooks" in capsys.readouterr().err
    assert main([*given, "--texts", mine, "--way", "9/all/int8"]) == 1
    assert "no layer 9" in capsys.readouterr().err
