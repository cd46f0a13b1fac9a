"""Reference pages say what the code says."""

from __future__ import annotations

from tests import rooms
from tests.docs.reference import PAGE, page


def test_the_wire_reference_is_current() -> None:
    assert PAGE.read_text("utf-8") == page(), "run: python -m tests.docs.reference"


def test_the_picture_of_the_rooms_is_current() -> None:
    assert rooms.PAGE.read_text("utf-8") == rooms.page(), "run: python -m tests.rooms"


def test_no_room_is_crowded_and_each_says_what_it_is_for() -> None:
    for room in rooms.rooms().values():
        assert room.about, room.name
        assert room.files <= 14, f"{room.name} has {room.files} files"
