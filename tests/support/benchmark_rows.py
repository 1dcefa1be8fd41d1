"""Rows of tiny benchmarks in the real columns."""

import io
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

WORDS = ["exit", "stop", "café", "7", "new york", "B"]


def png(seed: int, width: int = 48, height: int = 32) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def textvqa_rows(count: int) -> list[dict[str, Any]]:
    return [
        {
            "image": {"bytes": png(index, width=32 + 16 * (index % 3)), "path": None},
            "question": f"What is written on sign {'number ' * (index % 4)}{index}?",
            "answers": [WORDS[index % len(WORDS)]] * 10,
            "question_id": index,
            "ocr_tokens": [],
        }
        for index in range(count)
    ]


def mmmu_rows(count: int) -> list[dict[str, Any]]:
    rows = []
    for index in range(count):
        images = {f"image_{n}": None for n in range(1, 8)}
        for n in range(1, 2 + index % 3):
            images[f"image_{n}"] = {"bytes": png(100 * index + n), "path": None}
        mentions = " and ".join(f"<image {n}>" for n in range(1, 2 + index % 3))
        rows.append(
            {
                "id": f"validation_Art_{index}",
                "question": f"Which is older, {mentions}?",
                "options": "['one', 'two', 'three', 'four']" if index % 4 else "[]",
                "answer": "ABCD"[index % 4] if index % 4 else "42",
                "question_type": "multiple-choice" if index % 4 else "open",
                **images,
            }
        )
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    """As `datasets` writes it, so that image columns restore."""
    columns = {column: [row[column] for row in rows] for column in rows[0]}
    table = datasets.Dataset.from_dict(columns)
    for column in columns:
        if column.startswith("image"):
            table = table.cast_column(column, datasets.Image())
    table.to_parquet(str(path))
    return str(path)


def image() -> dict[str, Any]:
    return {"bytes": png(0), "path": None}


#: Rows of every benchmark, by its folder.
ROWS: dict[str, list[dict[str, Any]]] = {
    "textvqa": textvqa_rows(4),
    "vizwiz": textvqa_rows(4),
    "mmmu": mmmu_rows(6),
    "chartqa": [
        {"image": image(), "question": "How high?", "answer": answer, "type": kind}
        for answer, kind in (("12", "human_test"), ("5%", "augmented_test"), ("Yes", "human_test"))
    ],
    "ocrbench": [
        {"image": image(), "question": "?", "answer": ["X^2"], "dataset": dataset, "question_type": kind}
        for dataset, kind in (("HME100k", "Handwritten Mathematical Expression Recognition"), ("x", "Doc-oriented VQA"))
    ],
    "seedbench2plus": [
        {"image": image(), "question": "?", "answer": letter, "question_image_type": kind, "question_id": kind}
        | {f"choice_{other}": other for other in "ABCD"}
        for letter, kind in (("A", "Chart"), ("B", "Map"), ("C", "Web"))
    ],
}
