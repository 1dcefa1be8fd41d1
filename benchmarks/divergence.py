"""Measure how far a variant's answer distributions are from full precision, teacher-forced on reference answers.

Accuracy on a few hundred items cannot distinguish good quantizers; these measures can:

- NLL: mean over answer tokens of -log q(token), in nats.
- KL: mean over answer tokens of KL(p || q) = sum over the vocabulary of p (log p - log q), in nats,
  p full precision and q the variant, both given the same prompt and the same preceding answer tokens.

The tokens of an answer include the token that ends the turn, because stopping is part of the answer. The full-precision
run stores log p per answer token; variant runs read it, so that no process holds two models.
"""

import hashlib
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tlq.runtime.digest import update_with_tensor
from tlq.runtime.files import new_file

logger = logging.getLogger(__name__)

# Up to this vocabulary log-probabilities are kept in float32, above in float16.
FLOAT32_VOCABULARY = 32768


class ItemKey(NamedTuple):
    """Task name and row name of an item: the same for every variant."""

    task: str
    doc: str

    def __str__(self) -> str:
        return f"{self.task}/{self.doc}"


@dataclass(frozen=True)
class Divergence:
    """NLL and KL of one item, per answer token in nats; ``kl`` is None without a reference."""

    n_tokens: int
    nll: float
    kl: float | None


class Measured(Protocol):
    """An item that may have been measured."""

    @property
    def divergence(self) -> Divergence | None: ...


M = TypeVar("M", bound=Measured)


class AnswerMeter(Protocol):
    """Measures the divergences of a batch of answers from their log q."""

    def wants(self, key: ItemKey) -> bool:
        """Whether to measure this item's answer."""

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        """Measure answers, given as token ids and log-probabilities [tokens, vocabulary] float32 at each token."""


def nll_per_token(log_q: torch.Tensor, tokens: Sequence[int]) -> float:
    """Mean of -log q(token): log_q [tokens, vocabulary]. Nats."""
    index = torch.tensor(tokens, device=log_q.device).unsqueeze(-1)
    return -log_q.gather(-1, index).double().mean().item()


def kl_per_token(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Mean over tokens of KL(p || q): both [tokens, vocabulary]. Nats, never negative beyond rounding."""
    return (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1).mean().item()


class ReferenceRecorder:
    """Meter of the full-precision run: stores log p in one file per batch, each written to a temporary name first."""

    def __init__(self, folder: Path) -> None:
        """What an earlier process has written is kept, except what does not match its digest, with a warning."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._names: set[str] = set()
        self._files = 0
        for path in sorted(folder.glob("*.safetensors")):
            self._files = int(path.stem.removeprefix("part-")) + 1
            try:
                with safe_open(path, "pt") as file:
                    items = _items_in(file)
                    sound = [key for key in items if _read_item(file, key) is not None]
                if damaged := len(items) - len(sound):
                    logger.warning("%s: %d answers are damaged; they are asked again", path, damaged)
                self._names |= {f"{key}/log_p" for key in sound}
            except SafetensorError as error:
                logger.warning("%s is damaged (%s); its answers are asked again", path, error)
                path.unlink()

    def recorded(self, finished: Mapping[ItemKey, M]) -> dict[ItemKey, M]:
        """The finished items, except measured ones whose log p is not stored."""
        return {key: item for key, item in finished.items() if item.divergence is None or f"{key}/log_p" in self._names}

    def wants(self, key: ItemKey) -> bool:
        return True

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        tensors: dict[str, torch.Tensor] = {}
        digests: dict[str, str] = {}
        for key, (tokens, log_p) in answers.items():
            dtype = torch.float32 if log_p.shape[-1] <= FLOAT32_VOCABULARY else torch.float16
            tensors[f"{key}/log_p"] = log_p.to("cpu", dtype)
            tensors[f"{key}/tokens"] = torch.tensor(tokens, dtype=torch.int32)
            digests[str(key)] = _digest(tensors[f"{key}/log_p"], tensors[f"{key}/tokens"])
        if tensors:
            path = self._folder / f"part-{self._files:05d}.safetensors"
            with new_file(path) as temporary:
                save_file(tensors, temporary, metadata=digests)
            self._files += 1
            self._names |= tensors.keys()
        return {
            key: Divergence(len(tokens), nll_per_token(log_p, tokens), 0.0) for key, (tokens, log_p) in answers.items()
        }


def _digest(log_p: torch.Tensor, tokens: torch.Tensor) -> str:
    """SHA-256 of what the reference holds of one item; the file's metadata has it under the item's key."""
    total = hashlib.sha256()
    update_with_tensor(total, "log_p", log_p)
    update_with_tensor(total, "tokens", tokens)
    return total.hexdigest()


def _items_in(file: Any) -> list[str]:
    """Keys of the items in an open file of the reference."""
    return [name.removesuffix("/log_p") for name in file.keys() if name.endswith("/log_p")]  # noqa: SIM118


def _read_item(file: Any, key: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """log p and tokens of an item; None if they do not match their digest."""
    names = set(file.keys())
    if f"{key}/tokens" not in names:
        return None
    log_p, tokens = file.get_tensor(f"{key}/log_p"), file.get_tensor(f"{key}/tokens")
    return (log_p, tokens) if (file.metadata() or {}).get(key) == _digest(log_p, tokens) else None


class ReferenceReader:
    """Meter of a variant's run: compares with the log p that the full-precision run stored."""

    def __init__(self, folder: Path) -> None:
        self._places: defaultdict[str, list[Path]] = defaultdict(list)
        named: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors"), reverse=True):  # an answer asked again is in a later file
            try:
                with safe_open(path, "pt") as file:
                    named |= dict.fromkeys(file.metadata() or {}, path)
                    for key in _items_in(file):
                        self._places[key].append(path)
            except SafetensorError as error:
                raise ValueError(f"{path} is damaged ({error}); evaluate `full` again") from error
        if lost := sorted(named.keys() - self._places.keys()):
            raise ValueError(f"{named[lost[0]]}: holds no log-probabilities of {lost[0]}; evaluate `full` again")
        if not self._places:
            raise FileNotFoundError(
                f"{folder}: no reference log-probabilities; "
                "evaluate the `full` variant first, with evaluate.divergence on"
            )

    def wants(self, key: ItemKey) -> bool:
        return str(key) in self._places

    def measure(self, answers: Mapping[ItemKey, tuple[Sequence[int], torch.Tensor]]) -> dict[ItemKey, Divergence]:
        return {key: self._compare(key, tokens, log_q) for key, (tokens, log_q) in answers.items()}

    def _compare(self, key: ItemKey, tokens: Sequence[int], log_q: torch.Tensor) -> Divergence:
        log_p, reference_tokens = self._stored(str(key))
        if reference_tokens.tolist() != list(tokens) or log_p.shape[-1] != log_q.shape[-1]:
            raise ValueError(
                f"{key}: the full-precision run tokenized the answer differently or has another vocabulary "
                f"({log_p.shape[-1]} against {log_q.shape[-1]}); evaluate `full` again"
            )
        if log_p.dtype != torch.float32:
            log_p = log_p.float().log_softmax(-1)
        kl = kl_per_token(log_p.to(log_q.device), log_q)
        return Divergence(len(tokens), nll_per_token(log_q, tokens), kl)

    def _stored(self, key: str) -> tuple[torch.Tensor, torch.Tensor]:
        """log p and tokens of an item, from the last file whose copy is sound."""
        for path in self._places[key]:
            with safe_open(path, "pt") as file:
                if (stored := _read_item(file, key)) is not None:
                    return stored
        raise ValueError(f"{self._places[key][0]}: the log-probabilities of {key} are damaged; evaluate `full` again")
