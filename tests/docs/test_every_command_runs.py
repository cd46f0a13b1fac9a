"""A reader who follows a page from top to bottom gets what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.markdown import steps
from tests.docs.scenario import Scenario

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
    if any(step.kind not in ("skip", "file") for step in steps(path.read_text("utf-8")))
)


@pytest.mark.minilm
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_the_page_does_what_it_says(page: str, tmp_path: Path) -> None:
    scenario = Scenario(tmp_path)
    try:
        for step in steps((ROOT / page).read_text("utf-8")):
            scenario.do(step)
    finally:
        scenario.close()


def test_every_page_is_covered() -> None:
    assert "README.md" in PAGES
