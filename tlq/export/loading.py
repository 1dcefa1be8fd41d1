"""Load a checkpoint, quantized or not, as a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel

from tlq.export.streamed import PackedModel
from tlq.models.architectures import architecture_of
from tlq.models.checkpoint import checkpoint_dtype_of, local_folder, read_config
from tlq.models.experts import separate_experts
from tlq.models.skeleton import empty_model
from tlq.models.stored import refuse_foreign_quantization, refuse_non_finite, refuse_quantized, stored_tensors


def load_model(
    checkpoint: str | Path,
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode on ``device``, as its user loads it.

    A quantized checkpoint is decompressed here, and the module wrappers of compressed-tensors are removed. Otherwise
    compressed-tensors 0.20 decompresses during the first forward pass, and its wrappers turn a model output that is
    passed to a module into a plain dict, which breaks ``generate`` of LLaVA-NeXT, LLaVA-OneVision and Granite 4 Vision.
    Every expert has linears of its own. Checkpoints that transformers cannot load are read here: those of quantized
    experts, and those with several quantized linears in one tensor.

    Raises: as ``read_config``; ValueError if its weights are quantized in another form, missing or misshapen.
    """
    config = read_config(checkpoint)
    refuse_foreign_quantization(config, checkpoint)
    is_quantized = getattr(config, "quantization_config", None) is not None
    if Path(checkpoint).is_dir():
        stored = stored_tensors(Path(checkpoint))  # names a damaged file, which transformers does not
        if not is_quantized:
            refuse_quantized(stored)
    if is_quantized and not architecture_of(config).loads_in_transformers:
        return _load_packed(checkpoint, config, dtype, torch.device(device))
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(
            checkpoint,
            config=config,
            dtype=dtype,
            device_map=str(device),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, by name
        )
    except (ArithmeticError, AssertionError, LookupError, TypeError, RuntimeError):
        empty_model(config, checkpoint, torch.float32)  # says what is wrong if the config is
        raise
    model, loading = loaded
    _check_complete(checkpoint, model, loading)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not quantizer.quantization_config.dequantize:
        from compressed_tensors.offload.dispatch import remove_dispatch  # seconds, which stages without a model save

        weight_only = _weight_only_linears(model)
        quantizer.compressor.decompress_model(model)
        remove_dispatch(model, onload_tensors=True)
        stored_dtype = checkpoint_dtype_of(config, local_folder(checkpoint))
        for path in weight_only:  # engines multiply in this dtype, for which the codes were calibrated
            weight = model.get_parameter(f"{path}.weight")
            weight.data = weight.data.to(stored_dtype).to(weight.dtype)
    separate_experts(model)
    evaluated: PreTrainedModel = model.eval()
    return evaluated


def _weight_only_linears(model: PreTrainedModel) -> list[str]:
    """Module paths of the compressed linears whose activations stay in full precision."""
    schemes = {path: getattr(module, "quantization_scheme", None) for path, module in model.named_modules()}
    return [path for path, scheme in schemes.items() if scheme is not None and scheme.input_activations is None]


def _load_packed(
    checkpoint: str | Path, config: Any, dtype: torch.dtype | str, device: torch.device
) -> PreTrainedModel:
    """A quantized model that transformers cannot load: weights as codes represent them, hooks quantize activations."""
    streamed = PackedModel(checkpoint, dtype, device)
    model = streamed.skeleton
    model.load_state_dict(streamed.read(streamed.weight_map), strict=False, assign=True)
    model.tie_weights()
    _check_complete(checkpoint, model, {"mismatched_keys": [], "missing_keys": []})
    model.config.quantization_config = config.quantization_config
    folder = streamed.folder
    if (folder / "generation_config.json").exists():  # where replies stop
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval()


def _check_complete(checkpoint: str | Path, model: PreTrainedModel, loading: dict[str, Any]) -> None:
    """Refuse a model that does not have exactly the checkpoint's weights: transformers fills gaps at random.

    Raises:
        ValueError: weights are missing or have another shape.
        FloatingPointError: a weight is not finite.
    """
    mismatched = sorted(loading["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise ValueError(
            f"model {checkpoint!s}: {name} has shape {list(stored)}, the model of its config.json needs "
            f"{list(wanted)}; download the checkpoint again"
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"model {checkpoint!s}: {len(missing)} weights are missing, the first is {missing[0]}; the checkpoint is "
            "incomplete, download it again"
        )
    refuse_non_finite(model.state_dict().items(), f"model {checkpoint!s}")
