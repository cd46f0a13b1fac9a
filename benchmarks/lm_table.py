"""Results of the language-model benchmark: what a row holds, the gap that it closes, the table. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.table import mean_of, render

_HEADINGS = (
    *("method", "perplexity", "gap closed", "trainable", "device CPU s", "peak MiB"),
    *("up B/token", "down B/token", "forwards", "backwards"),
)


@dataclass(kw_only=True)
class LmMeasured:
    """One method, one seed."""

    row: str
    """The method."""
    seed: int
    """Of the order and the learner."""
    perplexity: float
    """A token, of the held-out documents."""
    trainable: int
    """Parameters trained."""
    device_cpu_s: float
    """Of all devices together; of a centralised method, of the one machine."""
    up_per_token: float | None = None
    """Payload bytes that devices send, a training token; None where nothing travels."""
    down_per_token: float | None = None
    """Payload bytes that all devices receive, a training token."""
    forwards: float
    """Forward passes a training token, on devices."""
    backwards: float
    """Backward passes a training token, on devices."""
    peak_bytes: int | None = None
    """A device's peak memory above the loaded model."""
    wall_s: float = 0.0
    """What the run took here."""


def gap_closed(results: Sequence[LmMeasured], row: str) -> float | None:
    """Of the log-perplexity that LoRA takes off the frozen model's, the share that ``row`` does.

    Means over seeds; None where one of the three is missing, or LoRA takes nothing off.
    """
    logs = {name: _log_perplexity(results, name) for name in ("frozen", "lora", row)}
    frozen, lora, own = logs["frozen"], logs["lora"], logs[row]
    if frozen is None or lora is None or own is None or lora >= frozen:
        return None
    return (frozen - own) / (frozen - lora)


def fleet_over_central(results: Sequence[LmMeasured]) -> float | None:
    """The fleet's perplexity less the centralised side-network's, as a share of the latter."""
    fleet, central = _log_perplexity(results, "fleet"), _log_perplexity(results, "central")
    return None if fleet is None or central is None else math.exp(fleet - central) - 1


def lm_table(results: Sequence[LmMeasured]) -> str:
    """One line a method, over its seeds; beneath, how the fleet compares with the central one."""
    names = list(dict.fromkeys(result.row for result in results))
    lines = [_line(name, results) for name in names]
    text = render(_HEADINGS, lines)
    over = fleet_over_central(results)
    return text if over is None else f"{text}\n\nfleet less central, perplexity: {100 * over:+.2f} %"


def _log_perplexity(results: Sequence[LmMeasured], row: str) -> float | None:
    found = [math.log(one.perplexity) for one in results if one.row == row]
    return mean(found) if found else None


def _line(name: str, results: Sequence[LmMeasured]) -> list[str]:
    seeds = [one for one in results if one.row == name]
    values = [one.perplexity for one in seeds]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    closed, peak = gap_closed(results, name), seeds[0].peak_bytes
    return [
        name,
        f"{mean(values):.2f}{spread}",
        "-" if closed is None else f"{100 * closed:.0f} %",
        f"{seeds[0].trainable:,}",
        f"{mean(one.device_cpu_s for one in seeds):.0f}",
        "-" if peak is None else f"{peak / 2**20:.0f}",
        mean_of([one.up_per_token for one in seeds]),
        mean_of([one.down_per_token for one in seeds]),
        f"{mean(one.forwards for one in seeds):.2f}",
        f"{mean(one.backwards for one in seeds):.2f}",
    ]
