"""Programs that measure Sidestream beside what it competes with; each prints a table and can write JSON."""
