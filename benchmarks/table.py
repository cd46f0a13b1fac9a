"""Results as Markdown tables. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from benchmarks.result import Measured

_HEADINGS = (
    *("method", "accuracy", "macro-F1", "by tier", "trainable", "device CPU s", "peak MiB"),
    *("up KiB/device", "down KiB/device", "forwards", "backwards"),
)


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def mean_of(values: Sequence[float | None], *, unit: float = 1) -> str:
    """The mean of those that are known, in units; a dash where none is."""
    known = [value for value in values if value is not None]
    return f"{mean(known) / unit:,.0f}" if known else "-"


def accuracy_table(results: Sequence[Measured]) -> str:
    """One line a method, over its seeds; beneath, accuracy by round where there are rounds."""
    names = list(dict.fromkeys(result.row for result in results))
    by_row = {name: [result for result in results if result.row == name] for name in names}
    text = render(_HEADINGS, [_line(name, seeds) for name, seeds in by_row.items()])
    for name, seeds in by_row.items():
        if seeds[0].rounds:
            rounds = zip(*(one.rounds for one in seeds), strict=True)
            text += f"\n\n{name}, accuracy after each round: " + " ".join(
                f"{mean(one):.3f}" for one in rounds
            )
    return text


def gaps(results: Sequence[Measured], base: str = "central") -> dict[str, Any]:
    """Fleet less centralised, in points, by seed and over seeds; empty where either is missing.

    Over the tiers that both have: of LoRA there may be the deepest alone.
    """
    found: dict[str, Any] = {}
    central = {one.seed: one.accuracy for one in results if one.row == base}
    for name in ("fleet", "fleet-per-tier"):
        by_seed = {
            one.seed: {
                tier: 100 * (value - central[one.seed][tier])
                for tier, value in one.accuracy.items()
                if tier in central[one.seed]
            }
            for one in results
            if one.row == name and one.seed in central
        }
        if not by_seed:
            continue
        shared = list(next(iter(by_seed.values())))
        tiers = {tier: mean(gap[tier] for gap in by_seed.values()) for tier in shared}
        found[name] = {
            "mean": mean(tiers.values()),
            "by_seed": {str(seed): mean(gap.values()) for seed, gap in by_seed.items()},
            "by_tier": tiers,
            "worst_tier": min(tiers, key=lambda tier: tiers[tier]),
        }
    return found


def equal_accuracy(results: Sequence[Measured]) -> dict[str, Any]:
    """What FedAvg-LoRA takes until it is as accurate as the fleet; empty without the two.

    Means over seeds; ``rounds`` is None where it never gets there, and its CPU and bytes are then those of
    all rounds. Bytes are a device's, up and down.
    """
    fleet = [one for one in results if one.row == "fleet"]
    fedavg = [one for one in results if one.row == "fedavg-lora"]
    if not fleet or not fedavg:
        return {}
    target = mean(one.mean for one in fleet)
    by_round = [mean(values) for values in zip(*(one.rounds for one in fedavg), strict=True)]
    reached = next((number for number, value in enumerate(by_round, start=1) if value >= target), None)
    share = (reached or len(by_round)) / len(by_round)
    fedavg_s = share * mean(one.device_cpu_s for one in fedavg)
    fleet_s = mean(one.device_cpu_s for one in fleet)
    return {
        "rounds": reached,
        "fleet_device_cpu_s": fleet_s,
        "fedavg_device_cpu_s": fedavg_s,
        "saved": 1 - fleet_s / fedavg_s,
        "fleet_bytes": _both_ways(fleet),
        "fedavg_bytes": [share * size for size in _both_ways(fedavg)],
    }


def _both_ways(results: Sequence[Measured]) -> list[float]:
    """Bytes a device sends, and receives."""
    return [mean(one.bytes_up or 0 for one in results), mean(one.bytes_down or 0 for one in results)]


def gap_text(results: Sequence[Measured]) -> str:
    """Gaps and equal accuracy as lines."""
    lines = []
    found = [(name, base, gap) for base in ("central", "lora") for name, gap in gaps(results, base).items()]
    for name, base, gap in found:
        seeds = "  ".join(f"seed {seed} {value:+.2f}" for seed, value in gap["by_seed"].items())
        tiers = "  ".join(f"{tier} {value:+.2f}" for tier, value in gap["by_tier"].items())
        worst = gap["worst_tier"]
        lines.append(
            f"gap, {name} less {base}, points: mean {gap['mean']:+.2f} ({seeds}); "
            f"worst tier {worst} {gap['by_tier'][worst]:+.2f} ({tiers})"
        )
    if equal := equal_accuracy(results):
        rounds = equal["rounds"]
        how = f"after round {rounds}" if rounds else "not within its rounds"
        lines.append(
            f"equal accuracy: fedavg-lora is as accurate as the fleet {how}, for "
            f"{equal['fedavg_device_cpu_s']:.0f} s of device CPU; the fleet takes "
            f"{equal['fleet_device_cpu_s']:.0f} s, {100 * equal['saved']:.0f} % less"
        )
        fleet, fedavg = equal["fleet_bytes"], equal["fedavg_bytes"]
        share = sum(fleet) / sum(fedavg) if sum(fedavg) else math.nan
        lines.append(
            f"equal accuracy, KiB a device up + down: fedavg-lora {_kib(fedavg)}, the fleet {_kib(fleet)}: "
            f"{share:.2f} of it"
        )
    return "\n".join(lines)


def _kib(sizes: Sequence[float]) -> str:
    return " + ".join(f"{size / 1024:,.0f}" for size in sizes)


def _line(name: str, seeds: Sequence[Measured]) -> list[str]:
    means = [one.mean for one in seeds]
    spread = f" ± {stdev(means):.4f}" if len(means) > 1 else ""
    macro = [mean(one.macro_f1.values()) for one in seeds if one.macro_f1]
    tiers = seeds[0].accuracy
    by_tier = "  ".join(f"{tier} {mean(one.accuracy[tier] for one in seeds):.4f}" for tier in tiers)
    peak = seeds[0].peak_bytes
    return [
        name,
        f"{mean(means):.4f}{spread}",
        f"{mean(macro):.4f}" if macro else "-",
        by_tier,
        f"{seeds[0].trainable:,}",
        f"{mean(one.device_cpu_s for one in seeds):.1f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        mean_of([one.bytes_up for one in seeds], unit=1024),
        mean_of([one.bytes_down for one in seeds], unit=1024),
        f"{mean(one.forwards for one in seeds):.2f}",
        f"{mean(one.backwards for one in seeds):.2f}",
    ]
