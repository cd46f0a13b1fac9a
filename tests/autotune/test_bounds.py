"""``autotune`` and ``[tuning]`` in trainer.toml: what may be assigned, and what does not go together."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from side_trainer.autotune.choices import Choices
from side_trainer.journal.records import Quantity
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tuning import TuningConfig, assignable, rung_bytes
from sidestream.contract.errors import ConfigError
from sidestream.contract.plan import TierPlan
from sidestream.contract.sampling import Assignable, Rung
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec
from tests.autotune.fleet import TUNING, choices, plan


def load(folder: Path, text: str) -> TrainerConfig:
    path = folder / "t.toml"
    path.write_text(f'job = "a"\n{text}')
    return SettingsFile(path).load()


def bounds(folder: Path, text: str) -> Assignable:
    config = load(folder, f"autotune = true\n{text}")
    found = config.assignable(config.tier_plan("generic")).assignable
    assert found is not None
    return found


def test_it_is_off_by_default(tmp_path: Path) -> None:
    config = load(tmp_path, "")
    assert not config.autotune
    assert config.assignable(config.tier_plan("generic")).assignable is None


def test_by_default_nothing_costs_a_device_more_than_its_tier_does(tmp_path: Path) -> None:
    found = bounds(tmp_path, '[tiers.generic]\nbackbone = "m"\n')
    assert (found.batch_size_min, found.batch_size_max) == (4, 16)
    assert (found.max_tokens_min, found.max_tokens_max) == (32, 128)
    assert [f"{rung.sampling} {rung.codec.value}" for rung in found.rungs] == [
        "segments:4 int4",
        "segments:4 int2",
        "segments:2 int2",
        "mean int2",
    ]


def test_where_it_may_be_more_the_whole_ladder_is_there_with_the_tiers_own_way_in_its_place(
    tmp_path: Path,
) -> None:
    text = '[tuning]\nricher = true\n[tiers.generic]\nbackbone = "m"\nsampling = "segments:6"\n'
    found = bounds(tmp_path, f"{text}batch_size = 2\nmax_tokens = 20\n")
    names = [rung.sampling for rung in found.rungs]
    assert names == [
        "all",
        "all",
        "all",
        "segments:8",
        "segments:6",
        *["segments:4"] * 2,
        "segments:2",
        "mean",
    ]
    assert (found.batch_size_min, found.max_tokens_min) == (2, 20), "what the tier has is among them"


@pytest.mark.parametrize("task", ["causal-lm", "token-classification", "image-classification"])
def test_where_every_vector_has_an_answer_and_for_images_nothing_is_cut_shorter(
    tmp_path: Path, task: str
) -> None:
    found = bounds(tmp_path, f'task = "{task}"\n')
    assert found.max_tokens_min == found.max_tokens_max


def test_rungs_stay_within_what_privacy_leaves(tmp_path: Path) -> None:
    found = bounds(tmp_path, 'privacy = "mean"\n[tuning]\nricher = true\n')
    assert {rung.sampling for rung in found.rungs} == {"mean"}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('method = "split-lora"', "autotune"),
        ('method = "split-frozen"', "autotune"),
        ('[tuning]\ntiers = ["pi9"]', "tuning.tiers"),
        ("[tuning]\nbatch_size_max = 8", "tuning.batch_size_max"),
        ("[tuning]\nmax_tokens_max = 64", "tuning.max_tokens_max"),
        ("[tuning]\nmemory_share = 0", "tuning.memory_share"),
    ],
)
def test_what_does_not_go_is_named(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, f"autotune = true\n{text}")
    assert told in str(caught.value)


def test_bounds_below_a_tiers_own_only_matter_where_something_is_chosen(tmp_path: Path) -> None:
    assert load(tmp_path, "[tuning]\nbatch_size_max = 8").tuning.batch_size_max == 8


def test_what_may_be_assigned_may_be_uploaded() -> None:
    tier = plan(
        msgspec.structs.replace(TUNING, richer=True), ladder=(Rung(sampling="pivot", codec=Codec.F16),)
    )
    one = tier.tiers["deep"]
    assert one.assignable is not None
    assert {rung.sampling for rung in one.assignable.rungs} <= one.policies(Task.TEXT_CLASSIFICATION)


@given(
    batch=st.integers(1, 256),
    least=st.integers(1, 256),
    more=st.integers(0, 256),
    tokens=st.integers(4, 4096),
)
def test_steps_lead_from_the_tiers_own_to_either_end_and_back(
    batch: int, least: int, more: int, tokens: int
) -> None:
    tuning = TuningConfig(batch_size_min=least, batch_size_max=min(256, batch + more))
    known = choices("deep", tuning, batch_size=batch, max_tokens=tokens)
    for what in (Quantity.BATCH_SIZE, Quantity.MAX_TOKENS, Quantity.RUNG, Quantity.TIER):
        _walk(known, what)


def _walk(known: Choices, what: Quantity) -> None:
    """Down to the end and up to the other: every place is within bounds, and is come by from either side."""
    down, up = [known.own], []
    while (then := known.step(down[-1], what, up=False)) is not None:
        down.append(then)
    up = [down[-1]]
    while (then := known.step(up[-1], what, up=True)) is not None:
        up.append(then)
    assert up[: len(down)] == down[::-1]
    for setting in up:
        assert known.fitted(setting) == setting
        assert known.bounds.why_not(setting.assignment(run="ab" * 16, version=1, fence=1)) == ""
    bounds = known.bounds
    if what is Quantity.BATCH_SIZE:
        assert (up[0].batch_size, up[-1].batch_size) == (bounds.batch_size_min, bounds.batch_size_max)
    if what is Quantity.RUNG:
        assert {setting.rung for setting in up} == set(bounds.rungs)
    assert len(set(up)) == len(up)


def test_rungs_are_in_the_order_of_what_they_take() -> None:
    tier = TierPlan(backbone="m", depth=6, width=384, taps=(1, 3, 6), fingerprint="f")
    rungs = assignable(tier, Task.TEXT_CLASSIFICATION, TuningConfig(richer=True)).rungs
    taken = [rung_bytes(rung, 128, tier) for rung in rungs]
    assert taken == sorted(taken, reverse=True)
    assert taken[0] == 3 * 128 * 384 + 2 * 3 * 128, "all tokens of three taps in int8, with their scales"


def test_the_tier_that_is_advised_is_the_next_one_to_the_devices_own() -> None:
    """What a device measures, it measures in its own; one of as many layers is no other place to be."""
    two = plan()
    middle = msgspec.structs.replace(two.tiers["deep"], depth=4, taps=(1, 4))
    tiers = {**two.tiers, "middle": middle, "deep-too": two.tiers["deep"]}
    three = msgspec.structs.replace(two, tiers=tiers)

    def walk(tier: str, up: bool) -> list[str]:
        known = Choices.of(tier, three, ())
        assert known is not None
        found, setting = [], known.step(known.own, Quantity.TIER, up=up)
        while setting is not None:
            found.append(setting.advised)
            setting = known.step(setting, Quantity.TIER, up=up)
        return found

    assert walk("deep", up=False) == ["middle"] and walk("deep", up=True) == []
    assert walk("middle", up=False) == ["shallow"] and walk("middle", up=True) == ["deep"]
    assert walk("shallow", up=True) == ["middle"]


def test_no_tier_of_another_backbone_or_width_is_advised_unless_it_is_named_and_fits() -> None:
    one = plan()
    other = msgspec.structs.replace(one.tiers["shallow"], backbone="n")
    wide = msgspec.structs.replace(one.tiers["shallow"], width=768, align="w")
    mixed = msgspec.structs.replace(one, tiers={"deep": one.tiers["deep"], "other": other, "wide": wide})
    plain, named = Choices.of("deep", mixed, ()), Choices.of("deep", mixed, ("other", "wide"))
    assert plain is not None and set(plain.depths) == {"deep"}
    assert named is not None and set(named.depths) == {"deep", "other"}


def test_nothing_is_chosen_in_a_tier_that_is_not_settled() -> None:
    one = plan()
    unsettled = msgspec.structs.replace(one.tiers["deep"], depth=0, taps=())
    assert Choices.of("deep", msgspec.structs.replace(one, tiers={"deep": unsettled}), ()) is None
