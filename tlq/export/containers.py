"""What each container can hold, and the families that its engine loads from it.

``gguf`` is the container of llama.cpp, ``mlx`` that of MLX on Apple devices, ``int8`` a layout of compressed-tensors
for Arm. A number format that a container cannot hold exactly is refused.
"""

from __future__ import annotations

from tlq.quantization.formats import Scheme

#: Names of the containers that ``tlq convert`` writes, and what they are for.
CONTAINERS = {"gguf": "llama.cpp", "mlx": "MLX on Apple devices", "int8": "w4a8 in vLLM on Arm CPUs"}

#: Weights of a block of GGUF.
BLOCK = 32
#: Weights of a group of MLX, the largest first, and bits of its codes.
MLX_GROUPS = (128, 64, 32)
MLX_BITS = (2, 3, 4, 8)

#: Families with a vision tower in llama.cpp, by the ``model_type`` of config.json.
GGUF_FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
#: Families without one that people will ask for -> the reason.
NO_GGUF = {
    "llava_onevision": "llama.cpp has no projector that puts its image tiles together "
    "(https://github.com/ggml-org/llama.cpp/issues/8944)",
}
#: Families whose conversion mlx-vlm 0.7 loads, with the logits of transformers.
MLX_FAMILIES: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "smolvlm")

#: Digits of a scale of an asymmetric block: times a zero-point of 4 digits they fit the 11 of a float16.
_OFFSET_DIGITS = 7


def gguf_block(scheme: Scheme) -> str:
    """The type of block that holds the weights of a scheme: ``Q4_0``, ``Q4_1`` or ``Q8_0``.

    Raises:
        ValueError: none holds them exactly; the message names the nearest scheme that one holds.
    """
    names = {(4, True): "Q4_0", (4, False): "Q4_1", (8, True): "Q8_0"}
    name = names.get((scheme.weight_bits, scheme.symmetric))
    if name is None:
        nearest = "q8_0" if scheme.weight_bits > 4 else "q4_0" if scheme.symmetric else "q4_1"
        kind = "symmetric" if scheme.symmetric else "asymmetric"
        raise ValueError(
            f"GGUF has no block that holds the codes of {scheme.name} ({scheme.weight_bits} bits, {kind}) exactly; the "
            f"nearest scheme is {nearest}"
        )
    if scheme.group_size is not None and scheme.group_size % BLOCK:
        raise ValueError(
            f"{scheme.name} has groups of {scheme.group_size}, but a block of GGUF has {BLOCK} weights; quantize "
            f"with a group size that is a multiple of {BLOCK}"
        )
    if name == "Q4_1" and (scheme.scale_digits is None or scheme.scale_digits > _OFFSET_DIGITS):
        raise ValueError(
            f"GGUF stores a scale times a zero-point as a float16, which does not hold that of {scheme.name} exactly; "
            "the nearest scheme is q4_1"
        )
    return name


def mlx_group(scheme: Scheme, in_features: int) -> int:
    """The largest group of MLX that divides the groups of a scheme.

    Raises:
        ValueError: MLX has no such number of bits, or no such group.
    """
    if scheme.weight_bits not in MLX_BITS:
        raise ValueError(f"{scheme.name}: MLX has no codes of {scheme.weight_bits} bits; choose one of {MLX_BITS}")
    own = scheme.group_size or in_features
    size = next((size for size in MLX_GROUPS if own % size == 0), None)
    if size is None:
        raise ValueError(
            f"{scheme.name} has groups of {own}, but those of MLX have {', '.join(map(str, sorted(MLX_GROUPS)))} "
            "weights; quantize with a group size that is a multiple of 32"
        )
    return size
