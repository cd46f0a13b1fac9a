"""Every alert has its section, every metric its row, every setting of watching its word."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
import yaml

from metrics.catalogue import Reason
from metrics.fleet_page.board import QUARANTINED
from metrics.fleet_page.fleet import State
from metrics.reference import reference
from metrics.shipping import shipped
from side_trainer.settings.schema import TrainerConfig

DOCS = Path(__file__).resolve().parents[2] / "docs"
OPERATIONS = (DOCS / "operations.md").read_text("utf-8")
ALERTS = [
    rule for group in yaml.safe_load(shipped("sidestream.alerts.yml"))["groups"] for rule in group["rules"]
]


@pytest.mark.parametrize("rule", ALERTS, ids=[rule["alert"] for rule in ALERTS])
def test_every_alert_has_a_section_that_names_its_severity(rule: dict[str, dict[str, str] | str]) -> None:
    section = re.search(rf"^### {rule['alert']}\n\n(.*?)(?=^##|\Z)", OPERATIONS, re.MULTILINE | re.DOTALL)
    assert section and len(section[1]) > 150
    labels = rule["labels"]
    assert isinstance(labels, dict) and section[1].startswith(labels["severity"].capitalize())


def test_no_section_is_of_an_alert_that_is_gone() -> None:
    assert set(re.findall(r"^### (Sidestream\w+)$", OPERATIONS, re.MULTILINE)) == {
        rule["alert"] for rule in ALERTS
    }


def test_the_reference_of_metrics_is_what_the_code_says() -> None:
    assert (DOCS / "metrics.md").read_text("utf-8") == reference(), "run python -m metrics.reference"


def test_every_reason_every_state_and_every_setting_of_watching_is_explained() -> None:
    for reason in set(Reason) - {Reason.OTHER}:
        assert f"`{reason}`" in OPERATIONS, reason
    for state in (*(state.value for state in State), QUARANTINED):
        assert f"*{state}*:" in OPERATIONS, state
    names = (field.name for field in msgspec.structs.fields(TrainerConfig))
    for name in names:
        if name.startswith(("page", "metrics_", "log_")):
            assert f"`{name}`" in OPERATIONS or f"`{name} = " in OPERATIONS, name
