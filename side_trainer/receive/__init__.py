"""What the trainer hears: the bounded inbox, checks, rates, topics that are shut out."""
