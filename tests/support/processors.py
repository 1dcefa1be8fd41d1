"""The processor of every supported family: transformers' own class and image processor, and a tokenizer made here.

The tokenizer has a token per byte and the special tokens under which the family's processor looks for images; the chat
template marks an image as the family's own does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForImageTextToText, PretrainedConfig, PreTrainedTokenizerFast

from support.families import PINPOINTS, TINY, randomized, tiny_config


@dataclass(frozen=True)
class TinyProcessor:
    """The processor of one family.

    Attributes:
        name: its class.
        image: class and settings of the image processor.
        settings: settings of the processor.
        tokens: special tokens, by the names under which the tokenizer gives them.
        mark: an image in the chat template.
        stands: the token at the places of an image's features; by default the image token.
        more: special tokens without a name.
        bos: the tokenizer adds a token at the beginning, which the chat template writes as well.
        video: class and settings of the video processor, if it cannot be read from those of the image processor.
        vision: fields of the model's vision config without which it would not take the processor's images.
        needs: packages that the processor needs and this project does not install.
    """

    name: str
    image: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=lambda: {"image_token": "<image>", "video_token": "<video>"})
    mark: str = "<image>"
    stands: str = ""
    more: tuple[str, ...] = ()
    bos: bool = False
    video: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


#: In the manner of LLaVA-OneVision's own: images first, and "assistant" followed by a blank only inside conversations.
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ 'IMAGE' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

QWEN_SIZE = {"patch_size": 4, "size": {"shortest_edge": 64, "longest_edge": 512}}
SQUARE = {"size": {"height": 16, "width": 16}}
CROP = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
CLIP = {"patch_size": 8, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
SPLIT = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
GEMMA4_PATCHES = {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 2}
SPLIT_TOKENS = (
    "<fake_token_around_image>",
    "<global-img>",
    *(f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2, 3)),
)
GEMMA_TOKENS = {
    "image_token": "<image_soft_token>",
    "video_token": "<video>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
}
GEMMA4_TOKENS = {**GEMMA_TOKENS, "audio_token": "<audio>", "boa_token": "<start_audio>", "eoa_token": "<end_audio>"}


def around(start: str, image: str, end: str, video: str = "<|video|>", **more: Any) -> dict[str, Any]:
    """Tokens of a family whose chat template writes a token before and one after the image's own."""
    return {
        "tokens": {"image_token": image, "video_token": video},
        "mark": start + image + end,
        "more": (start, end),
        **more,
    }


QWEN_TOKENS = around("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
GLM_TOKENS = around("<|begin_of_image|>", "<|image|>", "<|end_of_image|>")
GLM_TOKENS["more"] += ("<|begin_of_video|>", "<|end_of_video|>")  # vLLM looks for them


def qwen(name: str) -> TinyProcessor:
    return TinyProcessor(name, {"image_processor_type": "Qwen2VLImageProcessor", **QWEN_SIZE}, **QWEN_TOKENS)


def glm(name: str, image: str) -> TinyProcessor:
    return TinyProcessor(name, {"image_processor_type": image, **QWEN_SIZE}, **GLM_TOKENS)


def minicpm(name: str) -> TinyProcessor:
    names = ("image_start", "image_end", "slice_start", "slice_end", "image_id_start", "image_id_end")
    tokens = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    return TinyProcessor(
        name,
        {"image_processor_type": "MiniCPMV4_6ImageProcessor", "patch_size": 4, "scale_resolution": 32},
        tokens={**tokens, **{f"{each}_token": f"<{each}>" for each in names}},
        mark="<|image_pad|>",
        needs=("torchvision",),
    )


def pixtral(name: str, needs: tuple[str, ...] = ()) -> TinyProcessor:
    return TinyProcessor(
        name,
        {"image_processor_type": "PixtralImageProcessor", "patch_size": 8, "size": {"longest_edge": 48}},
        {"patch_size": 4, "spatial_merge_size": 2},
        {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"},
        "[IMG]",
        needs=needs,
    )


PROCESSORS: dict[str, TinyProcessor] = {
    "qwen2_vl": qwen("Qwen2VLProcessor"),
    "qwen2_5_vl": qwen("Qwen2_5_VLProcessor"),
    "qwen3_vl": qwen("Qwen3VLProcessor"),
    "qwen3_vl_moe": qwen("Qwen3VLProcessor"),
    "qwen3_5": qwen("Qwen3VLProcessor"),
    "qwen3_5_moe": qwen("Qwen3VLProcessor"),
    "exaone4_5": qwen("Exaone4_5_Processor"),
    "glm4v": glm("Glm4vProcessor", "Glm4vImageProcessor"),
    "glm4v_moe": glm("Glm4vProcessor", "Glm4vImageProcessor"),
    "glm46v": glm("Glm46VProcessor", "Glm46VImageProcessor"),
    "glm_ocr": glm("Glm46VProcessor", "Glm46VImageProcessor"),
    "paddleocr_vl": TinyProcessor(
        "PaddleOCRVLProcessor",
        {"image_processor_type": "PaddleOCRVLImageProcessor", **QWEN_SIZE},
        **around("<|IMAGE_START|>", "<|IMAGE_PLACEHOLDER|>", "<|IMAGE_END|>"),
    ),
    "ernie4_5_vl_moe": TinyProcessor(
        "Ernie4_5_VLMoeProcessor",
        {"image_processor_type": "Ernie4_5_VLMoeImageProcessor", **QWEN_SIZE},
        tokens={
            f"{kind}{place}_token": f"<|{kind.upper()}{place.upper()}|>"
            for kind in ("image", "video")
            for place in ("", "_start", "_end")
        },
        mark="<|IMAGE_START|><|IMAGE|><|IMAGE_END|>",
        video={"video_processor_type": "Ernie4_5_VLMoeVideoProcessor", "draw_on_frames": False},
    ),
    "video_llama_3": TinyProcessor(
        "VideoLlama3Processor",
        {
            "image_processor_type": "VideoLlama3ImageProcessor",
            "patch_size": 4,
            "merge_size": 2,
            "size": {"shortest_edge": 64, "longest_edge": 512},
        },
        **around("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"),
    ),
    "minicpmv4_6": minicpm("MiniCPMV4_6Processor"),
    "minicpmv4_7": minicpm("MiniCPMV4_7Processor"),
    "ovis2": TinyProcessor(
        "Ovis2Processor",
        {"image_processor_type": "Ovis2ImageProcessor", **SQUARE},
        {"image_seq_length": 4},
        {"image_token": "<IMG_ATOM>"},
        more=("<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"),
    ),
    "lfm2_vl": TinyProcessor(
        "Lfm2VlProcessor",
        {"image_processor_type": "Lfm2VlImageProcessor", "tile_size": 64, "encoder_patch_size": 4},
        tokens={
            "image_token": "<image>",
            "image_start_token": "<|image_start|>",
            "image_end_token": "<|image_end|>",
            "image_thumbnail_token": "<|img_thumbnail|>",
        },
        needs=("torchvision",),
    ),
    "granite4_vision": TinyProcessor(
        "Granite4VisionProcessor",
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, **CROP},
        {"patch_size": 4, "vision_feature_select_strategy": "full", "downsample_rate": "1/2"},
    ),
    "cohere2_vision": TinyProcessor(
        "Cohere2VisionProcessor",
        {"image_processor_type": "Cohere2VisionImageProcessor", "patch_size": 2, **SQUARE},
        tokens={
            "image_token": "<|IMG_PATCH|>",
            "boi_token": "<|START_OF_IMG|>",
            "eoi_token": "<|END_OF_IMG|>",
            "img_line_break_token": "<|IMG_LINE_BREAK|>",
        },
        mark="<|IMG_PATCH|>",
        needs=("torchvision",),
    ),
    "aya_vision": TinyProcessor(
        "AyaVisionProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", "crop_to_patches": True, **SQUARE},
        {"patch_size": 4, "img_size": 16, "downsample_factor": 2},
        {"image_token": "<image>"},
        stands="<|IMG_PATCH|>",
        more=("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>"),
    ),
    "vipllava": TinyProcessor("LlavaProcessor", {"image_processor_type": "CLIPImageProcessor", **CROP}, CLIP),
    "llava": TinyProcessor("LlavaProcessor", {"image_processor_type": "CLIPImageProcessor", **CROP}, CLIP),
    "llava_next": TinyProcessor(
        "LlavaNextProcessor",
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, **CROP},
        CLIP,
    ),
    "llava_next_video": TinyProcessor(
        "LlavaNextVideoProcessor",
        {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS, **CROP},
        CLIP,
        video={"video_processor_type": "LlavaNextVideoVideoProcessor"},
    ),
    "llava_onevision": TinyProcessor(
        "LlavaOnevisionProcessor",
        {"image_processor_type": "LlavaOnevisionImageProcessor", "image_grid_pinpoints": PINPOINTS, **SQUARE},
        {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    ),
    "llama4": TinyProcessor(
        "Llama4Processor",
        {"image_processor_type": "Llama4ImageProcessor", "max_patches": 4, **SQUARE},
        {"patch_size": 4},
        {"image_token": "<|image|>"},
        "<|image|>",
        stands="<|patch|>",
        more=("<|image_start|>", "<|image_end|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
        bos=True,
        needs=("torchvision",),
    ),
    "molmo2": TinyProcessor(
        "Molmo2Processor",
        {"image_processor_type": "Molmo2ImageProcessor", "patch_size": 4, "overlap_margins": [1, 1], **SQUARE},
        tokens={"image_token": "<|image|>", "video_token": "<|video|>"},
        mark="<|image|>",
        stands="<im_patch>",
        more=(
            *("<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>"),
            *("<frame_start>", "<im_end>", "<frame_end>", "<im_low>"),
        ),
        needs=("torchvision",),
    ),
    "deepseek_ocr2": TinyProcessor(
        "DeepseekOcr2Processor",
        {  # 144 tokens a view
            "image_processor_type": "DeepseekOcr2ImageProcessor",
            "size": {"height": 192, "width": 192},
            "tile_size": 192,
            "max_patches": 2,
        },
        {"patch_size": 4, "downsample_ratio": 4},
    ),
    "internvl": TinyProcessor(
        "InternVLProcessor",
        {"image_processor_type": "GotOcr2ImageProcessor", **SQUARE},
        {"image_seq_length": 4},
        {
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        "<IMG_CONTEXT>",
        stands="<IMG_CONTEXT>",
    ),
    "got_ocr2": TinyProcessor(
        "GotOcr2Processor",
        {"image_processor_type": "GotOcr2ImageProcessor", "size": {"height": 256, "width": 256}},  # always 256 tokens
        tokens={},
        mark="<img><imgpad></img>",
        stands="<imgpad>",
        more=("<img>", "</img>", "<imgpad>"),
        vision={"image_size": 256},
    ),
    "deepseek_vl": TinyProcessor(
        "DeepseekVLProcessor",
        {"image_processor_type": "DeepseekVLImageProcessor", "min_size": 4, **SQUARE},
        {"num_image_tokens": 4},
        {"image_token": "<image_placeholder>"},
        "<image_placeholder>",
    ),
    "mistral3": pixtral("PixtralProcessor", ("torchvision",)),
    "lighton_ocr": pixtral("LightOnOcrProcessor"),
    "gemma3": TinyProcessor(
        "Gemma3Processor",
        {"image_processor_type": "Gemma3ImageProcessor", **SQUARE},
        {"image_seq_length": 4},
        GEMMA_TOKENS,
        "<start_of_image>",
        bos=True,
    ),
    "gemma4": TinyProcessor(
        "Gemma4Processor",
        {"image_processor_type": "Gemma4ImageProcessor", **GEMMA4_PATCHES},
        {"feature_extractor": {"feature_size": 8}},
        GEMMA4_TOKENS,
        "<image_soft_token>",
        bos=True,
    ),
    "gemma4_unified": TinyProcessor(
        "Gemma4UnifiedProcessor",
        {"image_processor_type": "Gemma4UnifiedImageProcessor", **GEMMA4_PATCHES},
        {"feature_extractor": {"feature_size": 8}},
        GEMMA4_TOKENS,
        "<image_soft_token>",
        bos=True,
        needs=("torchvision",),
    ),
    "muse_glimmer": TinyProcessor(
        "MuseGlimmerProcessor",
        {"image_processor_type": "MuseGlimmerImageProcessor", "patch_size": 4},
        tokens={},
        mark="<|patch|>",
        stands="<|patch|>",
        more=(
            *("<|patch|>", "<|image_start|>", "<|image_end|>", "<|video|>"),
            *("<|vid_frame_separator|>", "<|vid_start|>", "<|vid_end|>"),
        ),
        needs=("torchvision",),
    ),
    "smolvlm": TinyProcessor(
        "SmolVLMProcessor",
        {"image_processor_type": "SmolVLMImageProcessor", **SPLIT},
        {"image_seq_len": 4},
        more=SPLIT_TOKENS,
        needs=("torchvision", "num2words"),
    ),
    "idefics2": TinyProcessor(
        "Idefics2Processor",
        {
            "image_processor_type": "Idefics2ImageProcessor",
            "do_image_splitting": True,
            "size": {"shortest_edge": 8, "longest_edge": 16},
        },
        {"image_seq_len": 4},
        tokens={},
        stands="<image>",
        more=("<fake_token_around_image>", "<image>", "<end_of_utterance>"),
    ),
    "idefics3": TinyProcessor(
        "Idefics3Processor",
        {"image_processor_type": "Idefics3ImageProcessor", **SPLIT},
        {"image_seq_len": 4},
        more=SPLIT_TOKENS,
    ),
}


def chat_tokenizer(model_type: str) -> PreTrainedTokenizerFast:
    """A token per byte, the special tokens of the family, and a chat template in which it marks images its own way."""
    row = PROCESSORS[model_type]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    chat = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
    special = dict.fromkeys([*chat, *row.more, *row.tokens.values()])
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if row.bos:
        bos = ("<bos>", core.token_to_id("<bos>"))
        core.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[bos])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<bos>" if row.bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=row.tokens,
        chat_template=("<bos>" if row.bos else "") + TEMPLATE.replace("IMAGE", row.mark),
        model_max_length=512,
    )


def buildable(name: str) -> None:
    """Skip the test if a package is missing that the family's processor needs."""
    row = PROCESSORS[TINY[name].model_type]
    if missing := [package for package in row.needs if find_spec(package) is None]:
        pytest.skip(f"transformers builds {row.name} with {' and '.join(missing)} only")


def write_processor(name: str, folder: Path) -> Path:
    """Config, tokenizer and processor files of a family, without weights; images of up to three tiles."""
    config_of(name, chat_tokenizer(TINY[name].model_type)).save_pretrained(folder)
    return add_processor(name, folder)


def write_tiny_with_processor(name: str, folder: Path) -> Path:
    """A random checkpoint of the family with tokenizer and processor files, images of up to three tiles."""
    config = config_of(name, chat_tokenizer(TINY[name].model_type))
    randomized(AutoModelForImageTextToText.from_config(config)).to(torch.bfloat16).save_pretrained(folder)
    return add_processor(name, folder)


def add_processor(name: str, folder: Path) -> Path:
    """Write the family's tokenizer and processor files next to a config."""
    row = PROCESSORS[TINY[name].model_type]
    chat_tokenizer(TINY[name].model_type).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**row.image, "processor_class": row.name}))
    if row.video:
        (folder / "video_preprocessor_config.json").write_text(json.dumps(row.video))
    (folder / "processor_config.json").write_text(json.dumps({**row.settings, "processor_class": row.name}))
    return folder


def config_of(name: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """The tiny config of a family with the vocabulary and the image tokens of ``tokenizer``."""
    own, row = TINY[name].config, PROCESSORS[TINY[name].model_type]
    ids = {
        "image_token_id": tokenizer.convert_tokens_to_ids(row.stands or row.tokens["image_token"]),
        "video_token_id": tokenizer.convert_tokens_to_ids(row.tokens.get("video_token", "<|endoftext|>")),
    }
    around = [f"{each}_token" for each in ("boi", "eoi", "audio") if f"{each}_token" in row.tokens]
    ids |= {f"{each}_id": tokenizer.convert_tokens_to_ids(row.tokens[each]) for each in around}
    ids["image_patch_id"] = ids["image_token_id"]
    ids |= {field.replace("_id", "_index"): value for field, value in ids.items()}
    changes: dict[str, Any] = {field: value for field, value in ids.items() if field in own}
    vocabularies = [field for field in own["text_config"] if field.startswith("vocab_size")]
    text_config = {**own["text_config"], **dict.fromkeys(vocabularies, len(tokenizer))}
    if row.vision:
        changes["vision_config"] = {**own["vision_config"], **row.vision}
    return tiny_config(name, text_config=text_config, **changes)
