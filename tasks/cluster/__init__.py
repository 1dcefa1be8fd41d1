"""Ranks of a stage on this machine or on a Prefect work pool."""
