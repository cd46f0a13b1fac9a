"""The side-network equals a short reference, starts where it should, and treats rows as rows."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import About, decode_bundle, encode_bundle
from sidestream.side_network.form import align_of, first_blocks
from sidestream.side_network.network import SideNetwork, from_bundle

SPEC = SideNetworkSpec(blocks=3, width=8, inner=12)
ABOUT = About(
    job="j",
    run="0" * 32,
    version=1,
    labels=("a", "b", "c", "d", "e"),
    side_network=SPEC,
    aligns={"wide": 16, "nar.row": 6},
    tiers={"t": "wide"},
)
Array = npt.NDArray[np.float64]


def network(*, trained: bool = True, apart: int = 3) -> SideNetwork:
    made = SideNetwork(msgspec.structs.replace(SPEC, apart=apart), labels=5, seed=3)
    made.add_align("wide", 16)
    made.add_align("nar.row", 6)
    if trained:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made.eval()


def rows(width: int, taps: int, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(4)[None] < torch.randint(1, 5, (count, 1), generator=generator)
    return torch.randn(taps, count, 4, width, generator=generator), mask


def reference(
    weights: dict[str, Floats], align: str, taps: Array, mask: npt.NDArray[np.bool_], apart: int
) -> Array:
    """The module's formulas, row by row, in NumPy."""

    def norm(x: Array, name: str = "") -> Array:
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        scaled: Array = y * weights[f"{name}.weight"] + weights[f"{name}.bias"] if name else y
        return scaled

    def gelu(x: Array) -> Array:
        lifted: Array = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
        return lifted

    def linear(x: Array, name: str) -> Array:
        mapped: Array = x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]
        return mapped

    h, total = np.zeros(0), np.zeros(5)
    for b, tap in enumerate(taps):
        s = norm(tap) @ weights[f"aligns.{align}.weight"][b] + weights[f"aligns.{align}.bias"][b]
        alone = 0 < apart <= b + 1
        if b and not alone:
            mu = 1 / (1 + np.exp(-weights["gates"][b - 1]))
            s = (1 - mu) * s + mu * h
        h = s + linear(gelu(linear(norm(s, f"adapters.{b}.norm"), f"adapters.{b}.down")), f"adapters.{b}.up")
        pooled = (h * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
        said = linear(norm(pooled, f"steps.{b}.norm"), f"steps.{b}.head")
        total = total + (0.5 if b and alone else 1) * said
    return total


FORMS = pytest.mark.parametrize("apart", [0, 3, 2, 1])


@FORMS
@pytest.mark.parametrize("taps", [1, 2, 3])
def test_it_equals_the_reference(taps: int, apart: int) -> None:
    made = network(apart=apart)
    values, mask = rows(16, taps, 7, seed=2)
    expected = reference(made.arrays(), "@wide", values.double().numpy(), mask.numpy(), apart)
    np.testing.assert_allclose(made.predict("wide", values, mask).detach().numpy(), expected, atol=2e-5)


@FORMS
def test_rows_of_any_families_together_answer_as_they_do_alone(apart: int) -> None:
    made = network(apart=apart)
    deep, deep_mask = rows(16, 3, 4, seed=5)
    shallow, shallow_mask = rows(6, 2, 3, seed=6)
    logits = made([("wide", deep), ("nar.row", shallow)], torch.cat([deep_mask, shallow_mask]), exits=(2,))
    torch.testing.assert_close(logits[3], made.predict("wide", deep, deep_mask))
    torch.testing.assert_close(logits[2][:4], made.predict("wide", deep[:2], deep_mask))
    torch.testing.assert_close(logits[2][4:], made.predict("nar.row", shallow, shallow_mask))


def test_a_block_that_stands_apart_answers_by_its_own_tap_alone() -> None:
    made = network()
    values, mask = rows(16, 3, 6, seed=7)
    answers, alone = made.answers([("wide", values)], mask, exits=(2,))
    torch.testing.assert_close(answers[3], answers[2] + 0.5 * alone[3])
    below = values.clone()
    below[:2] += 1.0
    others, still = made.answers([("wide", below)], mask, exits=(2,))
    assert list(alone) == [3] and torch.equal(still[3], alone[3]) and not torch.equal(others[2], answers[2])
    assert not network(apart=0).answers([("wide", values)], mask).alone


def test_the_first_blocks_of_a_network_with_one_that_stands_apart_answer_as_they_do_in_it() -> None:
    made = network()
    spec = msgspec.structs.replace(made.spec, blocks=2)
    small = SideNetwork(spec, labels=5, seed=0)
    for name, width in (("wide", 16), ("nar.row", 6)):
        small.add_align(name, width)
    small.load_arrays(first_blocks(made.arrays(), 2))
    values, mask = rows(16, 2, 6, seed=7)
    torch.testing.assert_close(small.eval().predict("wide", values, mask), made.predict("wide", values, mask))


def test_padding_and_what_stands_in_it_change_nothing() -> None:
    made = network()
    values, mask = rows(16, 3, 6, seed=7)
    padded = torch.cat([values, torch.full((3, 6, 5, 16), 1e3)], dim=2)
    longer = torch.cat([mask, torch.zeros(6, 5, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(made.predict("wide", padded, longer), made.predict("wide", values, mask))


def test_it_starts_with_identity_adapters_and_no_opinion() -> None:
    made = network(trained=False)
    values, mask = rows(16, 3, 4, seed=8)
    assert made.predict("wide", values, mask).abs().max() == 0
    hidden = torch.randn(2, 3, 8)
    assert all(torch.equal(adapter(hidden), hidden) for adapter in made.adapters)


def test_a_map_starts_the_same_whenever_it_is_added() -> None:
    early, late = SideNetwork(SPEC, labels=5, seed=3), SideNetwork(SPEC, labels=5, seed=3)
    early.add_align("a", 4)
    early.add_align("b", 4)
    late.add_align("b", 4)
    late.add_align("a", 4)
    assert all(np.array_equal(early.arrays()[name], array) for name, array in late.arrays().items())
    assert not np.array_equal(early.arrays()["aligns.@a.weight"], early.arrays()["aligns.@b.weight"])


def test_a_language_model_s_states_are_lifted_as_the_formula_says_and_not_at_all_at_first() -> None:
    made = SideNetwork(SPEC, labels=0, seed=3, task=Task.CAUSAL_LM)
    made.add_align("wide", 16)
    taps, _ = rows(16, 3, 4, seed=8)
    assert torch.equal(made.eval().refine("wide", taps), taps[-1])
    out = dict(made.named_parameters())["outs.@wide.weight"]
    with torch.no_grad():
        out.normal_(generator=torch.Generator().manual_seed(2))
    hidden = dict(made.trunk([("wide", taps)]))[3]
    added = torch.nn.functional.layer_norm(hidden, (8,)) @ out.T
    size = taps[-1].square().mean(dim=-1, keepdim=True).sqrt()
    torch.testing.assert_close(made.refine("wide", taps), taps[-1] + size * added)
    about = msgspec.structs.replace(
        ABOUT, task=Task.CAUSAL_LM, labels=(), aligns={"wide": 16}, tiers={"t": "wide"}
    )
    back = from_bundle(decode_bundle(encode_bundle(about, made.arrays())))
    assert torch.equal(back.refine("wide", taps), made.refine("wide", taps))
    assert {align_of(name) for name in made.arrays() if name.startswith("outs.")} == {"wide"}


def test_a_bundle_brings_back_the_same_network() -> None:
    made = network()
    back = from_bundle(decode_bundle(encode_bundle(ABOUT, made.arrays())))
    values, mask = rows(16, 3, 4, seed=9)
    assert torch.equal(back.predict("wide", values, mask), made.predict("wide", values, mask))
    missing = {name: array for name, array in made.arrays().items() if name != "gates"}
    with pytest.raises(DecodeError, match="gates"):
        from_bundle(decode_bundle(encode_bundle(ABOUT, missing)))


def test_reading_a_bundle_never_touches_the_generator_that_a_fold_on_another_thread_draws_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = network()
    data = encode_bundle(ABOUT, made.arrays())
    touched: list[object] = []
    monkeypatch.setattr(torch, "manual_seed", touched.append)
    monkeypatch.setattr(torch.random, "set_rng_state", touched.append)
    from_bundle(decode_bundle(data))
    assert not touched


def test_parameters_say_which_map_they_belong_to() -> None:
    names = network().arrays()
    assert {align_of(name) for name in names} == {None, "wide", "nar.row"}
    assert align_of("steps.0.head.weight") is None and align_of("aligns.@nar%row.bias") == "nar.row"


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_the_first_blocks_alone_answer_as_the_whole_network_does_there(blocks: int) -> None:
    whole = network()
    about = About(
        job="j",
        run="0" * 32,
        version=1,
        labels=tuple("abcde"),
        side_network=msgspec.structs.replace(SPEC, blocks=blocks),
        aligns={"wide": 16, "nar.row": 6},
        tiers={"t": "wide"},
    )
    data = encode_bundle(about, first_blocks(whole.arrays(), blocks))
    part = from_bundle(decode_bundle(data))
    taps, mask = rows(16, blocks, 7, seed=2)
    with torch.no_grad():
        torch.testing.assert_close(part.predict("wide", taps, mask), whole.predict("wide", taps, mask))
    assert len(first_blocks(whole.arrays(), 3)) == len(whole.arrays())
