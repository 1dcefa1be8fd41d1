"""The registered model: MLflow serves it to answer questions about images.

MLflow runs this file to build the model (models from code). The checkpoint is not copied into the registry. The
version stores the checkpoint's path and digest, and loading fails if the digest differs.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any, cast

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel
from PIL.Image import Image
from transformers import BatchFeature

from tlq.export.loading import load_model
from tlq.inputs.chat import IMAGE_MARK, Message, encode, render_prompt
from tlq.inputs.images import decode_image
from tlq.models.processor import load_processor
from tlq.runtime.digest import checkpoint_digest
from tlq.runtime.limit import EndlessError

#: What to send.
_BASE64 = "give the bytes of a PNG or JPEG file, in JSON as base64 without `data:` before it"


class VisionQuestionAnswering(PythonModel):
    """Answer the rows of a table with columns `image` (a PNG or JPEG file's bytes, or their base64) and `question`."""

    def load_context(self, context: Any) -> None:
        config = context.model_config
        checkpoint = _folder(Path(config["checkpoint"]), config.get("relative"))
        if not checkpoint.is_dir():
            raise FileNotFoundError(
                f"{checkpoint} is gone; bring it back with `dvc checkout` or `dvc pull`, or say where it is with "
                'SERVING_MODEL_CONFIG=\'{"checkpoint": "..."}\''
            )
        if checkpoint_digest(checkpoint) != config["digest"]:
            raise ValueError(
                f"{checkpoint} is not the checkpoint that was registered; check out commit {config['commit']} "
                "and run `dvc checkout`"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(checkpoint, config["dtype"], device)
        self.processor = load_processor(checkpoint)
        self.max_new_tokens = int(config["max_new_tokens"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        if model_input.empty:
            raise MlflowException("no rows; give at least one image and question", INVALID_PARAMETER_VALUE)
        columns = zip(model_input["image"], model_input["question"], strict=True)
        rows = [(_file(row, image), _words(row, question)) for row, (image, question) in enumerate(columns)]
        return [self._answer(row, file, question) for row, (file, question) in enumerate(rows)]

    def _answer(self, row: int, file: bytes, question: str) -> str:
        inputs = self._encode(row, _picture(row, file), question)
        with torch.no_grad():
            output = cast(Any, self.model).generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        reply = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(reply, skip_special_tokens=True)).strip()

    def _encode(self, row: int, picture: Image, question: str) -> Any:
        """Inputs of the model; what it cannot take (an image of one pixel's height, a whole book) is refused."""
        message = Message(role="user", content=IMAGE_MARK + question.replace(IMAGE_MARK, "image"))
        try:
            inputs = BatchFeature(encode(self.processor, render_prompt(self.processor, [message]), [picture]))
        except (ValueError, EndlessError) as error:
            raise _refusal(row, f"the model cannot process this image and question: {error}") from error
        length = inputs["input_ids"].shape[1]
        most = self.model.config.get_text_config().max_position_embeddings - self.max_new_tokens
        if length > most:
            raise _refusal(
                row, f"image and question are {length} tokens, more than the {most} that leave room to answer"
            )
        return inputs.to(self.model.device, dtype=self.model.dtype)  # as in the evaluation


def _folder(stated: Path, relative: str | None) -> Path:
    """The checkpoint's folder, also after its project was moved.

    Without an MLflow server this file lies in the project, below `mlruns`.

    Args:
        stated: where the checkpoint was when it was registered.
        relative: the same, relative to its project.
    """
    if stated.is_dir() or relative is None or not stated.match(relative):  # no match: the user says where it is
        return stated
    projects = [parent.parent for parent in Path(__file__).resolve().parents if parent.name == "mlruns"]
    places = [project / relative for project in (*projects, Path.cwd())]
    return next((place for place in places if place.is_dir()), stated)


def _file(row: int, image: Any) -> bytes:
    """The bytes of an image file, from bytes or base64; base64 may be broken into lines."""
    if isinstance(image, str):
        try:
            image = base64.b64decode("".join(image.split()), validate=True)
        except ValueError as error:
            raise _refusal(row, f"column image: not base64 ({error}); {_BASE64}") from error
    if image is None or image == b"" or (isinstance(image, float) and math.isnan(image)):  # a table's null is NaN
        raise _refusal(row, f"column image: empty; {_BASE64}")
    if not isinstance(image, bytes):
        raise _refusal(row, f"column image: of type {type(image).__name__}; {_BASE64}")
    return image


def _picture(row: int, file: bytes) -> Image:
    try:
        return decode_image(file)
    except ValueError as error:
        raise _refusal(row, f"column image: {error}; {_BASE64}") from error


def _words(row: int, question: Any) -> str:
    if not isinstance(question, str) or not question.strip():
        raise _refusal(row, "column question: empty; give a question")
    return question


def _refusal(row: int, reason: str) -> MlflowException:
    """The exception that MLflow's scoring server returns as HTTP 400."""
    return MlflowException(f"row {row}: {reason}", error_code=INVALID_PARAMETER_VALUE)


mlflow.models.set_model(VisionQuestionAnswering())
