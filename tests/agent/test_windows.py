"""Long texts are cut into windows, and every token is predicted once, from as much as there is room for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sidestream.backbone.windows import Window, cut
from sidestream.contract.tasks import NO_TARGET

TOKENS = st.lists(st.integers(0, 2**17), max_size=60)


@given(TOKENS, TOKENS, st.integers(2, 20))
def test_every_token_to_be_predicted_is_predicted_once_from_its_predecessors(
    prompt: list[int], rest: list[int], longest: int
) -> None:
    ids, told = [*prompt, *rest], []
    for window in cut(prompt, rest, longest):
        assert 1 <= len(window.inputs) == len(window.targets) <= longest
        assert any(target != NO_TARGET for target in window.targets)
        told += [target for target in window.targets if target != NO_TARGET]
        following = [*window.inputs[1:], window.targets[-1]]
        for target, follows in zip(window.targets, following, strict=True):
            assert target in (NO_TARGET, follows)
    assert told == ids[max(len(prompt), 1) :]


def test_a_plain_text_is_cut_without_a_gap() -> None:
    assert cut([], [1, 2, 3, 4, 5, 6], 3) == [Window([1, 2, 3], [2, 3, 4]), Window([4, 5], [5, 6])]
    assert cut([], [1], 3) == [] and cut([], [], 3) == []


def test_of_a_long_prompt_the_end_is_kept_beside_the_completion() -> None:
    none = NO_TARGET
    assert cut([1, 2, 3], [8, 9], 8) == [Window([1, 2, 3, 8], [none, none, 8, 9])]
    assert cut([1, 2, 3, 4, 5], [8, 9], 4) == [Window([3, 4, 5, 8], [none, none, 8, 9])]
    first, second, *_ = cut(list(range(10)), list(range(20, 32)), 8)
    assert first.inputs == [6, 7, 8, 9, 20, 21, 22, 23] and second.inputs[0] == 24
