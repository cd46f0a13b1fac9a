"""A predictor that stays up: questions that wait go in one pass, new weights take over without a gap."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from paho.mqtt.client import Client, MQTTMessage, MQTTv5
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from broker_config.connection.connection import Connection
from broker_config.embedded.broker import EmbeddedBroker, find_mosquitto
from broker_config.settings import BrokerSettings
from edge_agent.answers.answer import Prediction
from edge_agent.answers.predictor import Predictor
from edge_agent.serving.http import MOST_BYTES, PredictionServer
from edge_agent.serving.mqtt import MqttAnswers
from edge_agent.serving.predictions import MOST_TEXTS, Predictions
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.tasks import Modality
from tests.until import until


class FakePredictor:
    """Answers with the text's length, and notes what it was asked at once."""

    task = "text-classification"
    modality = Modality.TEXT
    labels = ("long", "short")

    def __init__(self, version: int) -> None:
        self.version = version
        self.asked: list[list[str]] = []
        self.may = threading.Event()
        self.may.set()

    def predict(self, texts: Sequence[str]) -> list[Prediction]:
        self.asked.append(list(texts))
        assert self.may.wait(60)
        if "bad" in texts:
            raise TypeError("predict takes a list of texts")
        return [Prediction(label=str(len(text)), probability=1.0) for text in texts]


class Stand:
    """Predictions over a fake, whose weights can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fake = FakePredictor(1)
        self.adopt(1)
        self.predictions = Predictions(folder, self._load, look_s=0.02)

    def adopt(self, version: int) -> None:
        (self.folder / "weights").mkdir(exist_ok=True)
        written = self.folder / "weights" / "new"
        written.write_text(str(version))
        written.replace(self.folder / "weights" / "adopted.json")

    def _load(self, folder: Path) -> Predictor:
        version = int((folder / "weights" / "adopted.json").read_text())
        if version < 0:
            raise StateError("half of it is missing")
        self.fake = FakePredictor(version) if version != 1 else self.fake
        return cast(Predictor, self.fake)


@pytest.fixture
def stand(tmp_path: Path) -> Iterator[Stand]:
    stand = Stand(tmp_path)
    yield stand
    stand.fake.may.set()
    stand.predictions.close()


def labels(answers: Sequence[Any]) -> list[str]:
    return [one.label for one in answers]


def together(count: int, ask: Callable[[int], Any]) -> list[Any]:
    """What so many threads are answered."""
    found: list[Any] = [None] * count

    def one(number: int) -> None:
        found[number] = ask(number)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def test_each_is_answered_its_own(stand: Stand) -> None:
    assert stand.predictions.ask([]) == (1, [])
    found = together(20, lambda number: stand.predictions.ask(["x" * number, "y"]))
    assert [labels(one.answers) for one in found] == [[str(number), "1"] for number in range(20)]


def test_those_that_wait_go_in_one_pass(stand: Stand) -> None:
    stand.fake.may.clear()
    first = threading.Thread(target=stand.predictions.ask, args=(["first"],))
    first.start()
    until(lambda: len(stand.fake.asked) == 1, "it is under way")
    waiting = stand.predictions._questions
    rest = [threading.Thread(target=stand.predictions.ask, args=([str(number)],)) for number in range(10)]
    for thread in rest:
        thread.start()
    until(lambda: waiting.qsize() == 10, "the others wait")
    stand.fake.may.set()
    for thread in (first, *rest):
        thread.join(60)
    assert [len(asked) for asked in stand.fake.asked] == [1, 10]


def test_one_that_cannot_be_answered_spoils_no_other(stand: Stand) -> None:
    def ask(number: int) -> Any:
        try:
            return stand.predictions.ask(["bad"] if number == 3 else ["good"])
        except TypeError as exc:
            return str(exc)

    found = together(6, ask)
    assert found[3] == "predict takes a list of texts"
    assert all(labels(one.answers) == ["4"] for number, one in enumerate(found) if number != 3)


def test_new_weights_take_over_between_two_questions_and_bad_ones_do_not(stand: Stand) -> None:
    stand.adopt(-1)
    assert stand.predictions.ask(["a"]).version == 1
    stand.adopt(5)
    until(lambda: stand.predictions.ask(["a"]).version == 5, "they are in use")


def test_too_much_at_once_is_refused(stand: Stand) -> None:
    with pytest.raises(StateError, match="at most"):
        stand.predictions.ask(["a"] * (MOST_TEXTS + 1))


# --- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def web(stand: Stand) -> Iterator[http.client.HTTPConnection]:
    with PredictionServer(stand.predictions, 0) as served:
        host, port = served.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        yield connection
        connection.close()


def post(web: http.client.HTTPConnection, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    web.request("POST", path, body if isinstance(body, str) else json.dumps(body), headers)
    answer = web.getresponse()
    return answer.status, json.loads(answer.read())


def test_questions_over_one_connection_are_answered_as_json(web: http.client.HTTPConnection) -> None:
    for _ in range(3):
        status, said = post(web, "/predict", {"texts": ["one", "three"]})
        assert status == 200 and said["version"] == 1
        assert [one["label"] for one in said["answers"]] == ["3", "5"]
    web.request("GET", "/health")
    assert json.loads(web.getresponse().read())["labels"] == ["long", "short"]


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("/predict", "nonsense", 400, "a question is JSON"),
        ("/predict", {"text": "a"}, 400, "an object with a list"),
        ("/predict", {"texts": ["bad"]}, 400, "list of texts"),
        ("/elsewhere", {"texts": []}, 404, "POST /predict"),
        ("/predict", {"texts": ["a"] * (MOST_TEXTS + 1)}, 503, "at most"),
    ],
)
def test_what_is_no_question_is_told(
    web: http.client.HTTPConnection, path: str, body: Any, status: int, says: str
) -> None:
    told = post(web, path, body)
    assert told[0] == status and says in told[1]["error"]
    assert post(web, "/predict", {"texts": ["one"]})[0] == 200, "and the connection goes on"


def test_a_web_site_whose_name_points_here_is_told_nothing(web: http.client.HTTPConnection) -> None:
    assert post(web, "/predict", {"texts": ["a"]}, Host="evil.example")[0] == 421


def test_a_question_that_is_too_long_is_not_read(web: http.client.HTTPConnection) -> None:
    web.putrequest("POST", "/predict")
    web.putheader("Content-Length", str(MOST_BYTES + 1))
    web.endheaders()
    assert web.getresponse().status == 413


def test_a_port_that_is_taken_is_a_line(stand: Stand) -> None:
    with PredictionServer(stand.predictions, 0) as served:
        port = int(served.url.rpartition(":")[2])
        with pytest.raises(ConfigError, match="serve_port"):
            PredictionServer(stand.predictions, port)


# --- over MQTT -------------------------------------------------------------------------------------------


@pytest.mark.mosquitto
@pytest.mark.skipif(find_mosquitto() is None, reason="there is no mosquitto binary")
def test_a_request_over_mqtt_5_is_answered_where_it_says_with_its_correlation_data(
    stand: Stand, tmp_path: Path
) -> None:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="mosquitto") as broker:
        connection = Connection(BrokerSettings(url=broker.url), client_id="serve")
        with MqttAnswers(stand.predictions, connection, "home/ask"):
            assert connection.wait_connected(30)
            found: list[MQTTMessage] = []
            ready = threading.Event()
            asker = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
            asker.on_message = lambda client, data, message: found.append(message)
            asker.on_subscribe = lambda *told: ready.set()
            asker.connect("127.0.0.1", broker.port)
            asker.loop_start()
            asker.subscribe("me/answers", 1)
            assert ready.wait(30)
            asked = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            asked.ResponseTopic, asked.CorrelationData = "me/answers", b"17"
            asker.publish("home/ask", b"no topic for an answer", 1)
            asker.publish("home/ask", json.dumps({"texts": ["four"]}), 1, properties=asked)
            until(lambda: len(found) == 1, "it is answered")
            asker.disconnect()
            asker.loop_stop()
    [answer] = found
    assert json.loads(answer.payload)["answers"][0]["label"] == "4"
    assert answer.properties is not None and getattr(answer.properties, "CorrelationData", b"") == b"17"
