"""A predictor that stays up: adopts new weights, batches questions, answers over HTTP and MQTT."""

__all__ = ["http", "mqtt", "predictions"]
