"""Fits product quantisation's codebooks to a backbone's layers, on texts that whoever runs it calls public.

NumPy beside the backbone's own runtime. A layer's vectors are turned so that all groups of eight values vary
alike (the parametric solution of OPQ, Ge et al. 2013: principal directions, dealt out to groups), and k-means
finds 256 centroids for each group (Lloyd). Half of what is fitted to are single tokens, the other half means
over parts of texts, for these are what pooling policies send.

Legend: N vectors, d width, M = d / 8 groups.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from sidestream.backbone.backbone import Backbone
from sidestream.backbone.codebook_file import FILE_NAME, About, CodebookFile, write
from sidestream.backbone.onnx_runtime.folder import digest
from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.sampled import Ints, starts_of
from sidestream.contract.codebooks import ENTRIES, GROUP, MAX_WIDTH, Codebook, Halves
from sidestream.contract.errors import BackboneError, ConfigError
from sidestream.contract.tensors import Floats

Tell = Callable[[str], None]
VECTORS: Final = 26_214
"""That a layer's codebook is fitted to and tried on: 96 for each centroid, and one in sixteen apart."""
LEAST: Final = 16 * ENTRIES
"""Vectors below which no codebook is fitted."""
_PARTS: Final = (1, 2, 4, 8, 12)
"""Segments whose means are fitted to."""
_APART: Final = 16
"""Each so many vectors one is not fitted to, and tells what is lost."""
_GRID: Final = 2.0**-9
"""Of a rotation's values; costs a hundredth of what one bit a value loses."""
_BATCH: Final = 32
_LARGEST: Final = 65504.0
_COMPARED: Final = 2048  # points at once: what they are compared by stays within the processor's cache
_ROUNDS: Final = 12
_TELL_EVERY: Final = 32  # batches
Generator = np.random.Generator


class Made(NamedTuple):
    """What came of it."""

    path: Path
    """The file."""
    errors: Mapping[int, Sequence[float]]
    """By layer and number of stages, the share of the variance of vectors not fitted to that codes lose."""


def make(
    model: str,
    texts: Sequence[Path],
    out: Path,
    *,
    layers: Sequence[int],
    stages: int,
    max_tokens: int,
    seed: int,
    tell: Tell,
) -> Made:
    """Fit codebooks to a backbone's layers and write their file.

    Args:
        model: As :func:`sidestream.backbone.runtimes.load_backbone` has it.
        texts: Files of public texts.
        out: The folder to write into.
        layers: Which, 1 = the first layer's output, ascending; none for all.
        stages: 1, or 2 to have what the first stage leaves over written too.
        max_tokens: Longer texts are cut.
        seed: Of which texts and vectors are drawn, and of k-means.
        tell: Is told what is being done.

    Raises:
        ConfigError: a layer or a file of texts is not there.
        BackboneError: the model cannot be loaded or does not suit, the texts are too few, or the file cannot
            be written.
    """
    read = [_lines(path) for path in texts]
    tell(f"loading {model}")
    backbone = load_backbone(model)
    if layers and layers[-1] > backbone.depth:
        raise ConfigError("--layers", f"there is no layer {layers[-1]}: {model} has {backbone.depth}")
    chosen = list(layers) or list(range(1, backbone.depth + 1))
    rng = np.random.default_rng(seed)
    found, errors = dict[int, Codebook](), dict[int, Sequence[float]]()
    lines = [line for one in read for line in one]
    for layer, vectors in vectors_of(backbone, chosen, lines, max_tokens, rng, tell):
        tell(f"layer {layer}: fitting")
        kept = np.arange(len(vectors)) % _APART != 0
        found[layer] = codebook(vectors[kept], stages, rng)
        errors[layer] = [_lost(found[layer], vectors[~kept], stage) for stage in range(1, stages + 1)]
    about = About(
        model=model,
        fingerprints=tuple(map(backbone.fingerprint_of_first, range(1, backbone.depth + 1))),
        texts={path.name: digest(path) for path in texts},
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise BackboneError(f"{out}: cannot be made: {exc.strerror or exc}") from exc
    write(out / FILE_NAME, CodebookFile(about=about, by_layer=found), public=True)
    return Made(out / FILE_NAME, errors)


def _lines(path: Path) -> list[str]:
    """Its texts: each line that is not blank, or of JSON lines each one's ``text``."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [str(_object(line)["text"]) for line in lines] if path.suffix == ".jsonl" else lines
    except OSError as exc:
        raise ConfigError("--text", f"{path} cannot be read: {exc.strerror or exc}") from exc
    except (ValueError, KeyError) as exc:
        text = f'{path} is no UTF-8 text, or (*.jsonl) a line of it has no "text"'
        raise ConfigError("--text", text) from exc


def _object(line: str) -> dict[str, Any]:
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _lost(book: Codebook, vectors: Floats, stages: int) -> float:
    back = book.decode(book.encode(vectors, stages))
    return float(np.square(vectors - back).sum() / np.square(vectors - vectors.mean(axis=0)).sum())


def vectors_of(
    backbone: Backbone,
    layers: Sequence[int],
    texts: Sequence[str],
    max_tokens: int,
    rng: Generator,
    tell: Tell,
) -> Iterator[tuple[int, Floats]]:
    """For each layer vectors [N, d] of its tokens and of means over parts of texts, as many of each.

    Raises:
        BackboneError: the width does not suit, or the texts are too few.
    """
    if backbone.width % GROUP or backbone.width > MAX_WIDTH:
        raise BackboneError(
            f"{backbone.name}: codebooks take a width that {GROUP} divides, up to {MAX_WIDTH}; "
            f"it is {backbone.width}"
        )
    tokens, means = list[Halves](), list[Halves]()
    order = rng.permutation(len(texts))
    for number, start in enumerate(range(0, len(order), _BATCH)):
        if number % _TELL_EVERY == 0:
            tell(f"{_count(tokens)} of {VECTORS // 2} tokens forwarded")
        sampled = backbone.forward([texts[row] for row in order[start : start + _BATCH]], layers, max_tokens)
        parts = [_means(sampled.vectors, sampled.lengths, count) for count in _PARTS]
        tokens.append(_halves(sampled.vectors))
        means.append(_halves(np.concatenate(parts, axis=1)))
        if min(_count(tokens), _count(means)) >= VECTORS // 2:
            break
    if (had := _count(tokens) + _count(means)) < LEAST:
        raise BackboneError(f"the texts give {had} vectors, and codebooks take {LEAST}: name more text")
    drawn = [rng.permutation(_count(one))[: VECTORS // 2] for one in (tokens, means)]
    for place, layer in enumerate(layers):
        kept = [
            np.concatenate([part[place] for part in one])[rows]
            for one, rows in zip((tokens, means), drawn, strict=True)
        ]
        yield layer, rng.permutation(np.concatenate(kept).astype(np.float32))


def _halves(vectors: Floats) -> Halves:
    """As float16, which is enough to fit to."""
    return np.clip(vectors, -_LARGEST, _LARGEST).astype(np.float16)


def _count(parts: Sequence[Halves]) -> int:
    return sum(part.shape[1] for part in parts)


def _means(vectors: Floats, lengths: Ints, count: int) -> Floats:
    """[B, V, d] of all tokens -> means over ``count`` equal parts of each row, as pooling policies do."""
    counts = np.minimum(lengths, count)
    of_row = np.arange(int(lengths.sum())) - np.repeat(starts_of(lengths), lengths)
    part = of_row * np.repeat(counts, lengths) // np.repeat(lengths, lengths)
    starts = np.flatnonzero((part != np.roll(part, 1)) | (of_row == 0))
    sizes = np.diff([*starts, len(of_row)])[:, None]
    means: Floats = (np.add.reduceat(vectors, starts, axis=1) / sizes).astype(np.float32)
    return means


def codebook(vectors: Floats, stages: int, rng: Generator) -> Codebook:
    """Fit to vectors [N, d]."""
    rotation = _rounded(_rotation(vectors), _GRID)
    left = vectors @ rotation.astype(np.float32)
    found: list[Halves] = []
    for _ in range(stages):
        groups = left.reshape(len(left), -1, GROUP).transpose(1, 0, 2).copy()  # [M, N, 8]
        centroids = np.stack([_k_means(group, rng) for group in groups])
        found.append(_rounded(centroids, _GRID * float(np.sqrt(np.square(centroids).mean())) * 16))
        for group, entries in zip(groups, found[-1].astype(np.float32), strict=True):
            group -= entries[_nearest(group, entries)]
        left = groups.transpose(1, 0, 2).reshape(left.shape)
    return Codebook(centroids=np.stack(found), rotation=rotation)


def _rounded(values: Floats, step: float) -> Halves:
    """To multiples of a power of two of about so much: what is handed out is then deflated to half."""
    step = 2.0 ** round(np.log2(step))
    rounded: Halves = (np.rint(values / step) * step).astype(np.float16)
    return rounded


def _rotation(vectors: Floats) -> Floats:
    """[d, d] orthogonal: principal directions, dealt out so that groups' variances have alike products."""
    variances, directions = np.linalg.eigh(np.cov(vectors.T.astype(np.float64)))
    logs = np.log(np.maximum(variances, variances.max(initial=0.0) * 1e-9 + 1e-30))
    groups: list[list[int]] = [[] for _ in range(vectors.shape[1] // GROUP)]
    sums = np.zeros(len(groups))
    for direction in np.argsort(-variances):
        open_ = [number for number, group in enumerate(groups) if len(group) < GROUP]
        # Groups fill up evenly, so that a sum of few logarithms is not taken for a small variance.
        least = min(open_, key=lambda number: (len(groups[number]), sums[number]))
        groups[least].append(int(direction))
        sums[least] += logs[direction]
    turned: Floats = directions[:, np.concatenate(groups)].astype(np.float32)
    return turned


def _k_means(points: Floats, rng: Generator) -> Floats:
    """[N, 8] -> 256 centroids [256, 8], by Lloyd's iterations from points drawn at random."""
    centroids = points[rng.choice(len(points), ENTRIES, replace=False)]
    for _ in range(_ROUNDS):
        nearest = _nearest(points, centroids)
        counts = np.bincount(nearest, minlength=ENTRIES)
        sums = np.stack(
            [np.bincount(nearest, weights=column, minlength=ENTRIES) for column in points.T], axis=1
        )
        centroids = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        empty = np.flatnonzero(counts == 0)  # such begin anew somewhere
        centroids[empty] = points[rng.choice(len(points), len(empty), replace=False)]
    return centroids


def _nearest(points: Floats, centroids: Floats) -> npt.NDArray[np.intp]:
    """[N]: the nearest centroid of each point."""
    halves = np.square(centroids).sum(axis=1) / 2
    parts = (points[start : start + _COMPARED] for start in range(0, len(points), _COMPARED))
    return np.concatenate([(part @ centroids.T - halves).argmax(axis=1) for part in parts])
