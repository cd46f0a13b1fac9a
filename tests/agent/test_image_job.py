"""A device whose samples are images takes part in a job; the trainer is a script."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.answers.predictor import load
from edge_agent.serving.http import answer_to
from edge_agent.serving.predictions import Predictions
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone
from sidestream.cli import main
from sidestream.contract.errors import DataError
from sidestream.contract.tasks import Task
from tests.agent.fake_trainer import LABELS, TIER, FakeTrainer
from tests.agent.fleet import Running
from tests.agent.late import listed
from tests.agent.tiny_vision import file_of, pixels, save_tiny_vision, write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> TorchVisionBackbone:
    folder = save_tiny_vision(tmp_path_factory.mktemp("vision") / "vit")
    return shared_backbone(str(folder), 0, "f32", Task.IMAGE_CLASSIFICATION)  # type: ignore[return-value]


def publish(trainer: FakeTrainer) -> None:
    trainer.publish_plan(task=Task.IMAGE_CLASSIFICATION)


def final(trainer: FakeTrainer) -> None:
    bundle = trainer.bundle(9, favour=1, task=Task.IMAGE_CLASSIFICATION)
    trainer.send(trainer.topics.weights(TIER), trainer.manifest(9, bundle, final=True))


@pytest.fixture
def trainer(broker: InProcessBroker, vit: TorchVisionBackbone) -> Iterator[FakeTrainer]:
    with FakeTrainer(broker, vit) as running:
        yield running


def test_a_folder_of_images_is_sent_once_held_out_measured_and_broken_ones_counted(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    vit: TorchVisionBackbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    publish(trainer)
    folder = write_images(tmp_path / "images", LABELS, 20)
    (folder / "on" / "half.png").write_bytes(file_of(pixels(1))[:60])
    data = {"path": str(folder), "held_out_share": 0.2}
    with Running(broker, vit, tmp_path, data=data, exit_when_done=True) as agent:
        trainer.wait(lambda t: t.telemetry["pi-1"].samples_read == 41)
        held = trainer.telemetry["pi-1"].samples_held_out
        trainer.wait(lambda t: t.rows() == 40 - held)
        final(trainer)
        assert agent.join() == 0
    told = trainer.telemetry["pi-1"]
    assert 0 < held < 20 and told.evaluation_samples == held and told.accuracy is not None
    assert told.samples_broken == 1 and told.samples_forwarded == 40 - held
    assert "half.png: is a broken image, or only half of one" in caplog.text


def test_a_watched_folder_takes_what_comes_and_a_label_may_come_later(
    broker: InProcessBroker, trainer: FakeTrainer, vit: TorchVisionBackbone, tmp_path: Path
) -> None:
    publish(trainer)
    folder = write_images(tmp_path / "images", LABELS, 2)
    data = {"path": str(folder), "format": "images", "watch": True}
    with Running(broker, vit, tmp_path, data=data):
        trainer.wait(lambda t: t.rows() == 4)
        write_images(folder, LABELS, 2, start=2)
        trainer.wait(lambda t: t.rows() == 8)
        (folder / "new.png").write_bytes(file_of(pixels(5)))
        trainer.wait(lambda t: t.telemetry["pi-1"].samples_unlabelled == 1)
        state = tmp_path / "state-pi-1"
        (one,) = listed(state)
        assert main(["agent", "label", one.id, "on", "--state-dir", str(state)]) == 0
        trainer.wait(lambda t: t.rows() == 9)


def test_a_source_of_texts_in_a_job_of_images_ends_the_agent_with_what_to_set(
    broker: InProcessBroker, trainer: FakeTrainer, vit: TorchVisionBackbone, tmp_path: Path
) -> None:
    publish(trainer)
    (tmp_path / "rows.csv").write_text("text,label\na,on\n")
    said = pytest.raises(DataError, match=r"whose samples are images; set data\.format to images")
    with Running(broker, vit, tmp_path, data={"path": str(tmp_path / "rows.csv")}) as agent, said:
        agent.join()


def test_image_files_are_answered_and_paths_are_opened_for_nobody_else(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    vit: TorchVisionBackbone,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    publish(trainer)
    folder = write_images(tmp_path / "images", LABELS, 4)
    data = {"path": str(folder)}
    with Running(broker, vit, tmp_path, data=data, exit_when_done=True) as agent:
        trainer.wait(lambda t: t.rows() == 8)
        final(trainer)
        assert agent.join() == 0
    state, photo = tmp_path / "state-pi-1", folder / "on" / "0000.png"
    (tmp_path / "bad.jpg").write_bytes(b"x")
    command = ["agent", "predict", "--state-dir", str(state), "--json", str(photo), str(tmp_path / "bad.jpg")]
    assert main(command) == 1
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert (answer["image"], answer["label"]) == (str(photo), "on") and answer["probability"] > 0.5
    assert said.err.count("\n") == 1 and "bad.jpg: is no image that can be read" in said.err
    predictor = load(state)
    assert predictor.predict([photo, photo.read_bytes()])[0] == predictor.predict([str(photo)])[0]
    with pytest.raises(DataError, match="image 1: is no image"):
        predictor.predict([b"x"])
    with pytest.raises(TypeError, match="list of image files"):
        predictor.predict(str(photo))
    with Predictions(state) as predictions:
        asked = {"images": [base64.b64encode(photo.read_bytes()).decode()]}
        code, body = answer_to(predictions, json.dumps(asked).encode())
        assert code == 200 and json.loads(body)["answers"][0]["label"] == "on"
        code, body = answer_to(predictions, json.dumps({"texts": [str(photo)]}).encode())
        assert code == 400 and b"ask with their bytes" in body
        code, body = answer_to(predictions, json.dumps({"images": ["%"]}).encode())
        assert code == 400 and b"base64" in body
        code, body = answer_to(predictions, json.dumps({"images": ["eA=="]}).encode())
        assert code == 400 and b"is no image" in body
