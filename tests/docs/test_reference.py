"""Reference pages say what the code says."""

from __future__ import annotations

from tests.docs.reference import PAGE, page


def test_the_wire_reference_is_current() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m tests.docs.reference"
