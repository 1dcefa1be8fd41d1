"""Make tiny random checkpoints that state what published ones state, and prompts for ``bench.engines.families``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoTokenizer

from bench.laboratory import MODEL
from tlq.export.containers import GGUF_FAMILIES
from tlq.models.processor import load_processor

_DELTA_NETS = {"linear_key_head_dim": 128, "linear_value_head_dim": 128, "full_attention_interval": 2}
#: Fields of a text config as in published checkpoints, without which an engine loads no model of the family.
_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    # transformers transposes the stored experts by their shape, which square ones hide.
    "qwen3_vl_moe": {"norm_topk_prob": True, "moe_intermediate_size": 256},
    "glm4v": {"attention_bias": True},
    "glm4v_moe": {"use_qk_norm": False, "partial_rotary_factor": 0.5},
    # vLLM takes the width of the tower's merger from the decoder; transformers takes three times the tower's output.
    "glm_ocr": {"intermediate_size": 384},
    "lfm2_vl": {"conv_dim": 128, "block_dim": 128},
    # vLLM attends to one token more than transformers in a sliding window: a window wider than the text hides that.
    **dict.fromkeys(("aya_vision", "cohere2_vision"), {"sliding_window": 4096}),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7"), _DELTA_NETS),
}
#: The same of a vision config.
_TOWER_AS_PUBLISHED: dict[str, dict[str, Any]] = {
    "ernie4_5_vl_moe": {"embed_dim": 32, "mlp_ratio": 2},
    "gemma4": {"default_output_length": 70},
    "muse_glimmer": {"output_dim": 128, "adapter_dim": 64},
}
#: Published names of fields that transformers 5.23 writes under newer names: part of the config -> newer -> published.
FIELDS_AS_PUBLISHED: dict[str, dict[str, dict[str, str]]] = {
    "qwen3_vl_moe": {"text_config": {"num_local_experts": "num_experts"}},
    "vipllava": {"": {"vision_feature_layer": "vision_feature_layers"}},
}
#: What preprocessor_config.json of published checkpoints states, and vLLM reads to normalize pixels itself.
NORMALIZATION = ("do_normalize", "do_rescale", "image_mean", "image_std", "rescale_factor")
_QUESTION, _ANSWER = "what is written on the sign over the door", "a blue car"


def checkpoint(name: str, folder: Path) -> Path:
    """A random checkpoint with a processor; the families of llama.cpp have the demo's, whose tokens it knows."""
    from support.families import TINY, randomized, tiny_config
    from support.processors import add_processor, chat_tokenizer, config_of

    if name in GGUF_FAMILIES:
        ids = json.loads((MODEL / "config.json").read_text())
        given = {key: value for key, value in ids.items() if key.endswith("_token_id")}
        own = TINY[name].config
        tower = {**own["vision_config"], "patch_size": 8}
        if "window_size" in tower:
            # The only window that llama.cpp knows, and a block that has it: without one llama.cpp aborts.
            tower |= {"window_size": 112, "depth": 2, "fullatt_block_indexes": [1]}
        config = tiny_config(name, text_config={**own["text_config"], "vocab_size": 512}, vision_config=tower, **given)
    else:
        config = config_of(name, chat_tokenizer(TINY[name].model_type))
    text = config.get_text_config()
    for key, value in {"max_position_embeddings": 1024, **_AS_PUBLISHED.get(TINY[name].model_type, {})}.items():
        setattr(text, key, value)
    for key, value in _TOWER_AS_PUBLISHED.get(TINY[name].model_type, {}).items():
        setattr(config.vision_config, key, value)
    randomized(AutoModelForImageTextToText.from_config(config)).to(torch.bfloat16).save_pretrained(folder)
    if str(getattr(config.vision_config, "model_type", "")).startswith(("clip", "siglip")):
        _rename_as_published(folder / "model.safetensors")
    if TINY[name].model_type == "qwen3_vl_moe":
        _transpose_as_published(folder / "model.safetensors")
    state_as_published(folder / "config.json", FIELDS_AS_PUBLISHED.get(TINY[name].model_type, {}))
    if name not in GGUF_FAMILIES:
        add_processor(name, folder)
        state_normalization(folder)
        return folder
    for file in ("chat_template.jinja", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL / file, folder / file)
    return folder


def _rename_as_published(file: Path) -> None:
    """Give the tensors of a CLIP or SigLIP tower the names of published checkpoints, which transformers 5.23 cuts."""
    tensors = {
        key.replace("vision_tower.", "vision_tower.vision_model."): value for key, value in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})


def _transpose_as_published(file: Path) -> None:
    """Give experts the published layout [experts, in, out]; transformers 5.23 saves them as [experts, out, in]."""
    tensors = {
        key: value.transpose(1, 2).contiguous() if ".experts." in key else value
        for key, value in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})


def state_as_published(file: Path, renamed: dict[str, dict[str, str]]) -> None:
    """Give fields of a config their published names."""
    config = json.loads(file.read_text())
    for part, names in renamed.items():
        fields = config[part] if part else config
        for newer, published in names.items():
            fields[published] = fields.pop(newer)
    file.write_text(json.dumps(config, indent=2))


def state_normalization(folder: Path) -> None:
    """State how pixels are normalized, as published checkpoints do, if the family's processor can be built here."""
    try:
        processor = load_processor(folder)
    except ImportError:
        return
    file = folder / "preprocessor_config.json"
    stated = processor.image_processor.to_dict()
    fields = {key: stated[key] for key in NORMALIZATION if key in stated}
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def prompts(name: str, source: Path, folder: Path) -> list[dict[str, Any]]:
    """A prompt of text, and one with an image if the family's processor can be built here."""
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    answer = tokenizer(_ANSWER, add_special_tokens=False).input_ids
    pieces = [str(tokenizer.decode([token])) for token in answer]
    common = {"answer_ids": answer, "pieces": pieces, "image_text": "<|vision_start|><|image_pad|><|vision_end|>"}
    found = [{**common, "image": None, "text": "", "ids": [*tokenizer(_QUESTION).input_ids, *answer]}]
    try:
        load_processor(source)
    except ImportError:
        return found
    image = folder / "picture.png"
    side = 32 if name in GGUF_FAMILIES else 16  # what the processor takes without a change of size
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    content = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return [*found, {**common, "image": str(image), "text": text}]
