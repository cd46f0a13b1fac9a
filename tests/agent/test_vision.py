"""Vision transformers: what is tapped, how an image becomes numbers, what tells one model from another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoImageProcessor, AutoModel

from sidestream.backbone.images.image_input import ImageInput
from sidestream.backbone.inputs import ImageFile, digest_of
from sidestream.backbone.onnx_runtime.backbone import OnnxBackbone
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.torch_runtime.export import export
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.contract.errors import BackboneError
from sidestream.contract.sampling import parse_sampling
from sidestream.contract.tasks import Task
from tests.agent.tiny_vision import LAYERS, TOKENS, WIDTH, file_of, pixels, save_tiny_vision

Made = Callable[[str], Path]
MOST = 4096


def image(seed: int, size: tuple[int, int] = (50, 38)) -> ImageFile:
    data = file_of(pixels(seed, size))
    return ImageFile(f"{seed}.png", digest_of(data), data)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("vision")

    def folder(family: str = "vit") -> Path:
        place = root / family
        return place if place.exists() else save_tiny_vision(place, family)

    return folder


@pytest.fixture(scope="module")
def vit(made: Made) -> TorchVisionBackbone:
    return TorchVisionBackbone.load(str(made("vit")))


@pytest.mark.parametrize("family", ["vit", "deit", "dinov2", "beit"])
def test_what_is_tapped_is_what_transformers_gives_of_the_same_picture(made: Made, family: str) -> None:
    """By transformers' own image processor: the file is scaled, cut and normalised here without it."""
    place = made(family)
    backbone = TorchVisionBackbone.load(str(place))
    processor, model = AutoImageProcessor.from_pretrained(place), AutoModel.from_pretrained(place).eval()
    wide, tall = image(1, (70, 40)), image(2, (33, 90))
    found = backbone.forward([wide, tall], [1, LAYERS - 1], MOST)
    given = processor([pixels(1, (70, 40)), pixels(2, (33, 90))], return_tensors="pt")
    states = model(**given, output_hidden_states=True).hidden_states
    for tap, layer in enumerate((1, LAYERS - 1)):
        wanted = states[layer].detach().numpy()
        np.testing.assert_allclose(found.vectors[tap].reshape(wanted.shape), wanted, rtol=1e-3, atol=1e-4)
    assert (backbone.depth, backbone.width) == (LAYERS, WIDTH) and not backbone.is_decoder


def test_stages_of_several_widths_are_refused_in_one_line(made: Made) -> None:
    with pytest.raises(
        BackboneError, match="SwinModel cannot be a backbone here: its layers give states of"
    ) as said:
        TorchVisionBackbone.load(str(made("swin")))
    assert "\n" not in str(said.value) and "docs/models.md" in str(said.value)


def test_a_processor_of_a_size_that_the_model_cannot_take_is_refused(made: Made, tmp_path: Path) -> None:
    place = save_tiny_vision(tmp_path / "vit")
    settings = json.loads((place / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 48, "width": 48}
    (place / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(BackboneError, match=r"ViTModel cannot be a backbone here: .*48"):
        TorchVisionBackbone.load(str(place))


def test_a_fingerprint_is_of_weights_and_of_what_is_done_with_pictures(
    vit: TorchVisionBackbone, made: Made, tmp_path: Path
) -> None:
    again = save_tiny_vision(tmp_path / "same")
    assert TorchVisionBackbone.load(str(again)).fingerprint == vit.fingerprint
    assert TorchVisionBackbone.load(str(again), precision="int8").fingerprint == vit.fingerprint
    other = save_tiny_vision(tmp_path / "other", seed=1)
    assert TorchVisionBackbone.load(str(other)).fingerprint != vit.fingerprint
    settings = json.loads((again / "preprocessor_config.json").read_text())
    (again / "preprocessor_config.json").write_text(json.dumps({**settings, "image_mean": [0.4, 0.5, 0.5]}))
    assert TorchVisionBackbone.load(str(again)).fingerprint != vit.fingerprint
    first = TorchVisionBackbone.load(str(made("vit")), 2)
    assert first.fingerprint == vit.fingerprint_of_first(2) != vit.fingerprint


@pytest.mark.parametrize("precision", ["f32", "bf16", "int8"])
def test_an_image_gives_the_same_in_any_batch(made: Made, precision: str) -> None:
    backbone = load_backbone(str(made("vit")), 0, precision, Task.IMAGE_CLASSIFICATION)  # type: ignore[arg-type]
    alone = backbone.forward([image(1)], [1, 3], MOST).vectors
    beside = backbone.forward([image(1), image(2)], [1, 3], MOST).select([0]).vectors
    bound = {"f32": 1e-5, "bf16": 0.05, "int8": 0.05}[precision]
    np.testing.assert_allclose(alone, beside, atol=bound)


def test_token_policies_sample_patches(vit: TorchVisionBackbone) -> None:
    policy = parse_sampling("segments:4")
    sampled = vit.forward([image(1), image(2)], [1, 3], MOST, lambda lengths: policy)
    assert sampled.lengths.tolist() == [4, 4] and sampled.vectors.shape == (2, 8, WIDTH)
    assert vit.forward([image(1)], [1], MOST).lengths.tolist() == [TOKENS]


def test_an_image_that_is_gone_leaves_the_others_as_they_are(
    vit: TorchVisionBackbone, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    gone = ImageFile(str(tmp_path / "gone.png"), digest_of(b""))
    with caplog.at_level("WARNING"):
        sampled = vit.forward([image(1), gone, image(2)], [3], MOST)
    assert sampled.usable_rows().tolist() == [True, False, True]
    assert "gone.png: cannot be read" in caplog.text
    alone = vit.forward([image(1), image(2)], [3], MOST)
    np.testing.assert_allclose(sampled.select([0, 2]).vectors, alone.vectors, atol=1e-5)


def test_a_plan_that_wants_fewer_vectors_than_an_image_has_is_told_of(vit: TorchVisionBackbone) -> None:
    with pytest.raises(BackboneError, match="makes 17 vectors of an image, and the plan's max_tokens is 16"):
        vit.forward([image(1)], [1], 16)


def test_a_text_model_is_no_vision_backbone_and_the_other_way_round(made: Made, tiny: Made) -> None:
    with pytest.raises(BackboneError, match="takes texts, and the job's samples are images"):
        load_backbone(str(tiny("bert")), task=Task.IMAGE_CLASSIFICATION)
    with pytest.raises(BackboneError, match="takes images, and the job's samples are texts"):
        load_backbone(str(made("vit")))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vit", "dinov2"])
def test_an_exported_one_gives_what_torch_gives_without_torch(
    made: Made, tmp_path: Path, family: str
) -> None:
    cosines = export(str(made(family)), tmp_path / "out", images=True, tell=lambda line: None)
    assert min(float(one.min()) for one in cosines) >= 0.9999
    torch = TorchVisionBackbone.load(str(made(family)))
    found = load_backbone(str(tmp_path / "out"), task=Task.IMAGE_CLASSIFICATION)
    assert isinstance(found, OnnxBackbone) and isinstance(found.preprocessor, ImageInput)
    assert (found.fingerprint, found.depth, found.width) == (torch.fingerprint, LAYERS, WIDTH)
    ours, theirs = (one.forward([image(1), image(2)], [1, 3], MOST) for one in (found, torch))
    np.testing.assert_allclose(ours.vectors, theirs.vectors, rtol=1e-3, atol=1e-4)
    with pytest.raises(BackboneError, match="takes images, and the job's samples are texts"):
        load_backbone(str(tmp_path / "out"))


@pytest.mark.slow
def test_an_exported_one_in_int8_comes_close(made: Made, tmp_path: Path) -> None:
    cosines = export(
        str(made("vit")), tmp_path / "out", images=True, precision="int8", tell=lambda line: None
    )
    assert min(float(one.mean()) for one in cosines) > 0.99
