"""Score tokens: how much a loss feels an error on each token, at each linear group.

For token t of a group with output y_t the raw importance is g_t = mean over channels of |dL/dy_t|. L is the
cross-entropy of the answer (TLQ, arXiv 2602.07899) or the error of the block's own rounding (VLMQ, arXiv 2508.03351).
Weights stay frozen: only activations carry gradients. Decoder layers come one at a time: forward keeps what each is
called with, backward computes each once more.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from tlq.importance.weighting import Importance
from tlq.models.architectures import check_linears, get_linear
from tlq.models.decoder import LayerCalls, enter_decoder, run_layer
from tlq.models.streaming import LayeredModel, StreamedModel
from tlq.parallel import Ranks
from tlq.quantization.formats import Scheme, fake_quantize
from tlq.runtime.activations import Activations, HostMemory, host_memory
from tlq.runtime.files import new_file
from tlq.runtime.memory import give_back
from tlq.runtime.resume import WorkFolder, data_digest, model_digest, versions
from tlq.samples import Batch

WAVES = 4


@dataclass(frozen=True)
class BatchScores:
    """Raw importance of one micro-batch: (layer, group name) -> [batch, time]; padding holds anything."""

    number: int
    values: dict[tuple[int, str], Tensor]


def score_tokens(
    model: LayeredModel,
    batches: Sequence[Batch],
    samples: int,
    loss: Loss | None = None,
    memory: HostMemory | None = None,
) -> Importance:
    """Raw importance of every token of every sample, by layer and linear group.

    Args and errors: as ``score_batches``.
    """
    found = score_batches(model, batches, range(len(batches)), loss or AnswerLoss(), memory)
    return by_sample(found, batches, samples)


def by_sample(scores: Iterable[BatchScores], batches: Sequence[Batch], samples: int) -> Importance:
    """Scores of micro-batches as scores of samples, padding removed."""
    importance: Importance = {}
    for part in scores:
        batch = batches[part.number]
        for key, values in part.values.items():
            per_sample = importance.setdefault(key, [np.empty(0, np.float32)] * samples)
            for row, sample in enumerate(batch.samples):
                per_sample[sample] = values[row, batch.valid[row]].numpy()
    return dict(sorted(importance.items()))


def score_resumably(
    model: StreamedModel,
    batches: Sequence[Batch],
    samples: int,
    loss: Loss,
    work: WorkFolder,
    ranks: Ranks,
    memory: HostMemory | None = None,
) -> Importance:
    """``score_tokens`` with the micro-batches dealt to ranks, each kept in ``work`` as soon as it is scored.

    Args:
        work: locked by the caller, who removes it once the scores are safe.

    Returns:
        All scores, on every rank.

    Raises:
        ValueError: ``work`` was begun with other samples, another model or another loss. Others as ``score_batches``.
    """
    if ranks.leads:
        work.begin(
            {
                "model": model_digest(model.folder),
                "dtype": str(model.dtype),
                "data": data_digest(batches, {}),
                "loss": repr(loss),
                "versions": versions(),
            }
        )
    ranks.barrier()
    missing = [number for number in ranks.assigned(len(batches)) if not work.part(number).exists()]
    memory = memory or host_memory(work.folder)
    for part in score_batches(model, batches, missing, loss, memory, show=ranks.leads):
        tensors = {f"{layer} {group}": values.contiguous() for (layer, group), values in part.values.items()}
        with new_file(work.part(part.number)) as temporary:
            save_file(tensors, temporary)
    ranks.barrier()
    return by_sample((_read_part(work.part(number), number) for number in range(len(batches))), batches, samples)


def _read_part(path: Path, number: int) -> BatchScores:
    values = {}
    for name, tensor in load_file(path).items():
        layer, group = name.split()
        values[int(layer), group] = tensor
    return BatchScores(number, values)


def score_batches(
    model: LayeredModel,
    batches: Sequence[Batch],
    numbers: Sequence[int],
    loss: Loss,
    memory: HostMemory | None = None,
    show: bool = True,
) -> Iterator[BatchScores]:
    """Raw importance of the micro-batches ``numbers``, each as soon as it is known.

    As many micro-batches at a time as their hidden states at every layer fit the host's memory: forward keeps the
    input of every layer, backward computes each layer once more. A micro-batch's scores do not depend on which others
    it is scored with.

    Raises:
        ValueError: the decoder is not made of the linears of its row.
        FloatingPointError: a loss or a gradient is not finite; the message names the sample or the layer.
    """
    check_linears(model.skeleton, model.architecture)
    model.skeleton.requires_grad_(False)
    memory = memory or host_memory()
    with tqdm(total=len(numbers), desc="importance", unit="batch", disable=not show) as bar:
        for wave in _waves(model, batches, numbers, memory.budget):
            yield from _score_wave(model, [batches[number] for number in wave], wave, loss, memory)
            bar.update(len(wave))


def bytes_per_token(model: LayeredModel) -> int:
    """Hidden states that scoring keeps for a token: the inputs of all layers, and what comes behind the last."""
    text = model.skeleton.config.get_text_config()
    return int((text.num_hidden_layers + 1) * text.hidden_size * model.dtype.itemsize)


def _waves(
    model: LayeredModel, batches: Sequence[Batch], numbers: Sequence[int], budget: int
) -> Iterator[Sequence[int]]:
    """Micro-batches to score together: as many as fit ``budget`` bytes, at least one, at most a quarter of ``batches``.

    The scores of a wave are known when it ends: an interruption loses no more than one. More waves would read the
    model's weights more often; so a rank that has fewer micro-batches to score has fewer waves, not smaller ones.
    """
    most = -(-len(batches) // WAVES)
    per_token = bytes_per_token(model)
    wave: list[int] = []
    size = 0
    for number in numbers:
        needed = batches[number].valid.numel() * per_token
        if wave and (size + needed > budget or len(wave) == most):
            yield wave
            wave, size = [], 0
        wave.append(number)
        size += needed
    if wave:
        yield wave


def _score_wave(
    model: LayeredModel, batches: Sequence[Batch], numbers: Sequence[int], loss: Loss, memory: HostMemory
) -> list[BatchScores]:
    with model.outside() as entered:
        calls = enter_decoder(entered, model.architecture, batches, model.device)
    wave = Wave(model, batches, calls, memory)
    with closing(wave):
        scores = [BatchScores(number, {}) for number in numbers]
        for index, number, gradients in loss.gradients(wave):
            for group, values in gradients.items():
                if not torch.isfinite(values[batches[number].valid]).all():
                    raise FloatingPointError(
                        f"layer {index}, group {group}: gradient is not finite; run importance in float32 "
                        "(model.dtype) or drop the sample"
                    )
                scores[number].values[index, group] = values
    return scores


class Wave:
    """Micro-batches that are scored together.

    Attributes:
        inputs: per decoder layer, its input [batch, time, hidden] of every micro-batch; one entry more for what comes
            behind the last layer.
    """

    def __init__(
        self, model: LayeredModel, batches: Sequence[Batch], calls: Sequence[LayerCalls], memory: HostMemory
    ) -> None:
        self.model, self.batches, self.calls = model, batches, calls
        self._memory = memory
        self.inputs = [self._activations(call.take_hidden_states() for call in calls)]

    def _activations(self, values: Iterable[Tensor]) -> Activations:
        return Activations(self._memory, self.model.device, values)

    @property
    def order(self) -> range:
        """Numbers of the decoder layers."""
        return range(len(self.model.architecture.decoder_layers(self.model.skeleton)))

    @torch.no_grad()
    def forward(self, index: int, layer: nn.Module) -> None:
        """Advance every micro-batch past layer ``index``."""
        self.inputs.append(
            self._activations(
                call.next_input(index, run_layer(layer, self.inputs[index][number], call.kwargs[index]))
                for number, call in enumerate(self.calls)
            )
        )

    def watched(self, index: int, number: int, layer: nn.Module) -> tuple[Tensor, Tensor, dict[str, list[Tensor]]]:
        """Layer ``index`` once more, with a graph: its input, its output, and the outputs of each group's linears."""
        hidden = self.inputs[index][number].detach().requires_grad_()
        outputs: dict[str, list[Tensor]] = {group.name: [] for group in self.model.architecture.groups}
        handles = []
        for group in self.model.architecture.groups:
            for path in group.linears:

                def note(_module: nn.Module, _args: Any, output: Tensor, name: str = group.name) -> None:
                    outputs[name].append(output)

                handles.append(layer.get_submodule(path).register_forward_hook(note))
        try:
            with torch.enable_grad(), _repeatable():
                output = run_layer(layer, hidden, self.calls[number].kwargs[index])
        finally:
            for handle in handles:
                handle.remove()
        return hidden, output, outputs

    def close(self) -> None:
        """Give back the memory of all hidden states."""
        for states in self.inputs:
            states.clear()
        give_back()


#: What ``Loss.gradients`` yields: layer, number in the wave, group name -> g_t [batch, time].
LayerGradients = tuple[int, int, dict[str, Tensor]]


class Loss(Protocol):
    """A loss whose gradient tells how much a token matters."""

    def gradients(self, wave: Wave) -> Iterator[LayerGradients]:
        """g_t of every layer, micro-batch and group, in any order."""
        ...


@dataclass(frozen=True)
class AnswerLoss:
    """The cross-entropy of the answer (TLQ)."""

    def gradients(self, wave: Wave) -> Iterator[LayerGradients]:
        for index, layer in wave.model.layers(wave.order):
            wave.forward(index, layer)
        with wave.model.head():
            behind = [self._behind(wave, number) for number in range(len(wave.batches))]
        for index, layer in wave.model.layers(wave.order[::-1]):
            for number, gradient in enumerate(behind):
                hidden, output, outputs = wave.watched(index, number, layer)
                behind[number], values = _gradients(output, gradient, hidden, outputs)
                yield index, number, values

    def _behind(self, wave: Wave, number: int) -> Tensor:
        """Gradient of the loss with respect to the last layer's output, [batch, time, hidden]."""
        hidden = wave.inputs[-1][number].detach().requires_grad_()
        with torch.enable_grad(), _repeatable():
            loss = answer_loss(_answer_logits(wave.model, hidden, wave.batches[number]), wave.batches[number])
            (gradient,) = torch.autograd.grad(loss, [hidden])
        return gradient


@dataclass(frozen=True)
class BlockLoss:
    """The squared error of each decoder layer's output when its own weights are rounded to nearest (VLMQ).

    Attributes:
        scheme: what they are rounded to.
        checkpoint_dtype: dtype of the checkpoint.
    """

    scheme: Scheme
    checkpoint_dtype: torch.dtype

    def gradients(self, wave: Wave) -> Iterator[LayerGradients]:
        architecture = wave.model.architecture
        for index, layer in wave.model.layers(wave.order):
            wave.forward(index, layer)
            with torch.no_grad(), self._rounded([get_linear(layer, path) for path in architecture.linears]):
                for number, call in enumerate(wave.calls):
                    hidden, output, outputs = wave.watched(index, number, layer)
                    difference = call.next_input(index, output.detach()) - wave.inputs[index + 1][number]
                    difference[~wave.batches[number].valid.to(difference.device)] = 0
                    yield index, number, _gradients(output, 2 * difference, hidden, outputs)[1]

    @contextmanager
    def _rounded(self, linears: Sequence[nn.Linear]) -> Iterator[None]:
        originals = [linear.weight.data for linear in linears]
        try:
            for linear in linears:
                rounded = fake_quantize(linear.weight.data, self.scheme, self.checkpoint_dtype)
                linear.weight.data = rounded.to(linear.weight.dtype)
            yield
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.data = original


@contextmanager
def _repeatable() -> Iterator[None]:
    """The same bits in every run: on a GPU, attention's backward pass otherwise adds up in whatever order threads end.

    A run that goes on after a crash would draw other tokens than the one that crashed. The forward pass chooses how
    attention is computed, so it belongs inside. The environment keeps what torch asks for there.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _gradients(
    output: Tensor, behind: Tensor, hidden: Tensor, outputs: dict[str, list[Tensor]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient with respect to ``hidden``, and g_t [batch, time] of every group: mean over channels of |dL/dy_t|."""
    watched = [each for group in outputs.values() for each in group]
    with _repeatable():
        before, *found = torch.autograd.grad(output, [hidden, *watched], behind)
    gradients = iter(found)
    values = {}
    for name, group in outputs.items():
        total = torch.stack([next(gradients).float().abs().sum(-1) for _ in group]).sum(0)
        values[name] = (total / sum(each.shape[-1] for each in group)).cpu()
    return before, values


def _answer_logits(model: LayeredModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Logits [answer tokens, vocabulary] of the tokens that the loss is taken on, from the last layer's output."""
    before_answer = batch.is_answer[:, 1:].to(hidden.device)
    normed = model.skeleton.get_submodule(model.architecture.final_norm)(hidden[:, :-1][before_answer])
    logits: Tensor = model.skeleton.get_output_embeddings()(normed)
    cap = getattr(model.skeleton.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def answer_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy in nats: mean over each sample's answer tokens, summed over samples.

    Args:
        logits: [answer tokens, vocabulary], the predictions of the answers' tokens, row by row of the batch.

    Raises:
        FloatingPointError: the loss of a sample is not finite.
    """
    mask = batch.is_answer[:, 1:].to(logits.device)
    targets = batch.input_ids[:, 1:].to(logits.device)[mask]
    per_token = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    losses = torch.zeros(mask.shape, device=logits.device).masked_scatter(mask, per_token)
    per_sample = losses.sum(1) / mask.sum(1)
    if not torch.isfinite(per_sample).all():
        row = int((~torch.isfinite(per_sample)).nonzero()[0])
        raise FloatingPointError(
            f"sample number {batch.samples[row]}: its loss is not finite; check the model's weights and dtype"
        )
    return per_sample.sum()
