"""A small run of each benchmark, so that none rots. Nothing here looks at how long anything took."""
