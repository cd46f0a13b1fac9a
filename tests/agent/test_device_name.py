"""A device that is given no name goes by its host's, made unique where others are called the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge_agent.session.machine import device_name, keep_name, unique_name
from sidestream.contract.topics import check_name


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("kitchen", "kitchen"),
        ("Kitchen.local", "kitchen"),
        ("küche_2", "kuche_2"),
        ("-a b-", "a-b"),
        ("x" * 80, "x" * 40),
    ],
)
def test_it_is_the_hosts_name(tmp_path: Path, host: str, name: str) -> None:
    assert device_name(tmp_path, tmp_path, host) == name
    check_name("device", name)


@pytest.mark.parametrize("host", ["raspberrypi", "localhost.localdomain", "3f2a9c0d1b7e", "", "日本"])
def test_what_many_are_called_is_made_unique(tmp_path: Path, host: str) -> None:
    (tmp_path / "etc").mkdir()
    names = set()
    for machine in ("one", "two"):
        (tmp_path / "etc" / "machine-id").write_text(machine)
        names.add(device_name(tmp_path / "state", tmp_path, host))
    assert len(names) == 2
    for name in names:
        assert re.search(r"-[0-9a-f]{6}$", name)
        check_name("device", name)


def test_two_agents_on_one_machine_can_be_told_apart(tmp_path: Path) -> None:
    assert unique_name("kitchen", tmp_path / "a", tmp_path) != unique_name(
        "kitchen", tmp_path / "b", tmp_path
    )


def test_a_name_is_kept_whatever_becomes_of_the_hosts(tmp_path: Path) -> None:
    keep_name(tmp_path, device_name(tmp_path, tmp_path, "kitchen"))
    assert device_name(tmp_path, tmp_path, "cellar") == "kitchen"
