"""The side-network that answers on devices, in NumPy, says what the one that is trained says, in torch."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import SideNetworkSpec
from sidestream.contract.tasks import TASKS, Task
from sidestream.side_network.bundle import About, Bundle, decode_bundle, encode_bundle
from sidestream.side_network.form import first_blocks, shapes_of
from sidestream.side_network.inference import InferenceNetwork, _gelu
from sidestream.side_network.network import SideNetwork, from_bundle

ALIGNS = {"wide": 10, "nar.row": 6}
CLASSIFIERS = sorted({*Task} - {Task.CAUSAL_LM})
SPECS = st.builds(
    SideNetworkSpec,
    blocks=st.integers(1, 4),
    width=st.integers(1, 12),
    inner=st.integers(1, 12),
    apart=st.integers(0, 5),
)


def trained(spec: SideNetworkSpec, task: Task, codec: Any, taps: int, seed: int) -> Bundle:
    """A bundle as a device of so many taps gets it, with weights that say something."""
    labels = tuple("abcde") if TASKS[task].named else ()
    network = SideNetwork(spec, labels=len(labels), seed=seed, task=task)
    for name, width in ALIGNS.items():
        network.add_align(name, width)
    starts: dict[str, tuple[int, ...]] = {}
    if task is Task.TEXT_CLASSIFICATION:
        starts = dict.fromkeys(ALIGNS, (taps,))
    for name in starts:
        network.add_start(name, taps)
    with torch.no_grad():
        for parameter in [*network.parameters(), *network.buffers()]:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)) * 0.3)
    about = About(
        job="j",
        run="0" * 32,
        version=1,
        labels=labels,
        side_network=msgspec.structs.replace(spec, blocks=taps),
        aligns=ALIGNS,
        tiers={"t": "wide"},
        task=task,
        starts=starts,
    )
    return decode_bundle(encode_bundle(about, first_blocks(network.arrays(), taps), codec=codec))


@pytest.mark.slow
@given(
    spec=SPECS,
    task=st.sampled_from(CLASSIFIERS),
    codec=st.sampled_from(["f32", "f16", "int8", "packed"]),
    align=st.sampled_from(sorted(ALIGNS)),
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=6),
    data=st.data(),
)
@settings(max_examples=150)
def test_every_form_and_task_answers_as_in_torch(
    spec: SideNetworkSpec, task: Task, codec: str, align: str, lengths: list[int], data: st.DataObject
) -> None:
    held = data.draw(st.integers(1, spec.blocks), "blocks in the bundle")
    taps = data.draw(st.integers(1, held), "taps")
    bundle = trained(spec, task, codec, held, seed=data.draw(st.integers(0, 9), "seed"))
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    drawn = np.random.default_rng(sum(lengths)).normal(size=(taps, *mask.shape, ALIGNS[align])) * 3
    padded = drawn.astype(np.float32)
    with torch.inference_mode():
        wanted = from_bundle(bundle).predict(align, torch.from_numpy(padded), torch.from_numpy(mask)).numpy()
    found = InferenceNetwork(bundle).predict(align, padded[:, mask], np.array(lengths))
    assert found.dtype == np.float32
    wanted = wanted[mask] if TASKS[task].per_vector else wanted
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(wanted).max()))


@given(spec=SPECS, vectors=st.integers(1, 9), seed=st.integers(0, 9))
def test_a_language_models_states_are_lifted_as_in_torch(
    spec: SideNetworkSpec, vectors: int, seed: int
) -> None:
    bundle = trained(spec, Task.CAUSAL_LM, "int8", spec.blocks, seed)
    taps = np.random.default_rng(seed).normal(size=(spec.blocks, vectors, 10)).astype(np.float32)
    with torch.inference_mode():
        wanted = from_bundle(bundle).refine("wide", torch.from_numpy(taps)).numpy()
    found = InferenceNetwork(bundle).refine("wide", taps)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * max(1.0, np.abs(wanted).max()))


def test_the_activation_is_the_one_with_the_error_function() -> None:
    values = np.linspace(-12, 12, 5001, dtype=np.float32)
    exact = [0.5 * one * (1 + math.erf(one / math.sqrt(2))) for one in values.tolist()]
    np.testing.assert_allclose(_gelu(values), exact, rtol=0, atol=5e-7)


def test_what_is_computed_again_has_the_same_bits_and_rows_do_not_disturb_each_other() -> None:
    network = InferenceNetwork(
        trained(SideNetworkSpec(width=8, inner=8), Task.TEXT_CLASSIFICATION, "f32", 3, 1)
    )
    vectors = np.random.default_rng(1).normal(size=(3, 9, 10)).astype(np.float32)
    once, again = (network.predict("wide", vectors, np.array([2, 3, 4])) for _ in range(2))
    assert once.tobytes() == again.tobytes()
    alone = network.predict("wide", vectors[:, 2:5], np.array([3]))
    np.testing.assert_allclose(alone, once[1:2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("task", [*Task])
def test_both_know_the_same_parameters_and_refuse_others(task: Task) -> None:
    bundle = trained(SideNetworkSpec(blocks=2, width=3), task, "f32", 2, 1)
    assert dict(shapes_of(bundle.about)) == {name: one.shape for name, one in bundle.tensors.items()}
    for name in bundle.tensors:
        for other in (
            {},
            {name: np.zeros((9, 9), np.float32)},
            {name: bundle.tensors[name], "more": np.zeros(1)},
        ):
            rest = {known: one for known, one in bundle.tensors.items() if known != name}
            wrong = msgspec.structs.replace(bundle, tensors={**rest, **other})
            with pytest.raises(DecodeError, match=rf"do not fit the side-network: ({name}|more) has shape"):
                InferenceNetwork(wrong)


def test_a_linear_start_is_what_the_probe_says_and_a_part_of_the_answer() -> None:
    bundle = trained(SideNetworkSpec(width=8, inner=8), Task.TEXT_CLASSIFICATION, "f32", 3, 1)
    vectors = np.random.default_rng(1).normal(size=(3, 9, 10)).astype(np.float32)
    lengths = np.array([2, 3, 4])
    whole, probe = (
        getattr(InferenceNetwork(bundle), ask)("wide", vectors, lengths) for ask in ("predict", "probe")
    )
    tensors = {name: array for name, array in bundle.tensors.items() if not name.startswith("starts.")}
    without = InferenceNetwork(
        Bundle(about=msgspec.structs.replace(bundle.about, starts={}), tensors=tensors)
    )
    np.testing.assert_allclose(whole, without.predict("wide", vectors, lengths) + probe, rtol=1e-5, atol=1e-5)
    assert without.probe("wide", vectors, lengths) is None


def test_a_linear_start_takes_each_taps_normalised_mean_of_normalised_vectors() -> None:
    bundle = trained(SideNetworkSpec(width=8, inner=8), Task.TEXT_CLASSIFICATION, "f32", 3, 1)
    rows = np.random.default_rng(2).normal(size=(3, 4, 10)).astype(np.float32) * 5

    def normed(values: Any) -> Any:
        return (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + 1e-5)

    weight, bias = (bundle.tensors[f"starts.@wide/3.{one}"] for one in ("weight", "bias"))
    wanted = sum(normed(normed(rows[tap]).mean(axis=0)) @ weight[tap] for tap in range(3)) + bias
    found = InferenceNetwork(bundle).probe("wide", rows, np.array([4]))
    assert found is not None
    np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-4)
