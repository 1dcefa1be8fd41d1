"""The registered model as MLflow loads it: a question about an image in, the model's answer out.

MLflow runs this file to build the model (models from code). The checkpoint is not copied into the registry: the
version holds its path and its digest, and refuses to load anything else from that path.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, cast

import mlflow
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from tlq.checkpoint import digest, load_model
from tlq.processor import load_processor
from tlq.samples import chat, decode_image


class VisionQuestionAnswering(PythonModel):
    """Columns `image` (bytes of a PNG or JPEG file, or their base64) and `question`; answers as a list of strings."""

    def load_context(self, context: Any) -> None:
        config = context.model_config
        checkpoint = Path(config["checkpoint"])
        if not checkpoint.is_dir():
            raise FileNotFoundError(f"{checkpoint} is gone; bring it back with `dvc checkout` or `dvc pull`")
        if digest(checkpoint) != config["digest"]:
            raise ValueError(
                f"{checkpoint} is not the checkpoint that was registered; check out commit {config['commit']} "
                "and run `dvc checkout`"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = load_model(checkpoint, config["dtype"], device)
        self.processor = load_processor(checkpoint)
        self.max_new_tokens = int(config["max_new_tokens"])

    def predict(self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> list[str]:
        columns = zip(model_input["image"], model_input["question"], strict=True)
        return [self._answer(image, question) for image, question in columns]

    def _answer(self, image: bytes | str, question: str) -> str:
        try:
            picture = decode_image(base64.b64decode(image, validate=True) if isinstance(image, str) else image)
        except (ValueError, binascii.Error) as error:
            raise MlflowException(f"column image: {error}", error_code=INVALID_PARAMETER_VALUE) from error
        turns = chat([{"role": "user", "content": f"<image>{question}"}])
        prompt = self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = self.processor(text=[prompt], images=[picture], return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            output = cast(Any, self.model).generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        reply = output[0, inputs["input_ids"].shape[1] :]
        return str(self.processor.tokenizer.decode(reply, skip_special_tokens=True)).strip()


mlflow.models.set_model(VisionQuestionAnswering())
