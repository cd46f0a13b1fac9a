"""A broker within the process, with faults to order, for tests."""
