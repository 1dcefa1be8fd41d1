"""Export: one module per checkpoint format."""
