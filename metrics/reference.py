"""The reference of all metrics, from the catalogue: ``python -m metrics.reference > docs/metrics.md``."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import Counter, Gauge

from metrics.broker_figures import BROKER_FIGURES
from metrics.catalogue import (
    CLOSED_SETS,
    AgentMetrics,
    Metric,
    TrainerMetrics,
)
from metrics.fleet_page.device_series import DEVICE_SERIES, DEVICES_UNLISTED

_HEAD = """\
# Metrics

Written from the code by `python -m metrics.reference`; [operations.md](operations.md#watching) says how to
use them. Names, types and labels are kept; new ones may be added. A counter's name ends in `_total`; a
histogram has `_bucket`, `_sum` and `_count`, in seconds from 0.1 ms to 10 s. What nobody has reported yet is
NaN, not 0. Trainer and agents also show `process_*` of their own process.
"""
_PARTS = {
    "The trainer": """\
At `http://127.0.0.1:9464/metrics` (`metrics_host`, `metrics_port`). `sidestream_device_…` are sums or
extremes over a tier's devices, from what these report over MQTT.""",
    "The broker": """\
What the broker says of itself on its `$SYS` topics, shown by the trainer. They are Mosquitto's; a broker that
has none, or an access list that hides them, means no such series.""",
    "Single devices": """\
Shown by the trainer for as many devices as `metrics_devices` allows (50; 0 for none), those known longest; so
the number of series is bounded whatever the fleet's size.""",
    "An agent": """\
At the agent's own port, where `metrics_port` in `agent.toml` asks for one.""",
}


def reference() -> str:
    """The page."""
    parts: dict[str, Iterable[Metric]] = {
        "The trainer": TrainerMetrics.catalogue(),
        "The broker": BROKER_FIGURES.values(),
        "Single devices": (*DEVICE_SERIES.values(), DEVICES_UNLISTED),
        "An agent": AgentMetrics.catalogue(),
    }
    page = [_HEAD]
    for title, metrics in parts.items():
        page += [f"## {title}\n", f"{_PARTS[title]}\n", "| metric | type | labels | |", "|---|---|---|---|"]
        page += [_row(metric) for metric in metrics]
        page.append("")
    page += ["## Labels\n", "| label | values |", "|---|---|", "| `tier` | the plan's tiers |"]
    page.append("| `device` | names of devices |")
    page += [
        f"| `{name}` | {', '.join(f'`{value}`' for value in values)} |"
        for name, values in CLOSED_SETS.items()
    ]
    return "\n".join(page) + "\n"


def _row(metric: Metric) -> str:
    kind = {Counter: "counter", Gauge: "gauge"}.get(metric.type, "histogram")
    labels = ", ".join(f"`{label}`" for label in metric.labels)
    return f"| `{metric.name}` | {kind} | {labels} | {metric.help} |"


if __name__ == "__main__":
    print(reference(), end="")
