"""Stage ``demo``: write the demo calibration set and the four demo benchmarks.

``python -m demo.make --out data/demo/world --seed 0`` writes calibration.parquet (id, image, question, answer, source)
and textvqa, chartqa, ocrbench and mmmu.parquet with the columns of the real data sets. Calibration and test pictures
come from splits of the world that share no content with each other or with training (demo.world.split_of).
"""

import argparse
import io
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value

from demo.questions import Question, benchmark_question
from demo.world import KINDS, Kind, Scene, random_scene, render

logger = logging.getLogger(__name__)

BENCHMARKS: dict[str, Kind] = {"textvqa": "signs", "chartqa": "chart", "ocrbench": "text", "mmmu": "shapes"}

OCR_TYPES = {
    "regular": "Regular Text Recognition",
    "irregular": "Irregular Text Recognition",
    "artistic": "Artistic Text Recognition",
    "non-semantic": "Non-Semantic Text Recognition",
    "digits": "Digit String Recognition",
}
SUBJECTS = {
    "count by shape": "Math",
    "count by colour": "Math",
    "colour by shape": "Design",
    "shape by colour": "Art",
}
MMMU_IMAGES = [f"image_{n}" for n in range(1, 8)]

FEATURES: dict[str, Features] = {
    "calibration": Features(
        {
            "id": Value("string"),
            "image": Image(),
            "question": Value("string"),
            "answer": Value("string"),
            "source": Value("string"),
        }
    ),
    "textvqa": Features(
        {
            "image_id": Value("string"),
            "question_id": Value("int32"),
            "question": Value("string"),
            "image": Image(),
            "image_width": Value("int32"),
            "image_height": Value("int32"),
            "answers": Sequence(Value("string")),
            "ocr_tokens": Sequence(Value("string")),
        }
    ),
    "chartqa": Features(
        {"type": Value("string"), "question": Value("string"), "answer": Value("string"), "image": Image()}
    ),
    "ocrbench": Features(
        {
            "dataset": Value("string"),
            "question": Value("string"),
            "question_type": Value("string"),
            "answer": Sequence(Value("string")),
            "image": Image(),
        }
    ),
    "mmmu": Features(
        {
            "id": Value("string"),
            "question": Value("string"),
            "options": Value("string"),
            "explanation": Value("string"),
            **{name: Image() for name in MMMU_IMAGES},
            "img_type": Value("string"),
            "answer": Value("string"),
            "topic_difficulty": Value("string"),
            "question_type": Value("string"),
            "subfield": Value("string"),
        }
    ),
}


@dataclass(frozen=True)
class MakeParams:
    out: Path
    seed: int = 0
    calibration: int = 1600
    items: int = 600


def png(scene: Scene) -> dict[str, Any]:
    """The picture in the storage form of the ``Image`` feature."""
    buffer = io.BytesIO()
    render(scene).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def draw_items(kind: Kind, split: Any, count: int, seed: int) -> Iterator[tuple[Scene, Question]]:
    """``count`` scenes of a split with a benchmark question each, from a generator seeded by seed, split and kind."""
    rng = random.Random(f"{seed}-{split}-{kind}")
    for _ in range(count):
        scene = random_scene(kind, split, rng)
        yield scene, benchmark_question(scene, rng)


def calibration_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Rows of every kind in turn; questions include options and suffix, like the prompts of the benchmarks."""
    streams = [draw_items(kind, "calibration", -(-count // len(KINDS)), seed) for kind in KINDS]
    rows = []
    for n, items in enumerate(zip(*streams, strict=True)):
        for kind, (scene, question) in zip(KINDS, items, strict=True):
            identifier = f"demo-{kind}-{n:05d}"
            rows.append(
                {
                    "id": identifier,
                    "image": png(scene),
                    "question": question.prompt,
                    "answer": question.answer,
                    "source": f"demo-{kind}",
                }
            )
    return rows[:count]


def textvqa_row(n: int, scene: Scene, question: Question) -> dict[str, Any]:
    image = png(scene)
    return {
        "image_id": f"demo{n:05d}",
        "question_id": n,
        "question": question.text,
        "image": image,
        "image_width": render(scene).width,
        "image_height": render(scene).height,
        "answers": [question.answer] * 10,
        "ocr_tokens": [sign.word for sign in scene.signs],
    }


def chartqa_row(n: int, scene: Scene, question: Question) -> dict[str, Any]:
    kind = "augmented_test" if question.skill == "value" else "human_test"
    return {"type": kind, "question": question.text, "answer": question.answer, "image": png(scene)}


def ocrbench_row(n: int, scene: Scene, question: Question) -> dict[str, Any]:
    return {
        "dataset": f"demo-{question.skill}",
        "question": question.text,
        "question_type": OCR_TYPES[question.skill],
        "answer": [question.answer],
        "image": png(scene),
    }


def mmmu_row(n: int, scene: Scene, question: Question) -> dict[str, Any]:
    subject = SUBJECTS[question.skill]
    return {
        "id": f"validation_{subject}_{n + 1}",
        "question": f"<image 1> {question.text}",
        "options": str(list(question.options)),
        "explanation": "",
        **{name: png(scene) if name == "image_1" else None for name in MMMU_IMAGES},
        "img_type": "['Geometric Shapes']",
        "answer": question.answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": question.skill.capitalize(),
    }


ROWS_OF = {"textvqa": textvqa_row, "chartqa": chartqa_row, "ocrbench": ocrbench_row, "mmmu": mmmu_row}


def write_parquet(name: str, rows: list[dict[str, Any]], out: Path) -> None:
    """Write rows with the features of ``name`` to a temporary file, then rename it; images are loaded as images."""
    path = out / f"{name}.parquet"
    temporary = path.with_suffix(".tmp")
    Dataset.from_list(rows, features=FEATURES[name]).to_parquet(temporary)
    temporary.replace(path)
    logger.info("%s: %d rows", path, len(rows))


def make(params: MakeParams) -> None:
    """Write all five files; the same parameters always give the same bytes."""
    params.out.mkdir(parents=True, exist_ok=True)
    write_parquet("calibration", calibration_rows(params.seed, params.calibration), params.out)
    for name, kind in BENCHMARKS.items():
        items = draw_items(kind, "test", params.items, params.seed)
        rows = [ROWS_OF[name](n, scene, question) for n, (scene, question) in enumerate(items)]
        write_parquet(name, rows, params.out)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the demo calibration set and benchmarks.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=MakeParams.seed)
    parser.add_argument("--calibration", type=int, default=MakeParams.calibration, help="number of calibration samples")
    parser.add_argument("--items", type=int, default=MakeParams.items, help="number of items of each benchmark")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    make(MakeParams(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
