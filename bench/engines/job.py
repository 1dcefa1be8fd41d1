"""What every script of an engine does: read a job, run it, write the result. The standard library alone."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol


class Engine(Protocol):
    """A loaded checkpoint."""

    def reply(self, prompt: dict[str, Any]) -> str:
        """The greedy reply to a prompt."""
        ...

    def log_probabilities(self, prompt: dict[str, Any]) -> list[list[float]]:
        """Natural logarithms of the probabilities of every token, before each token of the prompt's answer."""
        ...

    def generate(self, prompt: dict[str, Any], tokens: int) -> None:
        """Generate exactly so many tokens."""
        ...


def main(load: Callable[[dict[str, Any]], Engine]) -> None:
    """Run the job of the first argument and write its result to the second.

    A job has ``path``, ``prompts`` (``image``, ``text``, ``answer_ids``, ``pieces``; if ``image`` is None, ``ids`` of
    prompt and answer), ``new_tokens`` (0: no replies either) and ``vocabulary``. A result has the fields of ``_run``,
    or ``refused``: what the engine said.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = _run(load, job)
    except Exception as error:  # noqa: BLE001  whatever an engine raises is its answer, and goes into the table
        traceback.print_exc()
        result = {"refused": f"{type(error).__name__}: {error}"}
    Path(sys.argv[2]).write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the threads of some engines never end


def _run(load: Callable[[dict[str, Any]], Engine], job: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    engine = load(job)
    load_seconds = time.perf_counter() - start
    prompts = job["prompts"]
    if not job["new_tokens"]:
        return {"load_seconds": load_seconds, "answers": [_answer(engine, prompt) for prompt in prompts]}
    replies = [engine.reply(prompt) for prompt in prompts]
    log_probabilities = [engine.log_probabilities(prompt) for prompt in prompts]
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        engine.generate(prompts[0], job["new_tokens"])
        seconds.append(time.perf_counter() - start)
    return {
        "load_seconds": load_seconds,
        "replies": replies,
        "log_probabilities": log_probabilities,
        "tokens_per_second": job["new_tokens"] / min(seconds[1:]),  # the first is a warm-up
        "peak_mib": _peak_mib(),
    }


def _answer(engine: Engine, prompt: dict[str, Any]) -> dict[str, Any]:
    """The probabilities of a prompt, or what the engine said instead."""
    try:
        answer = {"log_probabilities": engine.log_probabilities(prompt)}
        if hasattr(engine, "rounded_log_probabilities"):
            answer["bfloat16"] = engine.rounded_log_probabilities(prompt)
        return answer
    except Exception as error:  # noqa: BLE001  as in ``main``: other prompts may have an answer
        traceback.print_exc()
        return {"refused": f"{type(error).__name__}: {error}"}


def _peak_mib() -> float:
    """The largest memory of this process since it began; ``ru_maxrss`` would include the process that started it."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
