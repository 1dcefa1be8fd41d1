"""Measure how far a variant's answer distributions are from full precision, teacher-forced on reference answers.

Accuracy on a few hundred items cannot distinguish good quantizers; these measures can:

- NLL: mean over answer tokens of -log q(token), in nats.
- KL: mean over answer tokens of KL(p || q) = sum over the vocabulary of p (log p - log q), in nats,
  p full precision and q the variant, both given the same prompt and the same preceding answer tokens.

The tokens of an answer include the token that ends the turn, because stopping is part of the answer. The full-precision
run stores log p per answer token; variant runs read it, so that no process holds two models.
"""

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
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

#: Name of the metadata of a file of the reference: the digests of its items by their keys, as JSON.
_DIGESTS = "digests"


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
        self._stored: dict[Path, set[str]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, "pt") as file:
                    items = _items_in(file)
                    sound = [key for key in items if _read_item(file, key) is not None]
                if damaged := len(items) - len(sound):
                    logger.warning("%s: %d answers are damaged; they are asked again", path, damaged)
                self._stored[path] = set(sound)
            except SafetensorError as error:
                logger.warning("%s is damaged (%s); its answers are asked again", path, error)
                path.unlink()

    def recorded(self, finished: Mapping[ItemKey, M]) -> dict[ItemKey, M]:
        """The finished items, except measured ones whose log p is not stored.

        A file without any of them is removed: an earlier process ended between writing it and finishing its items. They
        are asked again, and a second copy would give the reference other files than those of an undisturbed run.
        """
        measured = {str(key) for key, item in finished.items() if item.divergence is not None}
        for path in [path for path, keys in self._stored.items() if not keys & measured]:
            path.unlink()
            del self._stored[path]
        stored = {key for keys in self._stored.values() for key in keys}
        return {key: item for key, item in finished.items() if item.divergence is None or str(key) in stored}

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
            path = next(path for path in self._places() if path not in self._stored)
            with new_file(path) as temporary:
                # One text: safetensors writes several in another order every time.
                save_file(tensors, temporary, metadata={_DIGESTS: json.dumps(digests)})
            self._stored[path] = set(digests)
        return {
            key: Divergence(len(tokens), nll_per_token(log_p, tokens), 0.0) for key, (tokens, log_p) in answers.items()
        }

    def _places(self) -> Iterator[Path]:
        """Names of the files, in the order in which they are given; one that is gone is given again."""
        return (self._folder / f"part-{number:05d}.safetensors" for number in count())


def _digest(log_p: torch.Tensor, tokens: torch.Tensor) -> str:
    """SHA-256 of what the reference holds of one item."""
    total = hashlib.sha256()
    update_with_tensor(total, "log_p", log_p)
    update_with_tensor(total, "tokens", tokens)
    return total.hexdigest()


def _digests_in(file: Any) -> dict[str, str]:
    """Digests of the items in an open file of the reference; none if they are damaged."""
    metadata: dict[str, str] = file.metadata() or {}
    if _DIGESTS not in metadata:
        return metadata  # a file of an earlier release, with an entry for each item
    try:
        found = json.loads(metadata[_DIGESTS])
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _items_in(file: Any) -> list[str]:
    """Keys of the items in an open file of the reference."""
    return [name.removesuffix("/log_p") for name in file.keys() if name.endswith("/log_p")]  # noqa: SIM118


def _read_item(file: Any, key: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """log p and tokens of an item; None if they do not match their digest."""
    names = set(file.keys())
    if f"{key}/tokens" not in names:
        return None
    log_p, tokens = file.get_tensor(f"{key}/log_p"), file.get_tensor(f"{key}/tokens")
    return (log_p, tokens) if _digests_in(file).get(key) == _digest(log_p, tokens) else None


class ReferenceReader:
    """Meter of a variant's run: compares with the log p that the full-precision run stored."""

    def __init__(self, folder: Path) -> None:
        self._places: defaultdict[str, list[Path]] = defaultdict(list)
        named: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors"), reverse=True):  # an answer asked again is in a later file
            try:
                with safe_open(path, "pt") as file:
                    named |= dict.fromkeys(_digests_in(file), path)
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
