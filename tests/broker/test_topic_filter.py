"""Topic filters match as MQTT 5 section 4.7 says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker_config.topic_filter import Filters, check_filter, check_topic, matches

LEVEL = st.text(alphabet="ab/$", max_size=3)


@pytest.mark.parametrize(
    ("topic_filter", "topic", "expected"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a/b/c", False),
        ("a/b/c", "a/b", False),
        ("a/+/c", "a/b/c", True),
        ("a/+/c", "a/b/b/c", False),
        ("+", "a", True),
        ("+", "/a", False),
        ("/+", "/a", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "ab", False),
        ("#", "a/b", True),
        ("#", "$SYS/x", False),
        ("+/x", "$SYS/x", False),
        ("$SYS/#", "$SYS/x", True),
        ("a/+", "a/", True),
    ],
)
def test_matching(topic_filter: str, topic: str, expected: bool) -> None:
    assert matches(topic_filter, topic) is expected


LEVELS = st.sampled_from(["", "a", "b", "a.b", "$x", "\n"])
FILTERS = st.tuples(
    st.lists(st.one_of(LEVELS, st.just("+")), min_size=1, max_size=4), st.sampled_from([[], ["#"]])
).map(lambda parts: "/".join([*parts[0], *parts[1]]))


@given(st.lists(st.one_of(FILTERS, st.just("#"))), st.lists(LEVELS, min_size=1, max_size=5).map("/".join))
def test_a_set_of_filters_matches_what_one_of_them_does(filters: list[str], topic: str) -> None:
    assert Filters(filters).match(topic) is any(matches(one, topic) for one in filters)


@given(st.lists(LEVEL, min_size=1).map("/".join).filter(bool))
def test_a_topic_matches_itself_and_its_own_subtree(topic: str) -> None:
    check_topic(topic)
    assert matches(topic, topic)
    assert matches(f"{topic}/#", topic)


@pytest.mark.parametrize("bad", ["", "a/#/b", "#a", "a+", "+a/b", "a\0"])
def test_malformed_filters_are_refused(bad: str) -> None:
    with pytest.raises(ValueError):
        check_filter(bad)
