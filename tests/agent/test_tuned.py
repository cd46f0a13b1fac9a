"""An exported language model is one of transformers', and answers as the device does."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

import edge_agent
from edge_agent.answers.generator import GenerationOptions, Generator
from side_trainer.fold.checkpoint import write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.operator.audit import export
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.windows import Window
from sidestream.contract.errors import BackboneError, StateError
from sidestream.contract.messages import Status
from sidestream.contract.sampling import EVERY_TOKEN
from sidestream.side_network.bundle import decode_bundle
from sidestream.side_network.exported import INDEX, WEIGHTS, Exported
from sidestream.side_network.inference import InferenceNetwork
from tests.agent.tiny import LAYERS
from tests.agent.tiny_lm import save_tiny_lm
from tests.trainer.conftest import append, fold_all
from tests.trainer.test_language_model import LmDevice, lm_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trainer's state directory: a full and a truncated tier, both taught."""
    folder = tmp_path_factory.mktemp("trained")
    journal = Journal(folder / FILE_NAME)
    job = Job(lm_config(folder), journal)
    for number, (tier, layers) in enumerate((("full", 0), ("half", 2))):
        model = TorchLanguageModel.load(str(folder / "model"), layers)
        device = LmDevice(tier, tier, str(number) * 32, seed=number)
        status = Status(
            state="online",
            birth=1,
            stream=device.stream,
            fingerprint=model.fingerprint,
            depth=model.depth,
            width=model.width,
        )
        assert job.on_birth(tier, tier, status, 0.0)
        for _ in range(10):
            append(journal, device, device.batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    write_checkpoint(folder, fold, journal.run)
    journal.close()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("tier", "layers"), [("", LAYERS), ("half", 2)])
def test_two_lines_give_a_model_that_generates_and_predicts_as_the_device(
    trained: Path, tmp_path: Path, tier: str, layers: int
) -> None:
    export(trained, tmp_path / "out", "hf", tier)
    exported = msgspec.json.decode((tmp_path / "out" / INDEX).read_bytes(), type=Exported)
    model, tokenizer = edge_agent.load_tuned(tmp_path / "out")
    prompt = "turn the kitchen light"
    frozen = TorchLanguageModel.load(str(trained / "model"), layers)
    bundle = decode_bundle((tmp_path / "out" / WEIGHTS).read_bytes())
    plan = exported.tier_plan
    assert plan.layers == layers and type(model).__name__ == "LlamaForCausalLM"
    own = Generator(frozen, InferenceNetwork(bundle), plan.align, plan.taps)
    expected = list(own.tokens(frozen.tokens(prompt), GenerationOptions(max_tokens=12)))
    given = tokenizer(prompt, return_tensors="pt")
    for _ in range(2):  # nothing is left over from the pass before
        out = model.generate(**given, max_new_tokens=12, do_sample=False, pad_token_id=1)[0]
        assert [one for one in out[given.input_ids.shape[1] :].tolist() if one != 2] == expected
    with torch.no_grad():
        ids = torch.tensor([[0, 5, 9, 12], [3, 4, 8, 7]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    windows = [Window(row, row) for row in ids.tolist()]
    taps = frozen.forward_windows(windows, plan.taps, lambda lengths: EVERY_TOKEN).vectors
    tuned = torch.from_numpy(frozen.logits(InferenceNetwork(bundle).refine(plan.align, taps)))
    torch.testing.assert_close(logits.flatten(end_dim=1), tuned, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(tuned, torch.from_numpy(frozen.logits(taps[-1])), atol=1e-2)


@pytest.mark.slow
def test_another_backbone_a_damaged_or_no_export_is_told(trained: Path, tmp_path: Path) -> None:
    export(trained, tmp_path / "out", "hf")
    save_tiny_lm(tmp_path / "other", "llama", seed=9)
    with pytest.raises(BackboneError, match="are not the job's"):
        edge_agent.load_tuned(tmp_path / "out", backbone=str(tmp_path / "other"))
    data = (tmp_path / "out" / WEIGHTS).read_bytes()
    (tmp_path / "out" / WEIGHTS).write_bytes(data[:-1] + b"\x00")
    with pytest.raises(StateError, match="damaged"):
        edge_agent.load_tuned(tmp_path / "out")
    (tmp_path / "out" / INDEX).write_text("{}")
    with pytest.raises(StateError, match="no export that can be read"):
        edge_agent.load_tuned(tmp_path / "out")
    with pytest.raises(StateError, match="no settled tier of the job; there are: full, half"):
        export(trained, tmp_path / "out", "hf", "third")
