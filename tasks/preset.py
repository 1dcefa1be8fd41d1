"""Command line: ``python -m tasks.preset`` lists presets and writes the named ones into params.yaml."""

from tasks.command import run
from tasks.config.presets import main

if __name__ == "__main__":
    run(main)
