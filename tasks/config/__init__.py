"""Parameters: every section of params.yaml, and presets."""
