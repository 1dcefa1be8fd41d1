"""Shape, tokenizer and processor of the demo model, a ``Qwen2VLForConditionalGeneration`` of about seven megabytes.

This module trains nothing. The input width of every linear of the decoder is a multiple of 128, the group size of the
common weight-only schemes.
"""

import json
import random
import re
from pathlib import Path
from typing import Any

from tokenizers import Regex as TokenizerRegex
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, Qwen2Tokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from demo.questions import benchmark_questions, option_question, study_questions
from demo.world import CELL, COLUMNS, KINDS, ROWS, random_scene

PATCH = CELL // 2
IMAGE_TOKENS = ROWS * COLUMNS
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part or 'image_url' in part %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'video' or 'video' in part %}"
    "{{ '<|vision_start|><|video_pad|><|vision_end|>' }}"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _corpus(seed: int, scenes: int) -> list[str]:
    """Prompts and answers for learning the merges, without words in capitals, so that no merge joins capitals."""
    rng = random.Random(seed)
    lines = ["user", "assistant"] * scenes
    for _ in range(scenes):
        for kind in KINDS:
            scene = random_scene(kind, "train", rng)
            questions = benchmark_questions(scene, rng) + study_questions(scene, rng) + [option_question(rng)]
            lines += [text for question in questions for text in (question.prompt, question.answer)]
    return [re.sub(r"\b[A-Z]{2,}\b", "", line) for line in lines]


def build_tokenizer(vocab_size: int = 512, seed: int = 0) -> Qwen2Tokenizer:
    """Byte-level BPE in Qwen2's form. Each capital and each digit is one token, so that the model reads by spelling."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(TokenizerRegex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(seed, scenes=400), trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe.get_vocab(),
        merges=merges,  # type: ignore[arg-type]  # pairs, as the tokenizers library expects
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS[1:])})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 1024
    return tokenizer


def load_or_build_tokenizer(folder: Path, trained: Path | None = None) -> Qwen2Tokenizer:
    """The tokenizer of a work folder, stored there once so that changed questions do not change it.

    A new folder gets the tokenizer of the model ``trained`` from which training starts, if there is one.
    """
    if not folder.exists():
        tokenizer = Qwen2Tokenizer.from_pretrained(trained) if trained is not None else build_tokenizer()
        tokenizer.save_pretrained(folder)
    return Qwen2Tokenizer.from_pretrained(folder)


def decoder_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """Settings of a decoder 6 x 256 with 4 heads of 64, 2 for keys and values.

    ``rope_theta`` is small because sequences are short: with the usual value, neighbouring columns of the picture would
    hardly differ in phase (the width section of mrope has the lowest frequencies). The value is not smaller still, and
    the width section is the widest, so that some frequencies are low enough to compare words that are far apart.
    """
    vocab = tokenizer.get_vocab()
    return {
        "vocab_size": -(-len(tokenizer) // 64) * 64,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [3, 5, 24]},
        "bos_token_id": vocab["<|endoftext|>"],
        "eos_token_id": vocab["<|im_end|>"],
        "pad_token_id": vocab["<|endoftext|>"],
        "tie_word_embeddings": False,
    }


def build_config(tokenizer: Qwen2Tokenizer) -> Qwen2VLConfig:
    """The decoder, and a vision tower 3 x 192 with patch 8 and merge 2."""
    ids = {token: tokenizer.get_vocab()[token] for token in SPECIAL_TOKENS}
    return Qwen2VLConfig(
        text_config=decoder_config(tokenizer),
        vision_config={
            "depth": 3,
            "embed_dim": 192,
            "hidden_size": 256,
            "mlp_ratio": 4,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Image processor that keeps the size of pictures of 1,024 to 65,536 pixels with sides that are multiples of 16."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 1024, "longest_edge": 65536},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def build_model(tokenizer: Qwen2Tokenizer) -> Qwen2VLForConditionalGeneration:
    """An untrained model in fp32 with transformers' initial weights, from torch's global generator."""
    model = Qwen2VLForConditionalGeneration(build_config(tokenizer))
    set_greedy(model, tokenizer)
    return model


def set_greedy(model: PreTrainedModel, tokenizer: Qwen2Tokenizer) -> None:
    """Let the model decode greedily by default."""
    assert model.generation_config is not None
    model.generation_config._from_model_config = False  # greedy decoding is a setting of this model
    model.generation_config.update(
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_processor(tokenizer: Qwen2Tokenizer, out: Path) -> None:
    """Write the files of an ordinary Qwen2-VL processor: tokenizer, chat template, image processor."""
    tokenizer.save_pretrained(out)
    build_image_processor().save_pretrained(out)
