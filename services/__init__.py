"""Servers and workers of one machine."""
