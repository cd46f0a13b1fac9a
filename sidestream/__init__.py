"""Sidestream's top floor: the command line and the one-machine demo fleet."""
