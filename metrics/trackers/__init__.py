"""Where people look at curves: TensorBoard, MLflow and others, behind one small interface."""

__all__ = ["tracking"]
