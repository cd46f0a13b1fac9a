"""A language model's output head, from its tensors alone, answers as the model does."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from sidestream.contract.errors import DecodeError
from sidestream.side_network.output_head import HeadSpec, OutputHead, find_head

GENERATOR = torch.Generator().manual_seed(4)


def head(spec: HeadSpec, *parts: str, width: int = 6, vocabulary: int = 11) -> OutputHead:
    shapes = {
        "embedding": (vocabulary, 4 if "project" in parts else width),
        "project": (4, width),
        "norm_weight": (width,),
        "norm_bias": (width,),
        "bias": (vocabulary,),
    }
    return OutputHead(
        spec, {part: torch.randn(shapes[part], generator=GENERATOR) for part in (*parts, "embedding")}
    )


def test_each_norm_is_what_its_family_computes() -> None:
    states = torch.randn(5, 6, generator=GENERATOR)
    layer = head(HeadSpec(norm="layer", eps=1e-3), "norm_weight", "norm_bias")
    normed = functional.layer_norm(states, (6,), layer.norm_weight, layer.norm_bias, 1e-3)
    torch.testing.assert_close(layer(states), normed @ layer.embedding.T)
    scaled = states / (states.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    for kind, shift in (("rms", 0.0), ("rms-plus-one", 1.0)):
        rms = head(HeadSpec(norm=kind, eps=1e-3), "norm_weight")  # type: ignore[arg-type]
        assert rms.norm_weight is not None
        torch.testing.assert_close(rms(states), (scaled * (rms.norm_weight + shift)) @ rms.embedding.T)


def test_a_projection_a_bias_and_a_cap_come_where_they_belong() -> None:
    states = torch.randn(5, 6, generator=GENERATOR)
    full = head(HeadSpec(norm="none", softcap=2.0), "project", "bias")
    assert full.project is not None and full.bias is not None
    logits = states @ full.project.T @ full.embedding.T + full.bias
    torch.testing.assert_close(full(states), 2.0 * torch.tanh(logits / 2.0))
    assert (full.width, full.vocabulary) == (6, 11)
    assert full(states).abs().max() < 2.0


def test_it_judges_in_chunks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestream.side_network.output_head._CHUNK_VALUES", 33)
    plain = head(HeadSpec(norm="none"))
    states, targets = torch.randn(10, 6, generator=GENERATOR), torch.arange(10)
    losses, hits = plain.judge(states, targets)
    torch.testing.assert_close(losses, functional.cross_entropy(plain(states), targets, reduction="none"))
    assert hits.tolist() == (plain(states).argmax(1) == targets).tolist()


def test_the_fingerprint_tells_heads_apart_and_not_how_they_are_stored() -> None:
    one = head(HeadSpec(norm="rms"), "norm_weight")
    tensors = {name: value.detach().clone() for name, value in one.named_parameters()}
    assert OutputHead(one.spec, tensors).fingerprint() == one.fingerprint()
    assert OutputHead(HeadSpec(norm="rms", eps=1e-6), tensors).fingerprint() != one.fingerprint()
    tensors["embedding"][3, 2] += 1e-3
    assert OutputHead(one.spec, tensors).fingerprint() != one.fingerprint()


def test_parts_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(DecodeError, match="there are only"):
        OutputHead(HeadSpec(norm="none"), {"norm_weight": torch.ones(3)})
    with pytest.raises(DecodeError, match="its bias has shape"):
        OutputHead(HeadSpec(norm="none"), {"embedding": torch.ones(5, 3), "bias": torch.ones(4)})


def test_names_of_layers_are_no_part_of_the_head() -> None:
    spec, names = find_head(
        {"model_type": "opt"},
        [
            *("model.decoder.layers.0.final_layer_norm.weight", "model.decoder.embed_tokens.weight"),
            *("model.decoder.project_out.weight", "model.decoder.embed_positions.weight"),
        ],
    )
    assert spec.norm == "none"
    assert names == {
        "embedding": "model.decoder.embed_tokens.weight",
        "project": "model.decoder.project_out.weight",
    }
