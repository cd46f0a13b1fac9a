"""The accuracy benchmark runs every row, and its account adds up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import narrow
from benchmarks.accuracy import main
from benchmarks.fleet import make_fleet
from benchmarks.metered import Turns
from benchmarks.result import Measured
from benchmarks.rows import ROWS
from benchmarks.table import accuracy_table, equal_accuracy, gap_text, gaps
from benchmarks.workload import Workload, parse_tiers, read_examples
from sidestream.backbone.runtimes import load_backbone
from sidestream.demo.shards import Example


def _run(arguments: list[str], tmp_path: Path, *more: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert main([*arguments, "--json", str(out), *more]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _measured(row: str, seed: int, **accuracy: float) -> Measured:
    return Measured(
        row=row, seed=seed, accuracy=accuracy, trainable=10, device_cpu_s=1.0, forwards=1, backwards=0
    )


def test_side_networks_learn_centrally_and_in_a_fleet(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = _run(arguments, tmp_path, "--rows", "linear,central,fleet", "--seeds", "3")
    by_row = {result["row"]: result for result in found["results"]}
    assert set(by_row["fleet"]["accuracy"]) == {"whole", "half"}
    assert by_row["central"]["mean"] > 0.8
    assert by_row["fleet"]["forwards"] == by_row["central"]["forwards"] == 1
    assert by_row["fleet"]["backwards"] == 0
    assert by_row["fleet"]["bytes_up"] > 0 and by_row["fleet"]["bytes_down"] > 0
    assert found["gaps"]["fleet"]["by_seed"].keys() == {"3"}
    assert found["commit"] and found["command"] and found["machine"]["processors"]
    printed = capsys.readouterr().out
    assert "| fleet" in printed and "gap, fleet less central" in printed


def test_devices_may_leave_and_join(arguments: list[str], tmp_path: Path) -> None:
    found = _run(arguments, tmp_path, "--rows", "fleet", "--seeds", "0", "--churn", "--alpha", "100")
    assert found["results"][0]["forwards"] < 1


def test_every_tier_may_have_a_job_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    found = _run(arguments, tmp_path, "--rows", "fleet-per-tier", "--seeds", "0")
    assert set(found["results"][0]["accuracy"]) == {"whole", "half"}


def test_a_tier_may_have_a_backbone_of_another_width(arguments: list[str], tmp_path: Path) -> None:
    """Made narrower without gradients or labels: what is left tells most of what the whole one does."""
    whole, small = tmp_path / "backbone", tmp_path / "narrow"
    made = ["--backbone", str(whole), "--texts", str(tmp_path / "train.jsonl"), "--heads", "3"]
    assert narrow.main([*made, "--out", str(small)]) == 0
    backbones = [load_backbone(str(one)) for one in (whole, small)]
    assert [one.width for one in backbones] == [32, 24]
    texts = [example.text for example in read_examples(str(tmp_path / "eval.jsonl"))]
    taken = [one.forward(texts, [one.depth], 32) for one in backbones]
    target, values = (torch.from_numpy(one.vectors[0]) for one in taken)
    values = torch.cat([values, torch.ones(len(values), 1)], dim=1)
    left = target - values @ torch.linalg.lstsq(values, target).solution
    assert left.square().sum() < 0.2 * (target - target.mean(dim=0)).square().sum()
    other = ("--tiers", "whole:0,narrow:0", "--tier-backbone", f"narrow={small}")
    found = _run(arguments, tmp_path, "--rows", "central,fleet", "--seeds", "0", *other)
    for result in found["results"]:
        assert min(result["accuracy"].values()) > 0.8, result


def test_a_backbone_for_a_tier_that_is_none_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--tier-backbone", "narrow=/x"]) == 1
    assert "'narrow' is none of the tiers whole, half" in capsys.readouterr().err


def test_the_backbone_itself_is_tuned_for_comparison(arguments: list[str], tmp_path: Path) -> None:
    few = ("--seeds", "0", "--rounds", "2", "--lora-epochs", "1", "--full-epochs", "1")
    found = _run(arguments, tmp_path, "--rows", "lora,full,fedavg-lora", *few)
    by_row = {result["row"]: result for result in found["results"]}
    assert by_row["lora"]["trainable"] < by_row["full"]["trainable"]
    assert set(by_row["lora"]["accuracy"]) == set(by_row["full"]["accuracy"]) == {"whole", "half"}
    assert set(by_row["fedavg-lora"]["accuracy"]) == {"whole"}
    assert len(by_row["fedavg-lora"]["rounds"]) == by_row["fedavg-lora"]["forwards"] == 2
    assert by_row["fedavg-lora"]["bytes_up"] == 2 * 4 * by_row["lora"]["trainable"]


def test_the_gap_is_fleet_less_central_in_points() -> None:
    results = [_measured("central", 1, a=0.9, b=0.8), _measured("fleet", 1, a=0.89, b=0.77)]
    found = gaps(results)["fleet"]
    assert found["mean"] == pytest.approx(-2)
    assert found["worst_tier"] == "b" and found["by_tier"]["b"] == pytest.approx(-3)
    assert "0.8300" in accuracy_table(results)


def test_the_gap_to_lora_is_over_the_tiers_that_lora_was_done_to() -> None:
    fleet, lora = _measured("fleet", 1, a=0.89, b=0.5), _measured("lora", 1, a=0.9)
    found = gaps([fleet, lora], "lora")["fleet"]
    assert found["mean"] == found["by_seed"]["1"] == pytest.approx(-1)
    assert "gap, fleet less lora, points: mean -1.00" in gap_text([fleet, lora])


def test_equal_accuracy_counts_only_the_rounds_that_it_takes() -> None:
    fleet, fedavg = _measured("fleet", 1, a=0.8), _measured("fedavg-lora", 1, a=0.9)
    fedavg.rounds, fedavg.device_cpu_s = [0.7, 0.85, 0.88, 0.9], 40.0
    found = equal_accuracy([fleet, fedavg])
    assert found["rounds"] == 2 and found["fedavg_device_cpu_s"] == 20
    assert found["saved"] == pytest.approx(0.95)


def test_equal_accuracy_tells_the_bytes_both_ways_to_there_and_no_further() -> None:
    fleet, fedavg = _measured("fleet", 1, a=0.8), _measured("fedavg-lora", 1, a=0.9)
    fleet.bytes_up, fleet.bytes_down = 2048.0, 1024.0
    fedavg.rounds, fedavg.bytes_up, fedavg.bytes_down = [0.7, 0.85, 0.88, 0.9], 16384.0, 8192.0
    found = equal_accuracy([fleet, fedavg])
    assert found["fleet_bytes"] == [2048, 1024] and found["fedavg_bytes"] == [8192, 4096]
    assert "fedavg-lora 8 + 4, the fleet 2 + 1: 0.25 of it" in gap_text([fleet, fedavg])


def test_churn_takes_a_third_each_and_one_is_fast() -> None:
    work = Workload(
        train=[Example(f"text {index}", "ab"[index % 2]) for index in range(120)],
        evaluation=[],
        labels=("a", "b"),
        tiers=parse_tiers("full:0,first4:4,first3:3"),
        backbone="none",
    )
    fleet = make_fleet(work, devices=12, alpha=0.5, seed=1, churn=True)
    leavers = {device.name for device in fleet if device.leaves}
    assert len(leavers) == 4
    assert {device.joins_after for device in fleet if device.joins_after} == leavers
    usual = {device.tier: 1 / (work.tiers[device.tier] or 6) for device in fleet}
    fast = [device for device in fleet if device.speed > 2 * usual[device.tier]]
    assert len(fast) == 1 and not fast[0].leaves and not fast[0].joins_after


def test_a_faster_device_gets_more_turns() -> None:
    turns = Turns(["fast", "slow"])
    turns.take("slow", 10.0)
    for _ in range(3):
        turns.take("fast", 3.0)
    turns.take("fast", 3.0)  # at 9, still behind the slow one's 10
    turns.leave("fast")
    turns.take("slow", 10.0)  # nobody left to wait for


def test_every_row_is_offered() -> None:
    assert list(ROWS) == [
        "linear",
        "central",
        "lora",
        "full",
        "fleet",
        "fleet-per-tier",
        "fedavg-lora",
    ]


def test_a_wrong_row_is_named(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--rows", "fleet,nonsense"])
    assert "nonsense" in capsys.readouterr().err
