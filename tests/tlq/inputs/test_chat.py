"""Chats become the tokens of ``processor.apply_chat_template``; the answer is where the template writes it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from support.processors import PROCESSORS, buildable, write_processor
from transformers import GotOcr2Processor

from tlq.inputs.chat import (
    IMAGE_MARK,
    AnsweredText,
    Message,
    answer_ids,
    chat,
    collate,
    encode,
    image_tokens,
    render_answer,
    render_answers,
    render_prompt,
)
from tlq.models.checkpoint import read_config
from tlq.models.processor import load_processor
from tlq.runtime.limit import EndlessError
from tlq.samples import Sample, encode_batches, image_token_id

QUESTION = Message(role="user", content="<image>Which letter?")

LLAVA_1_5 = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
LLAVA_1_6 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] "
    "{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %} [/INST]"
    "{% else %}{{ ' ' + m['content'][0]['text'] + '<|im_end|> ' }}{% endif %}{% endfor %}"
)
#: Qwen3-VL-Thinking: a conversation closes the thoughts that a generation prompt opens.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
#: DeepSeek-R1 and others: a conversation drops the thoughts.
THOUGHTS_DROPPED = THINKING.replace("{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}", "")


@pytest.fixture(scope="module", params=sorted(PROCESSORS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    buildable(request.param)
    return write_processor(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_processor(write_processor("llava_onevision", tmp_path_factory.mktemp("ov")))


def templated(template: str, processor: Any) -> Any:
    processor.chat_template = template
    return processor


def answer(content: str) -> Message:
    return Message(role="assistant", content=content)


def counted(folder: Path, text: str, template: str | None = None) -> str:
    """The tokens that the loss is taken on, as text."""
    processor = load_processor(folder)
    if template is not None:
        processor.chat_template = template
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, "PNG")
    sample = Sample("1", [file.getvalue()], [QUESTION, answer(text)])
    (batch,) = encode_batches([sample], processor, image_token_id(read_config(folder)), 1, 512)
    return str(processor.tokenizer.decode(batch.input_ids[0][batch.is_answer[0]]))


@pytest.mark.parametrize("text", ["OAK", "e", "d", "n", "end", "im", "_", "|", "assistant", "0zero0", "Which letter?"])
def test_the_loss_is_taken_on_the_answer_and_the_end_of_its_turn(family: Path, text: str) -> None:
    assert counted(family, text) == f"{text}<|im_end|>"


@pytest.mark.parametrize("template", [LLAVA_1_5, LLAVA_1_6, THINKING, THOUGHTS_DROPPED])
def test_blanks_thoughts_and_absent_end_marks_of_templates_are_no_answer(tmp_path: Path, template: str) -> None:
    folder = write_processor("llava", tmp_path)
    assert counted(folder, "OAK", template).strip() == "OAK<|im_end|>"
    assert not counted(folder, "OAK", template).endswith(" ")


def test_thoughts_are_closed_before_the_answer(processor: Any) -> None:
    messages = [QUESTION, answer("OAK")]
    closed = render_answer(templated(THINKING, processor), messages)
    assert closed.context.endswith("assistant\n<think>\n\n</think>\n\n")
    dropped = render_answer(templated(THOUGHTS_DROPPED, processor), messages)
    assert dropped.context.endswith("<|im_start|>assistant\n")
    assert closed.answer == dropped.answer == "OAK<|im_end|>"


def test_several_answers_to_a_question_share_its_renderings(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processor = load_processor(family)
    options = ["A", "B", "OAK", "e"]
    alone = [render_answer(processor, [QUESTION, answer(option)]) for option in options]
    calls: list[None] = []
    original = type(processor).apply_chat_template
    monkeypatch.setattr(
        type(processor), "apply_chat_template", lambda *a, **k: (calls.append(None), original(*a, **k))[1]
    )
    assert render_answers(processor, [QUESTION], options) == alone
    assert len(calls) == 3 + len(options)


def test_a_conversation_is_encoded_as_transformers_does_up_to_the_end_of_its_turn(family: Path) -> None:
    processor = load_processor(family)
    answered = render_answer(processor, [QUESTION, answer("OAK")])
    whole = processor.apply_chat_template(chat([QUESTION, answer("OAK")], processor), tokenize=False)
    mine = (answered.context + answered.answer).split()
    assert mine == whole.split()[: len(mine)]


def test_a_chat_alone_and_in_a_batch_has_the_same_tokens(family: Path) -> None:
    """A chat without an image and one with two share a batch: neither changes the other."""
    processor = load_processor(family)
    pictures = [Image.new("RGB", (48, 16)), Image.new("RGB", (16, 30))]
    two = encode(processor, render_prompt(processor, [Message(role="user", content="<image>Same?<image>")]), pictures)
    if isinstance(processor, GotOcr2Processor):
        with pytest.raises(ValueError, match="the model's processor refuses it: You must provide valid `images`"):
            encode(processor, "just words", [])
        return
    words = encode(processor, render_prompt(processor, [Message(role="user", content="just words")]), [])
    both = collate([two, words], pad_id=0, side="left")
    for row, alone in enumerate((two, words)):
        kept = both["attention_mask"][row].bool()
        assert torch.equal(both["input_ids"][row][kept], alone["input_ids"][0])
    assert both["attention_mask"][:, -1].all()
    assert torch.equal(both["pixel_values"], two["pixel_values"])


def test_patches_of_all_images_follow_each_other_where_their_sizes_are_given() -> None:
    """MiniCPM-V reads the patches of a whole batch from its first row."""
    rows = [
        {
            "input_ids": torch.ones(1, 2, dtype=torch.long),
            "pixel_values": torch.full((1, 3, 4, 4 * patches), float(patches)),
            "target_sizes": torch.tensor([[1, patches]]),
        }
        for patches in (2, 5)
    ]
    both = collate(rows, pad_id=0)
    assert both["pixel_values"].shape == (1, 3, 4, 28)
    assert both["pixel_values"][0, 0, 0].tolist() == [2.0] * 8 + [5.0] * 20
    assert both["target_sizes"].tolist() == [[1, 2], [1, 5]]


def test_places_without_a_patch_are_marked_as_those_of_the_processor(tmp_path: Path) -> None:
    """Gemma 4 takes a patch at (0, 0) for one of the image, and at (-1, -1) for none."""
    folder = write_processor("gemma4", tmp_path)
    few, many = (load_processor(folder, max_soft_tokens=tokens) for tokens in (70, 140))
    pictures = [Image.new("RGB", (16, 16)), Image.new("RGB", (48, 32))]
    rows = [
        encode(processor, render_prompt(processor, [QUESTION]), [picture])
        for processor, picture in zip((few, many), pictures, strict=True)
    ]
    both = collate(rows, pad_id=0)
    assert len(both["pixel_values"][0]) > len(rows[0]["pixel_values"][0])
    (alone,) = encode(many, render_prompt(many, [QUESTION]), pictures[:1])["image_position_ids"]
    patches = int((rows[0]["image_position_ids"] >= 0).all(-1).sum())
    assert torch.equal((both["image_position_ids"][0] == -1).all(-1), torch.arange(len(alone)) >= patches)
    assert bool((alone[-1] == -1).all())


def test_numbers_of_patches_count_those_of_the_chats_before() -> None:
    """Molmo 2 pools patches of all images of a batch by their numbers."""
    rows = [
        {
            "input_ids": torch.ones(1, 2, dtype=torch.long),
            "pixel_values": torch.zeros(crops, 4, 12),
            "image_token_pooling": torch.tensor([[0, 1], [2, -1]]),
        }
        for crops in (2, 1)
    ]
    both = collate([*rows, {"input_ids": torch.ones(1, 3, dtype=torch.long)}], pad_id=0)
    assert both["image_token_pooling"].tolist() == [[0, 1], [2, -1], [8, 9], [10, -1]]


def test_image_tokens_that_somebody_typed_become_words(family: Path) -> None:
    processor = load_processor(family)
    picture = Image.new("RGB", (16, 16))
    tokens = [token for token in image_tokens(processor) if token != IMAGE_MARK]
    for token in tokens:
        typed, plain = (
            encode(processor, render_prompt(processor, [Message(role="user", content=f"<image>A {word}?")]), [picture])
            for word in (token, "video" if "video" in token else "image")
        )
        assert torch.equal(typed["input_ids"], plain["input_ids"]), token


def test_a_name_that_is_no_token_stays_a_word(tmp_path: Path) -> None:
    """Aya Vision calls a tile ``TILE``; whoever asks about a tile does not mean that token."""
    processor = load_processor(write_processor("aya_vision", tmp_path))
    assert "Which TILE is red, TILE_GLOBAL or image?" in render_prompt(
        processor, [Message(role="user", content="Which TILE is red, TILE_GLOBAL or <|IMG_PATCH|>?")]
    )


def test_image_marks_become_image_parts_in_their_place(processor: Any) -> None:
    turns = chat([Message(role="user", content="Compare <image> with <image>!")], processor)
    kinds = [(part["type"], part.get("text")) for part in turns[0]["content"]]
    assert kinds == [("text", "Compare "), ("image", None), ("text", " with "), ("image", None), ("text", "!")]


def test_a_chat_that_the_template_or_the_processor_cannot_take_says_why(processor: Any) -> None:
    template = "{{ raise_exception('Conversation roles must alternate') }}"
    with pytest.raises(ValueError, match="the model's chat template refuses it: Conversation roles must alternate"):
        render_prompt(templated(template, processor), [QUESTION])
    with pytest.raises(ValueError, match="the model's processor refuses it: "):
        encode(processor, "<image><image>two marks", [Image.new("RGB", (16, 16))])


def test_a_chat_template_that_does_not_end_is_stopped(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlq.inputs.chat.TEMPLATE_SECONDS", 0.2)
    loop = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    with pytest.raises(EndlessError, match="the model's chat template has not finished after 0.2 seconds"):
        render_prompt(templated(loop, processor), [QUESTION])


def test_a_text_of_a_megabyte_is_refused_before_it_is_tokenized(processor: Any) -> None:
    with pytest.raises(ValueError, match="its texts have 1000000 characters, more than 500000; shorten them"):
        render_prompt(processor, [Message(role="user", content="a" * 10**6)])


def test_a_token_across_the_boundary_belongs_to_the_answer() -> None:
    """SentencePiece may join the answer's first letters with the blank before them, BPE with the line end."""
    tokens = {"to: ": [1, 2], "to: cat": [1, 3, 4], "to:": [1], "to:cat": [1, 4]}

    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": tokens[text]}

    assert answer_ids(tokenizer, AnsweredText("to: ", "cat")) == [3, 4]
    assert answer_ids(tokenizer, AnsweredText("to:", "cat")) == [4]


def test_parts_in_place_of_text_are_refused(processor: Any) -> None:
    parts: Any = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    with pytest.raises(ValueError, match="a turn's content is a list, must be text with <image> marks"):
        chat([parts], processor)


def test_a_chat_template_in_tokenizer_config_alone_is_used(tmp_path: Path) -> None:
    folder = write_processor("qwen2_5_vl", tmp_path)
    expected = render_prompt(load_processor(folder), [QUESTION])
    template = folder / "chat_template.jinja"
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template.read_text()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    template.unlink()
    assert render_prompt(load_processor(folder), [QUESTION]) == expected
