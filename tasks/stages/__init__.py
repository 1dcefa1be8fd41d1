"""The stages of dvc.yaml, one module each, and the files that pass between them."""
