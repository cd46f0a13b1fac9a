"""The side-network as it comes down: whom to believe, adoption, evaluation on held-out samples."""
