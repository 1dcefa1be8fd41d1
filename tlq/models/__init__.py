"""Models: families and decoders as rows, streaming from safetensors, loading, processors."""
