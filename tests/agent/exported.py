"""Exported backbones of tiny models; writing one takes seconds."""

from __future__ import annotations

from pathlib import Path

from sidestream.backbone.onnx_runtime.folder import ExportPrecision
from sidestream.backbone.torch_runtime.export import export


def exported(model: Path, folder: Path, precision: ExportPrecision = "f32", layers: int = 0) -> Path:
    """Export a saved model, unless that has been done."""
    if not folder.exists():
        export(str(model), folder, precision=precision, layers=layers, tell=lambda line: None)
    return folder
