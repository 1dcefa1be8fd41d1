"""llama.cpp, through the HTTP server of the package xllamacpp."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import xllamacpp
from job import main


class LlamaCpp:
    """A folder with `model.gguf` and `mmproj.gguf`."""

    def __init__(self, job: dict[str, Any]) -> None:
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(Path(job["path"]) / "model.gguf")
        parameters.mmproj.path = str(Path(job["path"]) / "mmproj.gguf")
        parameters.n_ctx = 512
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.cpuparams.n_threads = 2
        self.vocabulary = job["vocabulary"]
        self.server = xllamacpp.Server(parameters)
        # The image, with its start and end, takes the place of this mark.
        self.mark = self._request("/props")["media_marker"]

    def _request(self, path: str, content: dict[str, Any] | None = None) -> Any:
        data = None if content is None else json.dumps(content).encode()
        request = Request(self.server.listening_address + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise RuntimeError(error.read().decode()) from error

    def _complete(self, prompt: dict[str, Any], text: str, **settings: Any) -> Any:
        """Text is given as the ids that the prompt has, up to ``answer`` of its answer."""
        if prompt["image"] is None:
            end = len(prompt["ids"]) - len(prompt["answer_ids"]) + settings.pop("answer", 0)
            return self._request("/completion", {"prompt": prompt["ids"][:end], "temperature": 0, **settings})
        settings.pop("answer", None)
        image = base64.b64encode(Path(prompt["image"]).read_bytes()).decode()
        request = {"prompt_string": text.replace(prompt["image_text"], self.mark), "multimodal_data": [image]}
        return self._request("/completion", {"prompt": request, "temperature": 0, **settings})

    def reply(self, prompt: dict[str, Any]) -> str:
        return str(self._complete(prompt, prompt["text"], n_predict=16)["content"])

    def log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        rows = []
        for number in range(len(prompt["answer_ids"])):
            text = prompt["text"] + "".join(prompt["pieces"][:number])
            # A reply that ends at once has no probabilities: an ordinary token is forced, which does not change them.
            forced = {"logit_bias": [[prompt["answer_ids"][0], 1000.0]]}
            found = self._complete(prompt, text, answer=number, n_predict=1, n_probs=self.vocabulary, **forced)
            (position,) = found["completion_probabilities"]
            row = {each["id"]: each["logprob"] for each in position["top_logprobs"]}
            rows.append([max(row[token], -100.0) for token in range(self.vocabulary)])
        return rows

    def generate(self, prompt: dict[str, Any], tokens: int) -> None:
        found = self._complete(prompt, prompt["text"], n_predict=tokens, ignore_eos=True)
        assert found["tokens_predicted"] == tokens


if __name__ == "__main__":
    main(LlamaCpp)
