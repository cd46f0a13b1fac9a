"""A backbone exported for onnxruntime is the backbone that it was exported from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sidestream.backbone import runtimes
from sidestream.backbone.inputs import Text
from sidestream.backbone.onnx_runtime.backbone import OnnxBackbone
from sidestream.backbone.onnx_runtime.folder import ExportPrecision, graph_of
from sidestream.backbone.runtimes import load_backbone, runtime_of, set_threads, shared_backbone
from sidestream.backbone.torch_runtime import export as exporter
from sidestream.cli import main
from sidestream.contract.errors import BackboneError
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from sidestream.doctor.machine import check_backbone
from tests.agent.exported import exported
from tests.agent.tiny import LAYERS, WIDTH

pytestmark = pytest.mark.slow

TEXTS: list[Text] = ["turn the lights on please", "off", "", "the " * 100, ("turn on the light", "now")]
Tiny = Callable[[str], Path]
Export = Callable[..., Path]


@pytest.fixture(scope="module")
def export(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Export:
    root = tmp_path_factory.mktemp("exported")

    def folder(family: str = "bert", precision: ExportPrecision = "f32") -> Path:
        return exported(tiny(family), root / f"{family}-{precision}", precision)

    return folder


@pytest.fixture
def copy(export: Export, tmp_path: Path) -> Path:
    return shutil.copytree(export(), tmp_path / "copy")


@pytest.mark.parametrize("family", ["bert", "roberta", "llama"])
def test_it_gives_what_torch_gives(tiny: Tiny, export: Export, family: str) -> None:
    wanted, found = load_backbone(str(tiny(family))), load_backbone(str(export(family)))
    assert isinstance(found, OnnxBackbone)
    assert (found.depth, found.width, found.is_decoder) == (LAYERS, WIDTH, family == "llama")
    assert found.fingerprint == wanted.fingerprint
    for taps in ([1, 3], [LAYERS]):
        ours, theirs = found.forward(TEXTS, taps, 32), wanted.forward(TEXTS, taps, 32)
        assert np.array_equal(ours.lengths, theirs.lengths) and ours.vectors.dtype == np.float32
        np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-4, atol=1e-5)


def test_words_stand_where_torchs_stand(tiny: Tiny, export: Export) -> None:
    wanted, found = (load_backbone(str(one)) for one in (tiny("bert"), export()))
    ours, theirs = (one.forward(TEXTS, [2], 16, words=True) for one in (found, wanted))
    assert ours.words is not None and theirs.words is not None
    assert np.array_equal(ours.words, theirs.words) and np.array_equal(ours.lengths, theirs.lengths)
    np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-4, atol=1e-5)


def test_it_is_cut_to_the_plans_layers_and_has_the_fingerprint_of_so_many(tiny: Tiny, export: Export) -> None:
    for layers in range(1, LAYERS + 1):
        wanted, found = (load_backbone(str(one), layers) for one in (tiny("bert"), export()))
        assert (found.depth, found.fingerprint) == (layers, wanted.fingerprint)
        ours, theirs = (one.forward(TEXTS, [layers], 16).vectors for one in (found, wanted))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(
        BackboneError, match=r"has 4 layers of .*, 9 are asked for; export it with --layers 9"
    ):
        load_backbone(str(export()), 9)


def test_in_int8_it_is_the_same_backbone_whatever_the_plans_precision(tiny: Tiny, export: Export) -> None:
    whole = load_backbone(str(tiny("bert")))
    small = load_backbone(str(export("bert", "int8")), precision="f32")
    assert isinstance(small, OnnxBackbone) and small.precision == "int8"
    small.check(whole.fingerprint)
    found, wanted = (torch.from_numpy(one.forward(TEXTS, [4], 32).vectors) for one in (small, whole))
    assert 0.99 < torch.cosine_similarity(found, wanted, dim=2).min() < 0.999999
    sizes = [(export("bert", one) / "weights.bin").stat().st_size for one in ("int8", "f32")]
    assert sizes[0] < 0.5 * sizes[1]


@pytest.mark.parametrize("sampling", ["all", "mean", "segments:2", "random:2", "important:2", "pivot"])
def test_the_same_texts_give_the_same_bytes(export: Export, sampling: str) -> None:
    backbone = load_backbone(str(export("bert", "int8")))
    policy = parse_sampling(sampling)
    first, again = (backbone.forward(TEXTS, [1, 4], 16, lambda lengths: policy) for _ in range(2))
    assert first.vectors.tobytes() == again.vectors.tobytes()
    assert np.array_equal(first.lengths, again.lengths)


def test_a_backbone_of_other_weights_is_refused(export: Export) -> None:
    with pytest.raises(BackboneError, match=r"are not the job's \(00000000"):
        load_backbone(str(export())).check("0" * 32)


@pytest.mark.parametrize("name", [graph_of(LAYERS), "weights.bin", "tokenizer.json"])
def test_a_file_that_is_damaged_or_missing_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(BackboneError, match=f"{name} is damaged; export it again"):
        load_backbone(str(copy))
    (copy / name).unlink()
    with pytest.raises(BackboneError, match=f"{name} cannot be read: No such file.*; export it again"):
        load_backbone(str(copy))


def test_what_it_says_of_itself_is_checked(copy: Path) -> None:
    about = json.loads((copy / "backbone.json").read_text())
    changes: list[dict[str, object]] = [{"fingerprints": []}, {"format": 2}, {"width": "wide"}]
    for change in changes:
        (copy / "backbone.json").write_text(json.dumps({**about, **change}))
        with pytest.raises(BackboneError, match=r"backbone\.json is damaged"):
            load_backbone(str(copy))


def test_a_language_model_keeps_torch(export: Export) -> None:
    with pytest.raises(BackboneError, match="a language model takes torch"):
        load_backbone(str(export("llama")), task=Task.CAUSAL_LM)


def test_the_runtime_goes_by_the_folder_unless_one_is_named(tiny: Tiny, export: Export) -> None:
    assert runtime_of(str(tiny("bert"))) == "torch" == runtime_of("") == runtime_of("some/model")
    assert runtime_of(str(export())) == "onnx"
    assert runtime_of(str(export()), "torch") == "torch"
    with pytest.raises(BackboneError, match=r"is no exported backbone \(there is no backbone.json in it\)"):
        load_backbone(str(tiny("bert")), runtime="onnx")
    with pytest.raises(BackboneError, match=r"no config\.json"):
        load_backbone(str(export()), runtime="torch")
    assert shared_backbone(str(export())) is shared_backbone(str(export()))


def test_the_doctor_loads_it(tiny: Tiny, export: Export) -> None:
    finding = check_backbone(str(export()), None)
    assert finding.state == "ok" and load_backbone(str(tiny("bert"))).fingerprint[:16] in str(finding)


def test_its_threads_can_be_set(export: Export) -> None:
    set_threads(1, "onnx")
    try:
        backbone = load_backbone(str(export()))
    finally:
        set_threads(0, "onnx")
    assert isinstance(backbone, OnnxBackbone)
    assert backbone._session.get_session_options().intra_op_num_threads == 1


def test_a_runtime_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing() -> runtimes.Runtime:
        raise ModuleNotFoundError(name="torch")

    monkeypatch.setattr(runtimes, "_RUNTIMES", {"torch": missing})
    with pytest.raises(BackboneError, match=r"torch is not installed here.*sidestream backbone export"):
        load_backbone(str(tmp_path))


def test_the_command_says_how_close_it_comes(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    asked = ["backbone", "export", str(tiny("bert")), "--layers", "2", "--out", str(out)]
    assert main(asked) == 0
    said = capsys.readouterr()
    assert "layer 2: cosine to torch's f32 1.0000 in the mean, 1.0000 at least" in said.out
    assert "layer 3:" not in said.out and "writing the graph" in said.err
    assert load_backbone(str(out)).fingerprint == load_backbone(str(tiny("bert")), 2).fingerprint
    assert not (out / graph_of(3)).exists()
    assert main(asked) == 1
    assert "is there already; name a folder that is not" in capsys.readouterr().err


def test_an_export_that_gives_other_states_is_not_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "_ALIKE", 1.1)
    with pytest.raises(BackboneError, match="layer 1 gives other states once it is exported"):
        exported(tiny("bert"), tmp_path / "out", layers=1)
    assert not list(tmp_path.iterdir())
