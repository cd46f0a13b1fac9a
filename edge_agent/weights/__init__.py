"""The side-network as it comes down: whom to believe, adoption, evaluation on held-out samples."""

__all__ = [
    "adopted",
    "adoption",
    "choice",
    "codebooks",
    "evaluation",
    "token_evaluation",
    "trust",
    "weights_inbox",
]
