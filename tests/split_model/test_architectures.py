"""A model is cut exactly, gradients included, or refused in one line: nothing else."""

from __future__ import annotations

import re
from typing import Any, Final

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.models import rows_of
from benchmarks.zoo import LAYERS, tokenizer
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tasks import Task
from sidestream.split_model.lower_half import LowerHalf
from sidestream.split_model.split_model import SplitModel
from tests.agent.test_models import PAGE
from tests.split_model.halves import (
    LABELS,
    TARGETS,
    backbone,
    loss_of,
    lower_half,
    lower_part,
    model_of,
    scattered,
    some_targets,
    split_model,
    tokens_of,
)

CUT_EXACTLY: Final = (
    *("bert", "roberta", "distilbert", "electra", "modernbert", "mpnet", "gpt2", "opt", "llama"),
    *("qwen2", "qwen3", "gpt_neox", "mistral", "phi", "gemma2", "smollm3", "bloom", "deberta-v2"),
)
DECODERS: Final = (
    "gpt2",
    "opt",
    "llama",
    "qwen2",
    "qwen3",
    "gpt_neox",
    "mistral",
    "phi",
    "gemma2",
    "smollm3",
)


def assert_cut_exactly(upper: SplitModel, lower: LowerHalf, reader: TorchBackbone) -> None:
    """Answers and every gradient are the whole model's, to the last bit."""
    upper.load(scattered(upper))
    lower.load(lower_part(upper, lower.cut))
    tokens = tokens_of(reader, 4, 1)
    assert len(set(tokens.mask.sum(axis=1))) > 1
    targets = some_targets(upper, tokens, 1)

    answers = upper.whole(tokens)
    loss_of(upper, answers, targets).backward()  # type: ignore[no-untyped-call]
    wanted = {name: one.grad for name, one in upper.parameters.items()}
    for one in upper.parameters.values():
        one.grad = None

    passed = lower.forward(tokens)
    states = torch.from_numpy(passed.states.copy()).requires_grad_()
    found = upper.answers(lower.cut, states, passed.lengths)
    assert torch.equal(found, answers) and len({*answers.flatten().tolist()}) > LABELS
    loss_of(upper, found, targets).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None and states.grad.abs().sum() > 0
    below = passed.backward(states.grad.numpy())
    assert set(below) == set(lower.names)
    for name, gradient in wanted.items():
        own = torch.from_numpy(below[name]) if name in below else upper.parameters[name].grad
        assert gradient is not None and own is not None and gradient.abs().sum() > 0
        assert torch.equal(own, gradient), name
        assert (upper.parameters[name].grad is None) == (name in below)


@pytest.mark.parametrize("cut", [1, LAYERS - 1])
@pytest.mark.parametrize("kind", CUT_EXACTLY)
def test_the_halves_give_what_the_whole_gives(kind: str, cut: int) -> None:
    upper, lower = split_model(kind), lower_half(kind, cut)
    assert (lower.cut, lower.width) == (cut, upper.width)
    assert set(lower.names) == set(lower_part(upper, cut))
    assert_cut_exactly(upper, lower, backbone(kind))


@pytest.mark.parametrize("kind", DECODERS)
def test_the_halves_of_a_language_model_give_what_the_whole_gives(kind: str) -> None:
    assert_cut_exactly(split_model(kind, lm=True), lower_half(kind, 2), backbone(kind))


@pytest.mark.parametrize("lm", [False, True])
@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2", "llama", "opt", "gpt_neox", "phi"])
def test_the_trainer_knows_the_fingerprint_of_every_half(kind: str, lm: bool) -> None:
    if lm and kind in ("bert", "roberta"):
        return
    upper = split_model(kind, lm=lm)
    halves = [backbone(kind, cut, lm=lm).fingerprint for cut in (1, 2, 3, LAYERS)]
    assert [upper.fingerprint(cut) for cut in (1, 2, 3, LAYERS)] == halves
    assert len({*halves}) == LAYERS


def test_it_knows_it_in_bf16_too() -> None:
    assert split_model("bert", precision="bf16").fingerprint(2) == backbone("bert", 2).fingerprint


def test_a_model_may_be_begun_at_its_embeddings_and_not_at_its_end() -> None:
    upper = split_model("bert")
    upper.load(scattered(upper))
    tokens = tokens_of(backbone("bert"), 3, 1)
    mask = torch.from_numpy(tokens.mask)
    embeddings: Any = model_of("bert").embeddings
    states = embeddings(input_ids=torch.from_numpy(tokens.ids))[mask].detach()
    lengths = tokens.mask.sum(axis=1)
    assert torch.equal(upper.answers(0, states, lengths), upper.whole(tokens))
    with pytest.raises(AssertionError, match="nothing is left to do after 4 of 4 layers"):
        upper.answers(4, states, lengths)


def test_after_a_pass_the_model_is_whole_again() -> None:
    upper, lower = split_model("llama"), lower_half("llama", 3)
    tokens = tokens_of(backbone("llama"), 3, 1)
    upper.load(scattered(upper))
    before = upper.whole(tokens)
    passed = lower.forward(tokens)
    upper.answers(3, torch.from_numpy(passed.states), passed.lengths)
    assert torch.equal(upper.whole(tokens), before)


@pytest.mark.parametrize("cut", range(LAYERS))
def test_what_devices_have_computed_is_not_computed_again(cut: int) -> None:
    upper = split_model("bert")
    ran: list[int] = []
    for number, layer in enumerate(upper._view.stack.layers):
        layer.attention.register_forward_hook(lambda *given, number=number: ran.append(number))  # type: ignore[union-attr]
    upper.answers(cut, torch.zeros(3, upper.width), np.array([1, 2]))
    assert ran == list(range(cut, LAYERS))


def test_segments_of_pairs_reach_the_lower_half() -> None:
    upper, lower, reader = split_model("bert"), lower_half("bert", 1), backbone("bert")
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 1))
    tokens = reader.text_input.read([("ba bo da", "go"), ("ta", "so sa")], 32)
    assert tokens.segments is not None and tokens.segments.any()
    passed = lower.forward(tokens)
    answers = upper.answers(1, torch.from_numpy(passed.states), passed.lengths)
    assert torch.equal(answers, upper.whole(tokens))
    assert not torch.equal(answers, upper.whole(tokens._replace(segments=None)))


def test_the_backbone_itself_stays_as_it_was() -> None:
    shared = backbone("bert")
    before = shared.forward(["ba da"], [4], 16).vectors
    names = [name for name, _ in shared.parameters()]
    upper = SplitModel(shared, LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
    upper.load(scattered(upper))
    other = SplitModel(shared, LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
    assert (shared.forward(["ba da"], [4], 16).vectors == before).all()
    assert [name for name, _ in shared.parameters()] == names
    tokens = tokens_of(shared, 2, 0)
    assert not torch.equal(upper.whole(tokens), other.whole(tokens))
    places = {one.data_ptr() for _, one in shared.parameters()}
    frozen = [one for one in upper._view.model.parameters() if not one.requires_grad]
    assert {one.data_ptr() for one in frozen if one.numel() > LABELS * shared.width} <= places


class _Mixing(nn.Module):
    """A model that hands more from layer to layer than the next one is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.inner: Any = model_of(kind)
        self.config = self.inner.config

    def forward(self, **given: Any) -> Any:
        first: list[Tensor] = []
        hook = self.inner.layers[0].register_forward_hook(lambda module, args, out: first.append(out))
        try:
            out = self.inner(**given)
        finally:
            hook.remove()
        out.last_hidden_state = out.last_hidden_state + first[0].mean()
        return out


def test_a_model_that_cannot_be_cut_exactly_is_refused_in_one_line() -> None:
    mixing = backbone("llama")
    mixing._model = _Mixing("llama")
    mixing._stack = mixing._stack._replace(layers=mixing._model.inner.layers)
    with pytest.raises(BackboneError) as refused:
        SplitModel(mixing, LoraSpec(targets=("q_proj",)), task=Task.REGRESSION, labels=0, seed=0)
    said = str(refused.value)
    assert "begun after layer" in said and "use another model" in said and "\n" not in said


@pytest.mark.parametrize(
    ("targets", "told"),
    [
        (("nothing", "attention.nothing"), "targets: its layers have no map called 'nothing'"),
        (("LayerNorm",), "LayerNorm"),
        (("word_embeddings",), "no map called 'word_embeddings'"),
        (("dense",), "targets: pooler.dense is in none of its layers"),
    ],
)
@pytest.mark.parametrize("half", [True, False])
def test_targets_that_are_none_of_its_maps_are_refused(
    targets: tuple[str, ...], told: str, half: bool
) -> None:
    lora = LoraSpec(targets=targets)

    def make() -> object:
        if half:
            return LowerHalf(backbone("bert", 1), lora)
        return SplitModel(backbone("bert"), lora, task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)

    with pytest.raises(BackboneError, match=told) as refused:
        make()
    assert "\n" not in str(refused.value) and str(refused.value).startswith("bert: ")


def test_a_map_that_the_model_does_not_use_is_no_target() -> None:
    def with_more() -> TorchBackbone:
        model = model_of("llama")
        for layer in model.layers:
            layer.spare = nn.Linear(4, 4)
        return TorchBackbone(model, tokenizer(), name="llama")

    lora = LoraSpec(targets=("q_proj", "spare"))
    with pytest.raises(BackboneError, match=r"no gradient comes to layers\.1\.spare\.lora_A"):
        SplitModel(with_more(), lora, task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
    with pytest.raises(BackboneError, match=r"llama: .*use another model"):
        LowerHalf(with_more(), lora)


def test_every_target_has_to_be_somewhere_in_the_whole_model_and_one_of_them_in_the_half() -> None:
    lora = LoraSpec(targets=("query", "nothing"))
    with pytest.raises(BackboneError, match="no map called 'nothing'"):
        SplitModel(backbone("bert"), lora, task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
    assert all(".query." in name for name in LowerHalf(backbone("bert", 1), lora).names)


def test_an_architecture_without_usual_targets_asks_for_some() -> None:
    with pytest.raises(BackboneError, match=r"mpnet: peft names no targets for mpnet; name some"):
        LowerHalf(backbone("mpnet", 1), LoraSpec())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind, cells in rows_of(PAGE).items() if cells[3] == "works"])
def test_every_model_that_can_be_a_backbone_is_cut_exactly_or_refused(kind: str) -> None:
    whole = TorchBackbone(model_of(kind), tokenizer(), name=kind)
    names = [
        path
        for path, module in whole.model.named_modules()
        if path.startswith(f"{whole.stack_path}.") and type(module) is nn.Linear
    ]
    if not names:
        return
    last = names[-1].removeprefix(f"{whole.stack_path}.").partition(".")[2]
    lora = LoraSpec(targets=TARGETS.get(kind, (last,)))
    try:
        upper = SplitModel(whole, lora, task=Task.TEXT_CLASSIFICATION, labels=LABELS, seed=0)
        lower = LowerHalf(TorchBackbone(model_of(kind), tokenizer(), layers=2, name=kind), lora)
    except BackboneError as exc:
        assert kind not in CUT_EXACTLY and re.fullmatch(r"\w+: .*(use another model|targets: ).*", str(exc))
        return
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 2))
    tokens = tokens_of(whole, 4, 1)
    passed = lower.forward(tokens)
    answers = upper.answers(2, torch.from_numpy(passed.states), passed.lengths)
    whole_answers = upper.whole(tokens)
    assert np.isfinite(answers.detach().numpy()).all()
    # Mixtures of experts sum in another order where padding, which does not travel, was with other experts.
    torch.testing.assert_close(answers, whole_answers, rtol=1e-4, atol=1e-5)
    assert kind not in CUT_EXACTLY or torch.equal(answers, whole_answers)
