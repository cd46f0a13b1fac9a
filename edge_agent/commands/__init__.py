"""``sidestream agent``: run it, set it up, label, predict, generate."""
