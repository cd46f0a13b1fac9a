"""The device's half: embeddings and the first layers, with LoRA; states go up, a gradient comes down.

Legend: K texts, T tokens of the longest, N real tokens of all of them, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import peft
import torch
from torch import Tensor

from sidestream.backbone.sampled import Bools, Ints
from sidestream.backbone.text_input import Tokens
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.errors import DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tensors import Floats
from sidestream.split_model.adapters import (
    Adapters,
    Shell,
    check_precision,
    lora_config,
    not_cut,
    refusing,
    to_arrays,
)


class LowerHalf:
    """The first layers of a frozen model with LoRA. The backbone itself stays as it is, and may be shared.

    Args:
        backbone: Loaded with as many layers as the device has; in f32 or bf16.
        lora: Which adapters.

    Raises:
        BackboneError: it is kept in int8, or adapters cannot be had in it or not be trained.
    """

    def __init__(self, backbone: TorchBackbone, lora: LoraSpec) -> None:
        check_precision(backbone)
        self._view = backbone.twin()
        config = lora_config(backbone, lora, every=False)
        self._adapters = Adapters(
            self._view,
            lambda: peft.inject_adapter_in_model(config, Shell(self._view.model), low_cpu_mem_usage=True),
            seed=0,
        )
        self.cut = backbone.depth
        """Layers in it."""
        self.width = backbone.width
        """d."""
        self.names = tuple(self._adapters.parameters)
        """Of the adapters' tensors, layer by layer."""
        with refusing(backbone):
            self._try()

    def load(self, arrays: Mapping[str, Floats]) -> None:
        """Take other adapters. Passes that wait for their gradient keep those that they were made with.

        Raises:
            DecodeError: names or shapes are not exactly these, or a value is not finite.
        """
        self._adapters.replace(arrays)

    def arrays(self) -> dict[str, Floats]:
        """The adapters by name: A [r, d_in] and B [d_out, r] of each map."""
        return to_arrays(self._adapters.parameters)

    def forward(self, tokens: Tokens) -> LowerPass:
        """Run texts through the layers and keep what a gradient will need, until it is given or dropped."""
        more = {} if tokens.segments is None else {"token_type_ids": torch.from_numpy(tokens.segments)}
        ids, mask = torch.from_numpy(tokens.ids), torch.from_numpy(tokens.mask)
        read: list[Tensor] = []
        with torch.enable_grad():
            self._view.read(ids, mask, [self.cut], read.append, **more)
            return LowerPass(read[0][mask].float(), tokens.mask, self._adapters.parameters)

    def _try(self) -> None:
        passed = self.forward(self._view.trial_tokens())
        if not passed.states.size or not np.isfinite(passed.states).all():
            raise not_cut(self._view, "it gives no finite states")
        passed.backward(np.ones_like(passed.states))


class LowerPass:
    """One forward pass that waits for its gradient.

    Args:
        states: [N, d], in its graph.
        mask: [K, T]: which tokens are real.
        parameters: The adapters that it was made with.
    """

    def __init__(self, states: Tensor, mask: Bools, parameters: Mapping[str, Tensor]) -> None:
        self.states: Floats = states.detach().numpy()
        """[N, d]: the real tokens' states, row by row; to be read only."""
        self.lengths: Ints = mask.sum(axis=1)
        """[K]: tokens of each row."""
        self._graph: Tensor | None = states
        self._parameters = parameters

    def backward(self, gradient: Floats, rows: Sequence[int] | None = None) -> dict[str, Floats]:
        """What a gradient at the cut means for the adapters; the graph is let go of, so this works once.

        Args:
            gradient: [N, d], or of the tokens of ``rows`` only, row by row in that order; that of the others
                is zero.
            rows: Which rows it is for, each once; all of them if not given.

        Returns:
            By name the gradient of each adapter tensor, neither scaled nor clipped.

        Raises:
            DecodeError: the gradient has another shape, or a value is not finite; the pass still waits.
        """
        assert self._graph is not None, "a pass goes back once"
        given = self._whole(gradient, rows)
        graph, self._graph = self._graph, None
        found = torch.autograd.grad(graph, list(self._parameters.values()), torch.from_numpy(given))
        return to_arrays(dict(zip(self._parameters, found, strict=True)))

    def _whole(self, gradient: Floats, rows: Sequence[int] | None) -> Floats:
        """[N, d] of what may be for some rows only."""
        chosen = np.arange(len(self.lengths)) if rows is None else np.asarray(rows, np.int64)
        ends = np.cumsum(self.lengths)
        places = np.concatenate([np.arange(ends[row] - self.lengths[row], ends[row]) for row in chosen])
        if gradient.shape != (len(places), self.states.shape[1]):
            wanted = (len(places), self.states.shape[1])
            raise DecodeError(f"the gradient at the cut has shape {gradient.shape}, not {wanted}")
        if not np.isfinite(gradient).all():
            raise DecodeError("the gradient at the cut holds NaN or infinite values")
        whole = np.zeros_like(self.states)
        whole[places] = gradient
        return whole
