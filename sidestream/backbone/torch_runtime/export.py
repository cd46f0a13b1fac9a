"""Writes a backbone for devices without torch: a graph that gives every layer's states, and its tokenizer.

The graph is what torch.export sees of the model, hooks on its layers included, so what is tapped is what the
torch runtime taps. Nothing of it is believed: the written folder is loaded as a device loads it, and its
states are held against torch's.

Legend: K texts, T tokens of the longest, V vectors of all texts, d hidden size.
"""

from __future__ import annotations

import importlib.metadata
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.inputs import ImageFile, Input, Text, digest_of
from sidestream.backbone.onnx_runtime import folder
from sidestream.backbone.onnx_runtime.backbone import OnnxBackbone
from sidestream.backbone.onnx_runtime.folder import ExportedBackbone, ExportPrecision, TokenizerFacts
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.backbone.torch_runtime.layer_stack import Stack, segments_of
from sidestream.backbone.torch_runtime.vision import TorchVisionBackbone, pictures
from sidestream.backbone.vocabulary import some_ids
from sidestream.contract.errors import BackboneError
from sidestream.contract.tensors import Floats

Tell = Callable[[str], None]
_ALIKE: Final = 0.9999
"""Cosine of states, at least, in f32."""
_TRIED: Final = 60
"""Tokens from all over the vocabulary that the states are compared on."""
_ALL: Final = 10**6
"""Tokens: more than any model takes."""
_SMALL: Final = 1024
"""Bytes of a tensor that stays in the graphs."""
_PACKAGES: Final = ("sidestream", "torch", "transformers", "tokenizers", "onnx", "onnxruntime")


def export(
    reference: str,
    out: Path,
    *,
    layers: int = 0,
    precision: ExportPrecision = "f32",
    images: bool = False,
    tell: Tell,
) -> list[Floats]:
    """Write ``out``, and compare what it gives with what torch gives.

    Args:
        reference: As :func:`sidestream.backbone.runtimes.load_backbone` has it.
        out: A folder that is made; there must be none yet.
        layers: The first so many; 0 for all.
        precision: Of the graph's weights.
        images: It takes images, and not texts.
        tell: Is told what is being done.

    Returns:
        For each layer the cosines [V] between the folder's states and torch's in f32.

    Raises:
        BackboneError: the model cannot be loaded or exported, or gives other states once it is.
    """
    if out.exists():
        raise BackboneError(f"{out}: is there already; name a folder that is not")
    tell(f"loading {reference}")
    part_of = _VisionExport if images else _TextExport
    model = part_of(reference, layers)
    backbone = model.backbone
    wanted = _states(backbone, model.tried)
    with _whole_or_not_at_all(out) as part:
        tell("writing the graph")
        whole = part / "whole.onnx"
        _write_graph(model, whole)
        if precision == "int8":
            tell("quantising its weights")
            _quantise(whole)
        _cut(whole, backbone.depth)
        model.write_preprocessor(part)
        tell("taking a fingerprint for each number of layers")
        folder.write(part, _about(model, reference, precision, part))
        tell("comparing what it gives with what torch gives")
        found = OnnxBackbone(part)
        ours, theirs = (one.preprocessor.read(model.tried, _ALL)[0] for one in (found, backbone))
        if not np.array_equal(ours, theirs):
            raise BackboneError(f"{reference}: its preprocessor gives other numbers once it is exported")
        cosines = [_cosines(*pair) for pair in zip(_states(found, model.tried), wanted, strict=True)]
        _check(reference, cosines, _ALIKE if precision == "f32" else 0.0)
    return cosines


def _check(reference: str, cosines: Sequence[Floats], least: float) -> None:
    for layer, found in enumerate(cosines, 1):
        if not found.min() >= least:  # NaN neither
            raise BackboneError(
                f"{reference}: layer {layer} gives other states once it is exported "
                f"(cosine {found.min():.4f}); such a model takes torch"
            )


class _TextExport:
    """What is a text model's own in an export."""

    def __init__(self, reference: str, layers: int) -> None:
        self.backbone = TorchBackbone.load(reference, layers)
        self._tokenizer = self.backbone.text_input.tokenizer
        if not self._tokenizer.is_fast:
            raise BackboneError(
                f"{reference}: its tokenizer has no tokenizer.json; only fast ones are exported"
            )
        self.tried: list[Input] = list(_texts(self._tokenizer, self.backbone))
        ids, mask, _ = self.backbone.text_input.padded([[0] * 7, [0] * 5, [0] * 4])
        self.given = [torch.from_numpy(ids), torch.from_numpy(mask).long()]
        if segments_of(self.backbone.model):
            self.given.append(torch.zeros_like(self.given[0]))
        self.names = folder.INPUTS[: len(self.given)]
        self.dynamic = (0, 1)

    def layers(self) -> _Layers:
        return _Layers(self.backbone.model, self.backbone.stack)

    def write_preprocessor(self, part: Path) -> None:
        self._tokenizer.backend_tokenizer.save(str(part / folder.TOKENIZER))

    def facts(self) -> dict[str, Any]:
        tokenizer, text_input = self._tokenizer, self.backbone.text_input
        return {
            "longest": text_input.longest,
            "rows": text_input.rows,
            "segments": segments_of(self.backbone.model),
            "tokenizer": TokenizerFacts(
                pad=tokenizer.pad_token_id,
                unknown=tokenizer.unk_token_id,
                special=tuple(sorted(set(tokenizer.all_special_ids))),
                cut=tokenizer.truncation_side,
            ),
        }


class _VisionExport:
    """The same of a vision transformer."""

    def __init__(self, reference: str, layers: int) -> None:
        self.backbone = TorchVisionBackbone.load(reference, layers)
        self.tried: list[Input] = [ImageFile("a picture", digest_of(data), data) for data in _image_files()]
        scaling = self.backbone.image_input.scaling
        self.given = [torch.rand(3, 3, *scaling.size)]
        self.names: tuple[str, ...] = (folder.PIXELS,)
        self.dynamic = (0,)

    def layers(self) -> _Layers:
        return _ImageLayers(self.backbone.model, self.backbone.stack)

    def write_preprocessor(self, part: Path) -> None:
        """Its description holds all of it."""

    def facts(self) -> dict[str, Any]:
        image_input = self.backbone.image_input
        return {
            "longest": image_input.tokens,
            "rows": 0,
            "segments": 0,
            "scaling": image_input.scaling,
        }


def _image_files() -> list[bytes]:
    """What is in some image files."""
    found = []
    for picture in pictures():
        file = io.BytesIO()
        picture.save(file, "PNG")
        found.append(file.getvalue())
    return found


class _Layers(nn.Module):
    """A model whose outputs are its layers' states."""

    def __init__(self, model: nn.Module, stack: Stack) -> None:
        super().__init__()
        self.model = model
        self._stack = stack
        self._states: list[Tensor] = []
        self._tokens: int | None = None

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Any:
        more = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        given = {"input_ids": input_ids, "attention_mask": attention_mask, **more}
        return self._all(given, tokens=input_ids.shape[1])

    def _all(self, given: dict[str, Tensor], tokens: int | None = None) -> Any:
        self._states.clear()
        self._tokens = tokens
        self.model(**given)
        states = tuple(self._states)
        self._states.clear()
        return states

    @contextmanager
    def tapped(self) -> Iterator[None]:
        hooks = [layer.register_forward_hook(self._keep) for layer in self._stack.layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, module: Any, given: Any, output: Any) -> None:
        self._states.append(self._stack.states(output, self._tokens))


class _ImageLayers(_Layers):
    """The same of one that takes images."""

    def forward(self, pixel_values: Tensor) -> Any:  # type: ignore[override]
        return self._all({"pixel_values": pixel_values})


def _write_graph(model: _TextExport | _VisionExport, path: Path) -> None:
    layers, backbone, names = model.layers().eval(), model.backbone, model.names
    axes = dict.fromkeys(model.dynamic, torch.export.Dim.DYNAMIC)
    try:
        with layers.tapped(), torch.inference_mode(), _quiet():
            torch.onnx.export(
                layers,
                tuple(model.given),
                str(path),
                input_names=names,
                output_names=[folder.output_of(layer) for layer in range(1, backbone.depth + 1)],
                dynamic_shapes=dict.fromkeys(names, axes),
                dynamo=True,
                external_data=False,
                verbose=False,
            )
    except ModuleNotFoundError as exc:
        raise BackboneError(f"exporting takes {exc.name}: pip install 'sidestream[export]'") from exc
    except Exception as exc:  # torch raises whatever its parts raise
        first = next(iter(str(exc).strip().splitlines()), type(exc).__name__)[:200]
        raise BackboneError(
            f"{backbone.name}: cannot be exported: {first}; such a model takes torch"
        ) from exc


def _quantise(path: Path) -> None:
    """Weights to int8 with a scale for each output, in place; what meets them is quantised in each pass."""
    from onnxruntime.quantization import QuantType, quantize_dynamic  # imports onnx, which only exports need

    f32 = path.with_suffix(".f32.onnx")
    path.rename(f32)
    with _quiet():
        # Seven bits: with eight, sums overflow on processors of PCs without VNNI.
        quantize_dynamic(
            f32,
            path,
            op_types_to_quantize=[
                "MatMul",
                "Gemm",
                "Gather",
            ],  # its kernel of a quantised convolution is missing
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
        )
    f32.unlink()


def _cut(whole: Path, depth: int) -> None:
    """A graph into one for each number of layers, and the file of weights that all of them read."""
    import onnx  # as above
    from onnx.utils import Extractor

    onnx.save_model(
        onnx.load(whole), whole, save_as_external_data=True, location=folder.WEIGHTS, size_threshold=_SMALL
    )
    model = onnx.load(whole, load_external_data=False)
    for node in model.graph.node:
        node.ClearField("metadata_props")  # which lines of whose files it comes from
        node.ClearField("doc_string")
    inputs = [one.name for one in model.graph.input]
    for layers in range(1, depth + 1):
        outputs = [folder.output_of(layer) for layer in range(1, layers + 1)]
        onnx.save_model(
            Extractor(model).extract_model(inputs, outputs), whole.with_name(folder.graph_of(layers))
        )
    whole.unlink()
    whole.with_name(folder.WEIGHTS).chmod(0o644)


def _about(
    model: _TextExport | _VisionExport, reference: str, precision: ExportPrecision, part: Path
) -> ExportedBackbone:
    backbone = model.backbone
    return ExportedBackbone(
        model=reference,
        precision=precision,
        width=backbone.width,
        is_decoder=backbone.is_decoder,
        **model.facts(),
        digests={path.name: folder.digest(path) for path in sorted(part.iterdir())},
        versions={name: importlib.metadata.version(name) for name in _PACKAGES},
        fingerprints=tuple(map(backbone.fingerprint_of_first, range(1, backbone.depth + 1))),
    )


def _texts(tokenizer: Any, backbone: Backbone) -> list[Text]:
    """Short, long and empty ones of words from all over the vocabulary, and a pair."""
    some = some_ids(tokenizer, _TRIED)
    words = tokenizer.decode(some).split()
    half = len(words) // 2
    return [
        *(" ".join(words[start : start + 8]) for start in range(0, len(words), 8)),
        " ".join(words * 3),
        "",
        (" ".join(words[:half]), " ".join(words[half:])),
    ]


def _states(backbone: Backbone, inputs: Sequence[Input]) -> Floats:
    """[L, V, d]: in one padded batch."""
    return backbone.forward(inputs, range(1, backbone.depth + 1), _ALL).vectors


def _cosines(found: Floats, wanted: Floats) -> Floats:
    """[V, d] and [V, d] -> [V]."""
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
    cosines: Floats = (found * wanted).sum(axis=1) / np.maximum(norms, 1e-12)
    return cosines


@contextmanager
def _whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it once everything is in it."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            yield part
            part.chmod(0o755)
            part.rename(out)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as exc:
        raise BackboneError(f"{out}: cannot be written: {exc.strerror or exc}") from exc


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch and onnxruntime say of their own insides out of ours."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
