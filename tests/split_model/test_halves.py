"""What the two halves promise besides exactness: what they take, refuse, and keep."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch

from benchmarks.shapes import random_backbone
from benchmarks.zoo import tokenizer
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import BackboneError, ConfigError, DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.split_model.lower_half import LowerHalf
from sidestream.split_model.split_model import SplitModel
from tests.split_model.halves import (
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

Weights = dict[str, Floats]
QUERY = "encoder.layer.0.attention.self.query.lora_A"


def test_names_are_paths_within_the_backbone_layer_by_layer_and_then_the_head() -> None:
    upper = split_model("bert")
    names = list(upper.parameters)
    assert names[:2] == [QUERY, QUERY.replace("_A", "_B")] and names[-2:] == ["head.weight", "head.bias"]
    layers = [upper.layer_of(name) for name in names]
    assert layers == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 + [None] * 2
    assert lower_half("bert", 2).names == tuple(names[:8])


def test_adapters_and_head_start_as_nothing_by_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = split_model("bert", seed=3).arrays()
    torch.manual_seed(2)
    again, other = split_model("bert", seed=3).arrays(), split_model("bert", seed=4).arrays()
    for name, array in first.items():
        assert array.tobytes() == again[name].tobytes()
        if name.endswith("lora_A"):
            assert 0.1 < np.abs(array).max() * np.sqrt(32) <= 1 and (array != other[name]).all()
        else:
            assert not array.any()


def test_making_one_leaves_torchs_lots_alone() -> None:
    ready = backbone("bert")
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    SplitModel(ready, LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
    assert torch.equal(torch.rand(3), wanted)


def test_what_is_loaded_is_what_is_there_and_parameters_stay_the_same_objects() -> None:
    upper = split_model("bert")
    before = dict(upper.parameters)
    values = scattered(upper)
    upper.load(values)
    for name, array in upper.arrays().items():
        assert (array == values[name]).all() and upper.parameters[name] is before[name]
        array += 1
    assert (upper.arrays()[QUERY] == values[QUERY]).all()


def lacking(weights: Weights) -> Weights:
    return {name: array for name, array in weights.items() if name != QUERY}


def with_another(weights: Weights) -> Weights:
    return {**weights, "encoder.layer.9.attention.self.query.lora_A": weights[QUERY]}


def turned(weights: Weights) -> Weights:
    return {**weights, QUERY: weights[QUERY].T}


def with_nan(weights: Weights) -> Weights:
    array = weights[QUERY].copy()
    array[1, 2] = np.nan
    return {**weights, QUERY: array}


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lacking, f"lacks '{QUERY}'"),
        (with_another, "no place for 'encoder.layer.9"),
        (turned, rf"{QUERY} has shape \(32, 4\), not \(4, 32\)"),
        (with_nan, f"{QUERY} holds NaN"),
    ],
)
def test_weights_that_do_not_fit_are_refused_and_change_nothing(
    spoil: Callable[[Weights], Weights], told: str
) -> None:
    for half in (split_model("bert"), lower_half("bert", 2)):
        before = half.arrays()
        with pytest.raises(DecodeError, match=told):
            half.load(spoil({name: array + 1 for name, array in before.items()}))
        assert all((array == before[name]).all() for name, array in half.arrays().items())


def test_a_gradient_may_come_for_some_rows_only() -> None:
    lower, tokens = lower_half("bert", 2), tokens_of(backbone("bert"), 4, 3)
    upper = split_model("bert")
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 2))
    passed = lower.forward(tokens)
    assert passed.lengths.tolist() == tokens.mask.sum(axis=1).tolist()
    assert passed.states.shape == (passed.lengths.sum(), 32)
    gradient = np.random.default_rng(0).normal(size=passed.states.shape).astype(np.float32)
    parts = np.split(gradient, np.cumsum(passed.lengths)[:-1])
    whole = np.concatenate([np.zeros_like(parts[0]), parts[1], np.zeros_like(parts[2]), parts[3]])
    found = lower.forward(tokens).backward(np.concatenate([parts[3], parts[1]]), rows=[3, 1])
    wanted = passed.backward(whole)
    assert all((found[name] == wanted[name]).all() and found[name].any() for name in lower.names)


def test_gradients_of_the_parts_of_a_batch_add_up() -> None:
    upper, lower = split_model("llama"), lower_half("llama", 2)
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 2))
    tokens = tokens_of(backbone("llama"), 4, 3)
    gradient = np.ones_like(lower.forward(tokens).states)
    whole = lower.forward(tokens).backward(gradient)
    parts = []
    for rows in ([0, 1], [2, 3]):
        passed = lower.forward(tokens)
        parts.append(passed.backward(gradient[: passed.lengths[rows].sum()], rows=rows))
    for name in lower.names:
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-3, atol=1e-4)


def test_a_pass_goes_back_once_and_a_gradient_that_does_not_fit_leaves_it_waiting() -> None:
    lower, tokens = lower_half("bert", 1), tokens_of(backbone("bert"), 2, 0)
    with torch.no_grad():  # whoever asks
        passed = lower.forward(tokens)
    good = np.ones_like(passed.states)
    for bad in (good[:-1], good[:, :-1], good.reshape(-1), np.full_like(good, np.inf)):
        with pytest.raises(DecodeError, match="gradient at the cut"):
            passed.backward(bad)
    with pytest.raises(DecodeError, match="gradient at the cut has shape"):
        passed.backward(good, rows=[0])
    assert passed.backward(good)
    with pytest.raises(AssertionError):
        passed.backward(good)


def test_a_pass_that_waits_keeps_the_adapters_that_it_was_made_with() -> None:
    upper, lower = split_model("bert"), lower_half("bert", 2)
    upper.load(scattered(upper, 1))
    old = lower_part(upper, 2)
    upper.load(scattered(upper, 2))
    tokens = tokens_of(backbone("bert"), 3, 0)
    lower.load(old)
    wanted = lower.forward(tokens)
    gradient = np.ones_like(wanted.states)
    waiting = lower.forward(tokens)
    lower.load(lower_part(upper, 2))
    found, by_old = waiting.backward(gradient), wanted.backward(gradient)
    by_new = lower.forward(tokens).backward(gradient)
    assert all((found[name] == by_old[name]).all() for name in lower.names)
    assert any((found[name] != by_new[name]).any() for name in lower.names)


def test_two_halves_of_one_backbone_have_adapters_of_their_own() -> None:
    shared = backbone("bert", 2)
    one, other = LowerHalf(shared, LoraSpec()), LowerHalf(shared, LoraSpec(rank=2))
    tokens = tokens_of(shared, 2, 0)
    before = other.forward(tokens).states
    one.load({name: array + 1 for name, array in one.arrays().items()})
    assert (other.forward(tokens).states == before).all()
    assert (one.forward(tokens).states != before).any()
    assert (
        shared.forward(["ba"], [2], 8).vectors == backbone("bert", 2).forward(["ba"], [2], 8).vectors
    ).all()


def test_a_row_is_the_same_whatever_stands_beside_it() -> None:
    reader, upper, lower = backbone("opt"), split_model("opt"), lower_half("opt", 2)
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 2))
    short, long = "ba da", "ga fo ka lo ma no pa"
    together = lower.forward(reader.text_input.read([long, short], 32))
    alone = lower.forward(reader.text_input.read([short], 32))
    np.testing.assert_allclose(together.states[-alone.lengths[0] :], alone.states, rtol=1e-4, atol=1e-5)
    answers = upper.answers(2, torch.from_numpy(together.states), together.lengths)
    single = upper.answers(2, torch.from_numpy(alone.states), alone.lengths)
    torch.testing.assert_close(answers[1:], single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "opt"])
def test_an_encoder_answers_by_the_mean_of_its_tokens_and_a_decoder_by_the_last(kind: str) -> None:
    upper, reader = split_model(kind), backbone(kind)
    values = scattered(upper)
    upper.load(values)
    tokens = tokens_of(reader, 3, 4)
    adapted = split_model(kind)
    adapted.load(values)
    with torch.no_grad():
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        last = adapted._view.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.numpy()
    rows = [states[real] for states, real in zip(last, tokens.mask, strict=True)]
    pooled = np.stack([row[-1] if kind == "opt" else row.mean(axis=0) for row in rows])
    wanted = pooled @ values["head.weight"].T + values["head.bias"]
    np.testing.assert_allclose(upper.whole(tokens).detach().numpy(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "outputs"), [(Task.TEXT_CLASSIFICATION, 5), (Task.MULTI_LABEL, 5), (Task.REGRESSION, 1)]
)
def test_a_task_decides_how_many_numbers_are_an_answer(task: Task, outputs: int) -> None:
    upper = SplitModel(backbone("bert"), LoraSpec(), task=task, labels=5, seed=0)
    assert upper.whole(tokens_of(backbone("bert"), 2, 0)).shape == (2, outputs)
    assert upper.head is None


def test_a_model_may_end_narrower_than_its_layers_are() -> None:
    upper = SplitModel(
        random_backbone("tiny-projected"), LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=3, seed=0
    )
    lower = LowerHalf(random_backbone("tiny-projected", lambda depth: 1), LoraSpec())
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 1))
    assert (upper.width, upper.parameters["head.weight"].shape) == (64, (3, 32))
    tokens = random_backbone("tiny-projected").text_input.read(["w1 w2 w3", "w4"], 8)
    passed = lower.forward(tokens)
    answers = upper.answers(1, torch.from_numpy(passed.states), passed.lengths)
    assert torch.equal(answers, upper.whole(tokens)) and answers.abs().sum() > 0


def test_a_language_models_head_gives_its_own_logits() -> None:
    upper = split_model("gpt2", lm=True)
    tokens = tokens_of(backbone("gpt2"), 3, 0)
    mask = torch.from_numpy(tokens.mask)
    with torch.no_grad():
        model = model_of("gpt2", head=True)
        wanted = model(input_ids=torch.from_numpy(tokens.ids), attention_mask=mask.long()).logits[mask]
        assert upper.head is not None
        torch.testing.assert_close(upper.head(upper.whole(tokens)), wanted, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("head.") for name in upper.parameters)


def test_tasks_that_it_does_not_learn_and_models_without_a_head_are_refused() -> None:
    with pytest.raises(ConfigError, match="task: token-classification"):
        SplitModel(backbone("bert"), LoraSpec(), task=Task.TOKEN_CLASSIFICATION, labels=2, seed=0)
    with pytest.raises(BackboneError, match="gpt2: was loaded without its output head"):
        SplitModel(backbone("gpt2"), LoraSpec(), task=Task.CAUSAL_LM, labels=0, seed=0)


@pytest.mark.parametrize("lm", [False, True])
def test_bf16_halves_learn_with_adapters_in_f32(lm: bool) -> None:
    kind = "llama" if lm else "bert"
    upper, lower = split_model(kind, lm=lm, precision="bf16"), lower_half(kind, 2, precision="bf16")
    upper.load(scattered(upper))
    lower.load(lower_part(upper, 2))
    tokens = tokens_of(backbone(kind), 3, 0)
    passed = lower.forward(tokens)
    assert passed.states.dtype == np.float32
    states = torch.from_numpy(passed.states.copy()).requires_grad_()
    answers = upper.answers(2, states, passed.lengths)
    assert answers.dtype == torch.float32 and torch.equal(answers, upper.whole(tokens))
    loss_of(upper, answers, some_targets(upper, tokens, 0)).backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None and states.grad.dtype == torch.float32
    gradients: Mapping[str, Floats] = passed.backward(states.grad.numpy())
    assert all(one.dtype == np.float32 and one.any() for one in gradients.values())
    assert all(one.dtype == torch.float32 for one in upper.parameters.values())


def test_int8_is_refused_with_what_to_set() -> None:
    kept = TorchBackbone(model_of("bert"), tokenizer(), layers=1, name="bert", precision="int8")
    told = "bert: no gradient passes through int8; set precision to f32 or bf16"
    with pytest.raises(BackboneError, match=told):
        LowerHalf(kept, LoraSpec())
    with pytest.raises(BackboneError, match=told):
        SplitModel(kept, LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=2, seed=0)
