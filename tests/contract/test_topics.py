"""The topic tree is a promise to ACLs and dashboards; what arrives on a topic is read strictly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import ConfigError, DecodeError
from sidestream.contract.topics import Topics, Uplink, check_name

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True)
topics = Topics("assist")


def test_the_tree_is_frozen() -> None:
    assert [
        topics.plan,
        topics.trainer_status,
        topics.activations("pi", "d1"),
        topics.status("pi", "d1"),
        topics.telemetry("pi", "d1"),
        topics.uplink_filter("status"),
        topics.weights("pi"),
        topics.final_weights("pi"),
        topics.weights_chunk("pi", 7, 2),
        topics.weights_chunks_filter("pi"),
        topics.receipt("pi", "d1"),
        topics.flow("pi"),
        topics.rejected("pi", "d1"),
    ] == [
        "sidestream/v1/assist/plan",
        "sidestream/v1/assist/trainer/status",
        "sidestream/v1/assist/up/pi/d1/activations",
        "sidestream/v1/assist/up/pi/d1/status",
        "sidestream/v1/assist/up/pi/d1/telemetry",
        "sidestream/v1/assist/up/+/+/status",
        "sidestream/v1/assist/down/pi/weights",
        "sidestream/v1/assist/down/pi/weights/final",
        "sidestream/v1/assist/down/pi/weights/7/2",
        "sidestream/v1/assist/down/pi/weights/+/+",
        "sidestream/v1/assist/down/pi/device/d1/receipt",
        "sidestream/v1/assist/down/pi/flow",
        "sidestream/v1/assist/rejected/pi/d1",
    ]


@given(NAMES, NAMES, NAMES)
def test_a_devices_topics_are_read_back(job: str, tier: str, device: str) -> None:
    ours = Topics(job)
    for kind, topic in (
        ("activations", ours.activations(tier, device)),
        ("status", ours.status(tier, device)),
        ("telemetry", ours.telemetry(tier, device)),
    ):
        assert ours.parse_uplink(topic) == Uplink(tier=tier, device=device, kind=kind)


@given(NAMES, st.integers(0, 10**18 - 1), st.integers(0, 10**9 - 1))
def test_a_chunks_topic_is_read_back(tier: str, version: int, index: int) -> None:
    assert topics.parse_weights_chunk(topics.weights_chunk(tier, version, index)) == (version, index)


@given(st.text() | st.text(alphabet="ab/+#$.\0\n٣", max_size=30))
def test_any_other_topic_is_refused(text: str) -> None:
    for topic in (text, f"{topics.base}/up/{text}", f"{topics.base}/down/{text}"):
        for parse in (topics.parse_uplink, topics.parse_weights_chunk):
            try:
                parse(topic)
            except DecodeError as exc:
                assert len(str(exc)) < 2500


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "sidestream/v1/assist/up/pi/d1",
        "sidestream/v1/assist/up/pi/d1/status/",
        "sidestream/v1/assist/up/pi/d1/receipt",
        "sidestream/v1/assist/up//d1/status",
        "sidestream/v1/assist/up/pi/../status",
        "sidestream/v1/assist/up/+/d1/status",
        "sidestream/v1/assist/up/pi/d1\n/status",
        "sidestream/v1/assist2/up/pi/d1/status",
        "sidestream/v2/assist/up/pi/d1/status",
        "/sidestream/v1/assist/up/pi/d1/status",
        f"sidestream/v1/assist/up/pi/{'d' * 65}/status",
    ],
)
def test_a_topic_that_is_nearly_a_devices_is_refused(topic: str) -> None:
    with pytest.raises(DecodeError):
        topics.parse_uplink(topic)


@pytest.mark.parametrize(
    "rest",
    ["1", "1/2/3", "-1/0", "1/x", "+/+", "\u0661/\u0662", "1" * 19 + "/0", "1/" + "1" * 10, " 1/0", "1/0\n"],
)
def test_a_chunks_topic_holds_two_plain_numbers(rest: str) -> None:
    with pytest.raises(DecodeError):
        topics.parse_weights_chunk(f"{topics.base}/down/pi/weights/{rest}")


@given(st.text(max_size=70))
def test_a_name_is_one_plain_level_or_a_setting_to_correct(name: str) -> None:
    try:
        assert check_name("tier", name) == name
    except ConfigError as exc:
        assert exc.field == "tier"
        assert len(str(exc)) < 1000
    else:
        assert name.isascii() and not set(name) & set("/+#$\0 \n") and 1 <= len(name) <= 64
        assert name not in (".", "..") and not name.startswith("-"), "it may become a file or an argument"


@pytest.mark.parametrize("job", ["", "a/b", "a+", "#", "$SYS", "ü", "a" * 65, "a\n", ".", "-x"])
def test_a_job_is_named_so_that_mqtt_can_carry_it(job: str) -> None:
    with pytest.raises(ConfigError, match="job"):
        Topics(job)
