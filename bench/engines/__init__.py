"""Exports proven in the engines that serve them: `make engines`. The scripts `in_*.py` run in an engine's Python."""
