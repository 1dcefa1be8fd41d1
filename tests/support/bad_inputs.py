"""Bad inputs at every door of the pipeline, and what a stage must make of each.

A case changes a tiny project whose first stages have run, and names the stage that meets the change. The stage must
refuse it in one line, or take it; a traceback, a silent success and a hang are faults, and so is code of a stranger
that runs: it would leave the file ``ran``.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from PIL import Image

from support.benchmark_rows import textvqa_rows, write_rows
from support.tiny import png
from tasks.config.presets import SECTIONS

Change = Callable[[Path], None]


@dataclass(frozen=True)
class Case:
    """One bad input.

    Attributes:
        door: where it enters.
        name: what is wrong.
        stage: the stage that meets it; `params` reads all of params.yaml, `tlq` runs the library's command.
        change: makes a good project bad.
        mentions: what the line must name; None if the input is to be taken.
    """

    door: str
    name: str
    stage: str
    change: Change
    mentions: str | None

    @property
    def title(self) -> str:
        return f"{self.door}: {self.name}"


def cases() -> list[Case]:
    """All cases, the doors in the order of the pipeline."""
    doors = (_params, _environment, _rows, _tables, _pictures, _config, _weights, _processor, _results, _benchmarks)
    return [case for door in (*doors, _registry, _command, _strangers) for case in door()]


# --- params.yaml


def set_param(section: str, key: str, value: Any) -> Change:
    def change(folder: Path) -> None:
        file = folder / "params.yaml"
        params = yaml.safe_load(file.read_text())
        params.setdefault(section, {})[key] = value
        file.write_text(yaml.safe_dump(params))

    return change


def misspelt(folder: Path) -> None:
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text())
    params["prepares"] = params.pop("prepare")
    file.write_text(yaml.safe_dump(params))


_NO_NUMBERS = {"-1": -1, "NaN": float("nan"), "infinity": float("inf"), "a word": "many", "true": True, "a list": [1]}
_NO_TEXTS = {"a number": 7, "a list": ["a"], "a mapping": {"a": 1}, "true": True}


def _params() -> Iterator[Case]:
    for section, cls in SECTIONS.items():
        for key, field in getattr(cls, "model_fields", {}).items():
            kind = str(field.annotation)
            if "int" in kind or "float" in kind:
                bad: dict[str, Any] = _NO_NUMBERS
                if key == "seed":
                    bad = {**bad, "10^30": 10**30}
            elif "str" in kind and "tuple" not in kind and "dict" not in kind or "Literal" in kind:
                bad = _NO_TEXTS
            else:
                bad = {"a word": "many", "a number": 7}
            for name, value in bad.items():
                yield Case("params.yaml", f"{section}.{key} is {name}", "params", set_param(section, key, value), key)
    for name, text in {
        "a key twice": "prepare: {samples: 3, samples: 5}",
        "no YAML": "a: [",
        "a list": "- a",
    }.items():
        yield Case("params.yaml", name, "params", _write("params.yaml", text), "params.yaml")
    yield Case("params.yaml", "a section with a wrong name", "params", misspelt, "prepares")
    yield Case("params.yaml", "an unknown key", "params", set_param("prepare", "sample", 3), "sample")


# --- environment


def _environment() -> Iterator[Case]:
    def set_variable(name: str, value: str) -> Change:
        return lambda _folder: os.environ.__setitem__(name, value)

    for name, values in {
        "TLQ_DEVICE": ("gpu9", "cuda:99", "-1"),
        "TLQ_HOST_MEMORY": ("nan", "-1", "much"),
        "TLQ_LOG": ("loud", "-1"),
        "TLQ_RANKS": ("0", "-1", "two", "1.5"),
        "TLQ_IMAGE_PIXELS": ("0", "-5", "many"),
    }.items():
        for value in values:
            stage = "prepare" if name == "TLQ_IMAGE_PIXELS" else "importance"
            yield Case("environment", f"{name}={value}", stage, set_variable(name, value), name)


# --- calibration data


def _write(name: str, content: str | bytes) -> Change:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def _llava(content: str | bytes) -> Change:
    """Prepare from a JSON file, with the folder's pictures."""

    def change(folder: Path) -> None:
        _write("rows.json", content)(folder)
        (folder / "good.png").write_bytes(png(0))
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["prepare"] = {"kind": "llava_json", "path": "rows.json", "image_root": ".", "samples": 1}
        (folder / "params.yaml").write_text(yaml.safe_dump(params))

    return change


def talk(question: Any = "<image>\nWhat?", answer: Any = "This.") -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _rows() -> Iterator[Case]:
    for name, content in {
        "empty": "",
        "half a file": '[{"id": ',
        "a number": "7",
        "no rows": "[]",
        "rows that are numbers": "[1, 2]",
        "nested too deeply": "[" * 9000,
        "of another encoding": b"\xff\xfe[\x00",
        "a pickle": b"\x80\x04K\x07.",
    }.items():
        yield Case("rows of JSON", f"the file is {name}", "prepare", _llava(content), "rows.json")
    for key, values in {
        "conversations": (None, [], {}, "Hi", 7, [7], [{}], [{"from": "human"}], talk(answer="")),
        "image": (7, ["good.png", 7], "gone.png", "../good.png", "/etc/passwd", "", {"a": 1}, "good.png\x00"),
    }.items():
        for value in values:
            row = {"id": "1", "image": "good.png", "conversations": talk(), key: value}
            change = _llava(json.dumps([row]))
            yield Case("rows of JSON", f"{key} is {json.dumps(value)[:40]}", "prepare", change, "rows.json")
    for name, conversation in {
        "a question that is a number": talk(question=7),
        "an answer that is a list": talk(answer=["This."]),
        "no image mark and two images": talk(question="<image><image>"),
        "the assistant first": talk()[::-1],
        "a text of a megabyte": talk(question="<image>" + "a" * 10**6),
        "a role of another name": [{"from": "robot", "value": "Hi"}],
    }.items():
        row = {"id": "1", "image": "good.png", "conversations": conversation}
        yield Case("rows of JSON", name, "prepare", _llava(json.dumps([row])), "rows.json")


def _tables() -> Iterator[Case]:
    def table(change_of: Callable[[pd.DataFrame], pd.DataFrame]) -> Change:
        def change(folder: Path) -> None:
            frame = pd.read_parquet(folder / "questions.parquet")
            change_of(frame).to_parquet(folder / "questions.parquet")

        return change

    for name, change in {
        "no rows": table(lambda frame: frame.iloc[:0]),
        "no column answer": table(lambda frame: frame.drop(columns="answer")),
        "no column image": table(lambda frame: frame.drop(columns="image")),
        "no column id": table(lambda frame: frame.drop(columns="id")),
        "answers that are null": table(lambda frame: frame.assign(answer=None)),
        "images that are numbers": table(lambda frame: frame.assign(image=7)),
        "images that are texts": table(lambda frame: frame.assign(image="a picture")),
        "images that are lists": table(lambda frame: frame.assign(image=[[1, 2]] * len(frame))),
        "images that are empty": table(lambda frame: frame.assign(image=b"")),
        "an empty file": _write("questions.parquet", b""),
        "text in place of parquet": _write("questions.parquet", "image,question,answer\n"),
        "half a file": lambda folder: _cut(folder / "questions.parquet"),
        "a folder in place of a file": lambda folder: _folder(folder / "questions.parquet"),
        "no file": lambda folder: (folder / "questions.parquet").unlink(),
    }.items():
        yield Case("calibration table", name, "prepare", change, "questions.parquet")
    for name, change in {
        "ids that are numbers, which become text": table(lambda frame: frame.assign(id=range(len(frame)))),
        "questions that are numbers, which become text": table(lambda frame: frame.assign(question=range(len(frame)))),
        "answers that are numbers, which become text": table(lambda frame: frame.assign(answer=1.5)),
        "images that are null, with a warning": table(lambda frame: frame.assign(image=None)),
    }.items():
        yield Case("calibration table", name, "prepare", change, None)


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _picture_of(width: int, height: int) -> bytes:
    """The header of a PNG file of any size, with no pixels."""
    ihdr = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + ihdr + bytes(4) + struct.pack(">I", 0) + b"IDAT" + bytes(4)


def _pictures() -> Iterator[Case]:
    def saved(kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 32)) -> bytes:
        buffer = io.BytesIO()
        Image.new(mode, size).save(buffer, kind)
        return buffer.getvalue()

    contents: dict[str, bytes] = {
        "empty": b"",
        "text": b"no picture",
        "half a picture": png(0)[:200],
        "a header alone": _picture_of(64, 64),
        "169 megapixels": _picture_of(13_000, 13_000),
        "of no width": _picture_of(0, 64),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "PPM": saved("PPM"),
        "ICO": saved("ICO"),
        "PDF": saved("PDF"),
        "one pixel high": saved("PNG", size=(4000, 1)),
    }
    row = json.dumps([{"id": "1", "image": "bad.png", "conversations": talk()}])
    for name, content in contents.items():

        def change(folder: Path, content: bytes = content) -> None:
            _llava(row)(folder)
            (folder / "bad.png").write_bytes(content)

        yield Case("picture", name, "prepare", change, "rows.json")

    def special(make: Change) -> Change:
        def change(folder: Path) -> None:
            _llava(row)(folder)
            make(folder / "bad.png")

        return change

    for name, make in {
        "a FIFO": lambda file: os.mkfifo(file),
        "a folder": Path.mkdir,
        "a device": lambda file: file.symlink_to("/dev/zero"),
        "a link out of the folder": lambda file: file.symlink_to(_outside(file)),
        "a link to itself": lambda file: file.symlink_to(file),
    }.items():
        yield Case("picture", name, "prepare", special(make), "rows.json")
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):

        def good(folder: Path, content: bytes = saved(kind)) -> None:
            _llava(row)(folder)
            (folder / "bad.png").write_bytes(content)

        yield Case("picture", f"{kind}, which is allowed", "prepare", good, None)


def _outside(file: Path) -> Path:
    outside = file.parent.with_name(f"{file.parent.name}-outside.png")
    outside.write_bytes(png(0))
    return outside


# --- the checkpoint


def _model(change_of: Change) -> Change:
    """Change a copy of the model, and use it."""

    def change(folder: Path) -> None:
        params = yaml.safe_load((folder / "params.yaml").read_text())
        shutil.copytree(params["model"]["path"], folder / "model")
        change_of(folder / "model")
        params["model"]["path"] = "model"
        (folder / "params.yaml").write_text(yaml.safe_dump(params))

    return change


def edited(name: str, edit: Callable[[dict[str, Any]], Any]) -> Change:
    """Change a JSON file."""

    def change(model: Path) -> None:
        content = json.loads((model / name).read_text())
        made = edit(content)
        (model / name).write_text(json.dumps(content if made is None else made))

    return change


def _at(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for name in parents:
            content = content[name]
        content[last] = value

    return edit


def _config() -> Iterator[Case]:
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    for name in (*sizes, "vocab_size"):
        for value in (0, -1, "many", None, 10**7, [8]):
            change = _model(edited("config.json", _at(f"text_config.{name}", value)))
            yield Case("config.json", f"{name} is {value}", "calibrate", change, "model")
    for name, edit in {
        "an unknown model_type": _at("model_type", "strange"),
        "a model_type that is a number": _at("model_type", 7),
        "a model_type that is a path": _at("model_type", "../../etc"),
        "a language model": _at("model_type", "llama"),
        "the attention of another kernel": _at("attn_implementation", "stranger/kernel"),
        "code of its own": _at("auto_map", {"AutoModel": "code.Model"}),
        "a list": lambda _content: [],
        "a number": lambda _content: 7,
        "float8 weights": _at("quantization_config", {"quant_method": "fp8"}),
        "weights of GPTQ": _at("quantization_config", {"quant_method": "gptq", "bits": 4}),
        "a quantization_config that is a word": _at("quantization_config", "fp8"),
        "an image token beyond the vocabulary": _at("image_token_id", 10**6),
        "an image token that is a word": _at("image_token_id", "image"),
        "no vision_config": lambda content: content.pop("vision_config") and None,
        "a text_config that is a list": _at("text_config", []),
        "an unknown dtype": _at("dtype", "float7"),
    }.items():
        change = _model(edited("config.json", edit))
        taken = name == "code of its own"  # it is not run
        yield Case("config.json", name, "calibrate", change, None if taken else "")
    for name, content in {"empty": b"", "half a file": b'{"model_type": ', "bytes": b"\xff\xfe\x00"}.items():
        yield Case("config.json", name, "calibrate", _model(_write("config.json", content)), "config.json")
    yield Case("config.json", "gone", "calibrate", _model(lambda m: (m / "config.json").unlink()), "config.json")


def _weights() -> Iterator[Case]:
    from safetensors.torch import load_file, save_file

    weights = "model.safetensors"

    def tensors(edit: Callable[[dict[str, Any]], Any]) -> Change:
        def change(model: Path) -> None:
            stored = load_file(model / weights)
            edit(stored)
            save_file(stored, model / weights, {"format": "pt"})

        return change

    def header(edit: Callable[[dict[str, Any]], Any]) -> Change:
        def change(model: Path) -> None:
            content = (model / weights).read_bytes()
            (length,) = struct.unpack("<Q", content[:8])
            described = json.loads(content[8 : 8 + length])
            edited_header = edit(described)
            text = json.dumps(described if edited_header is None else edited_header).encode()
            (model / weights).write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

        return change

    def last(stored: dict[str, Any]) -> str:
        return next(name for name in sorted(stored) if name.endswith("layers.1.mlp.down_proj.weight"))

    def raw(content: bytes) -> Change:
        return _write(weights, content)

    for name, change in {
        "empty": raw(b""),
        "eight bytes": raw(bytes(8)),
        "half a file": lambda model: _cut(model / weights),
        "a header of 2^60 bytes": raw(struct.pack("<Q", 2**60) + b"{}"),
        "a header that is no JSON": raw(struct.pack("<Q", 4) + b"abcd"),
        "a header that is a list": raw(struct.pack("<Q", 2) + b"[]"),
        "a pickle": raw(b"\x80\x04K\x07."),
        "offsets beyond the file": header(lambda h: h[last(h)].update(data_offsets=[0, 2**40])),
        "offsets the wrong way round": header(lambda h: h[last(h)].update(data_offsets=[8, 0])),
        "an unknown dtype": header(lambda h: h[last(h)].update(dtype="F7")),
        "a shape that is a word": header(lambda h: h[last(h)].update(shape="many")),
        "a missing tensor": tensors(lambda t: t.pop(last(t))),
        "a tensor of another shape": tensors(lambda t: t.update({last(t): t[last(t)][:, :-1].clone()})),
        "a tensor of NaN": tensors(lambda t: t.update({last(t): t[last(t)] * float("nan")})),
        "a tensor with one infinity": tensors(lambda t: t[last(t)].__setitem__((0, 0), float("inf"))),
        "a tensor of integers": tensors(lambda t: t.update({last(t): t[last(t)].to(torch.int8)})),
        "a tensor without elements": tensors(lambda t: t.update({last(t): t[last(t)][:0].clone()})),
        "scales of float8 weights": tensors(
            lambda t: t.update({last(t).replace(".weight", ".weight_scale_inv"): t[last(t)][:1].clone()})
        ),
        "gone": lambda model: (model / weights).unlink(),
        "a folder": lambda model: _folder(model / weights),
        "a link to nothing": lambda model: _relink(model / weights),
    }.items():
        for stage in ("calibrate", "evaluate"):
            yield Case("weights", f"{name} ({stage})", stage, _model(change), "model")

    def indexed(index: Any) -> Change:
        def change(model: Path) -> None:
            (model / weights).rename(model / "model-00001-of-00001.safetensors")
            text = index if isinstance(index, str) else json.dumps(index)
            (model / "model.safetensors.index.json").write_text(text)

        return change

    for name, index in {
        "a list": [],
        "no weight_map": {"metadata": {}},
        "a weight_map that is a list": {"weight_map": []},
        "an empty weight_map": {"weight_map": {}},
        "files that are numbers": {"weight_map": {"lm_head.weight": 7}},
        "a file outside": {"weight_map": {"lm_head.weight": "../../other.safetensors"}},
        "an absolute file": {"weight_map": {"lm_head.weight": "/etc/passwd"}},
        "a file that is gone": {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}},
        "no JSON": "{",
    }.items():
        yield Case("weights", f"an index with {name}", "calibrate", _model(indexed(index)), "model")


def _relink(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def _processor() -> Iterator[Case]:
    def template(text: str) -> Change:
        def change(model: Path) -> None:
            for file in model.glob("*.jinja"):
                file.unlink()
            edited("tokenizer_config.json", lambda content: content.pop("chat_template", None) and None)(model)
            (model / "chat_template.jinja").write_text(text)

        return _model(change)

    loop = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
    for name, text in {
        "raises": "{{ raise_exception('no') }}",
        "is no Jinja": "{% for %}",
        "reads what is not there": "{{ messages[99].content }}",
        "divides by zero": "{{ 1 // 0 }}",
        "writes no answer": "{% for message in messages %}{{ message.role }}{% endfor %}",
        "writes nothing": "",
        "leaves the sandbox": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "does not end": loop,
    }.items():
        expected = "" if name == "writes nothing" else "template"
        yield Case("chat template", name, "prepare", template(text), expected)
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        for name, content in {
            "empty": b"",
            "half a file": b'{"a": ',
            "a list": b"[]",
            "bytes": b"\xff\xfe\x00",
        }.items():

            def change(model: Path, file: str = file, content: bytes = content) -> None:
                target = model / file
                if not target.exists():
                    target = model / "processor_config.json"
                target.write_bytes(content)

            yield Case("processor", f"{file} is {name}", "prepare", _model(change), "model")


# --- results of earlier stages


def _results() -> Iterator[Case]:
    damages: dict[str, Callable[[Path], Any]] = {
        "gone": Path.unlink,
        "empty": lambda file: file.write_bytes(b""),
        "half a file": _cut,
        "of bytes": lambda file: file.write_bytes(b"\xff\xfe\x00"),
    }
    for place, stage in {
        "data/prepared": "importance",
        "data/importance": "calibset",
        "data/calibset": "calibrate",
    }.items():
        for name, damage in damages.items():

            def change(folder: Path, place: str = place, damage: Callable[[Path], Any] = damage) -> None:
                tables = (".parquet", ".safetensors")
                for file in sorted(each for each in (folder / place).rglob("*") if each.suffix in tables):
                    damage(file)

            yield Case("earlier results", f"{place} is {name}", stage, change, place)


# --- benchmarks


def _benchmarks() -> Iterator[Case]:
    def rows(edit: Callable[[dict[str, Any]], Any]) -> Change:
        def change(folder: Path) -> None:
            changed = copy.deepcopy(textvqa_rows(4))
            for row in changed:
                edit(row)
            write_rows(folder / "textvqa.parquet", changed)

        return change

    for name, change in {
        "no rows": lambda folder: pd.DataFrame(textvqa_rows(1)).iloc[:0].to_parquet(folder / "textvqa.parquet"),
        "no column answers": rows(lambda row: row.pop("answers")),
        "answers as text": rows(lambda row: row.update(answers="yes")),
        "answers that are numbers": rows(lambda row: row.update(answers=7)),
        "answers that are null": rows(lambda row: row.update(answers=None)),
        "no answers": rows(lambda row: row.update(answers=[])),
        "no column question": rows(lambda row: row.pop("question")),
        "questions that are numbers": rows(lambda row: row.update(question=7)),
        "no column image": rows(lambda row: row.pop("image")),
        "images that are texts": lambda folder: (
            pd.DataFrame(textvqa_rows(4)).assign(image="a picture").to_parquet(folder / "textvqa.parquet")
        ),
        "images that are damaged": rows(lambda row: row.update(image={"bytes": b"junk", "path": None})),
        "images of 169 megapixels": rows(
            lambda row: row.update(image={"bytes": _picture_of(13_000, 13_000), "path": None})
        ),
        "an empty file": _write("textvqa.parquet", b""),
        "half a file": lambda folder: _cut(folder / "textvqa.parquet"),
        "no file": lambda folder: (folder / "textvqa.parquet").unlink(),
    }.items():
        yield Case("benchmark", name, "evaluate", change, "demo_textvqa")
    for name, value, mentions in (
        ("a task of another name", [{"task": "nonsense", "data": "textvqa.parquet"}], "nonsense"),
        ("a task twice", [{"task": "demo_textvqa", "data": "textvqa.parquet"}] * 2, "demo_textvqa"),
        ("no tasks", [], "benchmarks"),
    ):
        yield Case("benchmark", name, "evaluate", set_param("evaluate", "benchmarks", value), mentions)


# --- MLflow


def _registry() -> Iterator[Case]:
    for name, content in {
        "text": b"no database",
        "half a page": b"SQLite format 3\x00" + bytes(100),
        "zeros": bytes(8192),
    }.items():
        yield Case("mlflow.db", name, "register", _write("mlflow.db", content), "mlflow.db")
    yield Case("mlflow.db", "a folder", "register", lambda folder: (folder / "mlflow.db").mkdir(), "mlflow.db")

    def cut(folder: Path) -> None:
        import sqlite3

        with sqlite3.connect(folder / "mlflow.db") as database:
            database.execute("create table experiments (name text)")
            database.execute("create table alembic_version (version_num text)")

    yield Case("mlflow.db", "another program's tables", "register", cut, "mlflow.db")


# --- the command tlq


def _command() -> Iterator[Case]:
    for name, words in {
        "a model that is gone": ["gone", "--data", "rows.json"],
        "data that are gone": ["MODEL", "--data", "gone.json"],
        "no data": ["MODEL"],
        "data of another kind": ["MODEL", "--data", "params.yaml"],
        "0 tokens": ["MODEL", "--data", "rows.json", "--tokens", "0"],
        "-1 samples": ["MODEL", "--data", "rows.json", "--samples", "-1"],
        "10^6 samples": ["MODEL", "--data", "rows.json", "--samples", "1000000"],
        "a batch of 0": ["MODEL", "--data", "rows.json", "--batch-size", "0"],
        "samples of 0 tokens": ["MODEL", "--data", "rows.json", "--max-tokens", "0"],
        "a device that is not there": ["MODEL", "--data", "rows.json", "--device", "cuda:99"],
        "an unknown dtype": ["MODEL", "--data", "rows.json", "--dtype", "float7"],
        "a seed below 0": ["MODEL", "--data", "rows.json", "--seed", "-1"],
        "a result in place of the model": ["MODEL", "--data", "rows.json", "--out", "MODEL"],
        "a result in place of a file": ["MODEL", "--data", "rows.json", "--out", "params.yaml"],
        "a result below a file": ["MODEL", "--data", "rows.json", "--out", "params.yaml/out"],
    }.items():

        def change(folder: Path, words: list[str] = words) -> None:
            model = yaml.safe_load((folder / "params.yaml").read_text())["model"]["path"]
            _llava(json.dumps([{"id": "1", "image": "good.png", "conversations": talk()}]))(folder)
            arguments = [str(model) if word == "MODEL" else word for word in words]
            (folder / "arguments.json").write_text(json.dumps(["--out", "out", *arguments]))

        yield Case("command tlq", name, "tlq", change, "")


# --- code of a stranger

#: The file that a stranger's code leaves in the folder of the project, where the stages work.
MARK = "ran"


class _Stranger:
    """An object whose pickle leaves the mark when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def _strangers() -> Iterator[Case]:
    import pickle

    pickled = pickle.dumps(_Stranger())

    def code(**config: Any) -> Change:
        """Custom classes for config, model, processor and tokenizer, in a module that leaves the mark."""

        def change(model: Path) -> None:
            (model / "custom.py").write_text(f"import os\nos.mkdir({MARK!r})\nclass Custom:\n    pass\n")
            named = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageTextToText"), "custom.Custom")
            edited("config.json", lambda content: content | {"auto_map": named} | config)(model)
            edited("preprocessor_config.json", _at("auto_map", {"AutoImageProcessor": "custom.Custom"}))(model)
            edited("tokenizer_config.json", _at("auto_map", {"AutoTokenizer": ["custom.Custom", None]}))(model)

        return _model(change)

    def pytorch(model: Path) -> None:
        (model / "model.safetensors").unlink()
        torch.save({"lm_head.weight": _Stranger()}, model / "pytorch_model.bin")

    def written(place: str, content: bytes = pickled) -> Change:
        def change(folder: Path) -> None:
            for file in sorted(folder.glob(place)):
                file.write_bytes(content)

        return change

    def escape(folder: Path) -> None:
        _write("chat_template.jinja", f"{{{{ cycler.__init__.__globals__.os.mkdir('{MARK}') }}}}")(folder)
        edited("tokenizer_config.json", lambda content: content.pop("chat_template", None) and None)(folder)

    for stage in ("prepare", "calibrate", "evaluate"):
        yield Case("code of a stranger", f"classes of its own, a prompt answered with y ({stage})", stage, code(), None)
        change = code(model_type="custom")
        yield Case("code of a stranger", f"a model_type of its own, answered with y ({stage})", stage, change, "model")
    for stage in ("calibrate", "evaluate"):
        yield Case("code of a stranger", f"pytorch_model.bin ({stage})", stage, _model(pytorch), "model")
        change = _model(written("model.safetensors"))
        yield Case("code of a stranger", f"a pickle in model.safetensors ({stage})", stage, change, "model")
    yield Case("code of a stranger", "a chat template that leaves its sandbox", "prepare", _model(escape), "template")
    for place, stage in {
        "questions.parquet": "prepare",
        "data/prepared/*.parquet": "importance",
        "data/importance/*.parquet": "calibset",
        "data/calibset/*.parquet": "calibrate",
        "textvqa.parquet": "evaluate",
    }.items():
        named = {"textvqa.parquet": "demo_textvqa"}.get(place, place.partition("*")[0].rstrip("/"))
        yield Case("code of a stranger", f"a pickle in {place}", stage, written(place), named)
    tag = f"prepare: !!python/object/apply:os.mkdir [{MARK}]\n".encode()
    yield Case(
        "code of a stranger", "a tag of Python in params.yaml", "params", written("params.yaml", tag), "params.yaml"
    )
