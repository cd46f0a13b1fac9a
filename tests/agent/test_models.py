"""Every text model that transformers can build tiny works exactly, or is refused in one line: nothing else.

Which one does which is what docs/models.md says; the table there is made by ``python -m benchmarks.models``.
The states are compared here by other code than the agent's own trial.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from benchmarks.models import CUT, judge, main, rows_of
from benchmarks.zoo import LAYERS, POSITIONS, WORDS, build, text_models, tokenizer
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.inputs import Text
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.errors import BackboneError
from sidestream.contract.sampling import EVERY_TOKEN
from tests.vectors import row_vectors

pytestmark = pytest.mark.slow  # together, they take longer than all others within one process

PAGE: Final = Path(__file__).parents[2] / "docs" / "models.md"
TABLE: Final = rows_of(PAGE)
Loaded = TypeVar("Loaded", bound=Backbone)
TEXTS: Final = [" ".join(WORDS[:3]), " ".join(WORDS[2:16]), " ".join(WORDS[:-6:-1])]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Transformers has its say about small numbers."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    transformers_logging.set_verbosity(verbosity)


def listed(column: int, verdict: str) -> list[str]:
    return [kind for kind, cells in TABLE.items() if cells[column] == verdict]


def model_of(kind: str, *, head: bool = False) -> Any:
    model = build(kind, head=head)
    assert model is not None
    return model


def taken(kind: str, column: int, load: Callable[[], Loaded]) -> Loaded | None:
    """What loads as the table says; None if it is refused, in one line that says what to do."""
    if TABLE[kind][column] == "works":
        return load()
    with pytest.raises(BackboneError, match=r"^.+: .*use ") as refused:
        load()
    assert "\n" not in str(refused.value)
    return None


def saved_and_loaded(model: Any, folder: Path) -> Backbone:
    """As an agent comes by it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return load_backbone(str(folder))


def states_of(model: Any, backbone: Backbone, texts: list[str]) -> tuple[tuple[Tensor, ...], Tensor]:
    """What the model itself says its layers give, and which tokens are real."""
    encoded = backbone.text_input.tokenizer(texts)["input_ids"]
    longest = max(map(len, encoded))
    model.config.use_cache = False
    ids = torch.tensor([row + [1] * (longest - len(row)) for row in encoded])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
    with torch.no_grad():
        said = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return said.hidden_states, mask.bool()


def assert_equal(found: Tensor, wanted: Tensor) -> None:
    scale = float(wanted.square().mean().sqrt())
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3 * scale)


def ends_with_a_norm(model: Any, last: Tensor, said: Tensor) -> bool:
    """Whether some module makes what the model reports last of what its last layer gave."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) or module is model or "Norm" not in type(module).__name__:
            continue
        try:
            with torch.no_grad():
                made = module(last)
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            continue
        if made.shape == said.shape and torch.allclose(made, said, rtol=1e-3, atol=1e-4):
            return True
    return False


def assert_taps_are_states(backbone: Backbone, model: Any) -> None:
    sampled = backbone.forward(TEXTS, range(1, LAYERS + 1), POSITIONS)
    said, real = states_of(model, backbone, TEXTS)
    assert sampled.lengths.tolist() == real.sum(dim=1).tolist()
    found = torch.from_numpy(sampled.vectors)
    for tap in range(1, LAYERS):
        assert_equal(found[tap - 1], said[tap][real])
        assert not torch.allclose(said[tap][real], said[tap - 1][real], rtol=1e-3, atol=1e-6)
    last = found[-1]
    is_same = torch.allclose(last, said[-1][real], rtol=1e-3, atol=1e-4)
    assert is_same or ends_with_a_norm(model, last[None], said[-1][real][None])


def assert_neighbours_do_not_matter(backbone: Backbone) -> None:
    taps = range(1, LAYERS + 1)
    together = backbone.forward(TEXTS, taps, POSITIONS)
    for row, text in zip(row_vectors(together), TEXTS, strict=True):
        (alone,) = row_vectors(backbone.forward([text], taps, POSITIONS))
        assert_equal(row, alone)


@pytest.mark.parametrize("kind", TABLE)
def test_a_model_gives_exactly_the_states_that_it_reports_or_is_refused(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    first = copy.deepcopy(model)
    backbone = taken(kind, 2, lambda: saved_and_loaded(model, tmp_path))
    part = taken(kind, 3, lambda: TorchBackbone(first, tokenizer(), layers=CUT, name=kind))
    if backbone is not None:
        assert backbone.depth == LAYERS
        assert_taps_are_states(backbone, model)
        assert_neighbours_do_not_matter(backbone)
        odd: list[Text] = [f"{WORDS[0]} " * 500, "", (TEXTS[0], TEXTS[2])]
        assert np.isfinite(backbone.forward(odd, [LAYERS], 4096).vectors).all()
    if part is not None:
        assert part.depth == CUT
        said, real = states_of(model, part, TEXTS)
        found = torch.from_numpy(part.forward(TEXTS, range(1, CUT + 1), POSITIONS).vectors)
        for tap in range(1, CUT + 1):
            assert_equal(found[tap - 1], said[tap][real])


@pytest.mark.parametrize("kind", [kind for kind, cells in TABLE.items() if cells[4] != "none"])
def test_a_language_model_predicts_as_the_model_does_or_is_refused(kind: str) -> None:
    model = model_of(kind, head=True)
    ids = torch.tensor([[*range(4, 13)]])
    whole = taken(kind, 4, lambda: TorchLanguageModel(model, tokenizer(), name=kind))
    if whole is None:
        return
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
    decoding = whole.decoding([whole.depth])
    windows = whole.windows(TEXTS[1], None, POSITIONS)
    sampled = whole.forward_windows(windows, [whole.depth], lambda lengths: EVERY_TOKEN)
    assert np.isfinite(sampled.vectors).all()
    for place, token in enumerate(ids[0].tolist()):
        logits = torch.from_numpy(whole.logits(decoding.feed([token])[0]))
        torch.testing.assert_close(logits[0], wanted[0, place], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(set(text_models()) - set(TABLE)))
def test_what_the_table_lacks_cannot_be_built_tiny(kind: str) -> None:
    assert build(kind) is None


def test_the_table_has_seventy_models_and_more() -> None:
    assert len(TABLE) >= 70 and len(listed(2, "works")) >= 70
    assert {cell for cells in TABLE.values() for cell in cells[2:5]} == {"works", "refused", "none"}


def test_the_program_prints_the_rows_that_the_page_has(capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["bert", "xlm", "t5", "llama"]
    assert main(kinds) == 0
    printed = capsys.readouterr().out
    for kind in kinds:
        verdict = judge(kind)
        assert verdict is not None and verdict.row() in printed
        assert verdict.row() in PAGE.read_text()
