"""Command line: ``python -m tasks.preset`` lists presets and writes the named ones into params.yaml."""

from tasks.config.presets import main
from tasks.stages.command import run

if __name__ == "__main__":
    run(main)
