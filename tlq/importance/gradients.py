"""Score tokens: how sensitive a loss is to an error on each token, at each linear group.

For token t of a group with output y_t the raw importance is g_t = mean over channels of |dL/dy_t|. L is the
cross-entropy of the answer (TLQ, arXiv 2602.07899) or the error of the block's own rounding (VLMQ, arXiv 2508.03351).
Weights stay frozen: only activations carry gradients. Decoder layers are loaded one at a time: the forward pass keeps
the input of each layer, the backward pass computes each layer once more (gradient checkpointing).
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

from tlq.importance.pool import GroupKey, Importance, pool_indices
from tlq.models.architectures import EXPERTS, check_linears, get_linear
from tlq.models.decoder import LayerCalls, enter_decoder, run_layer
from tlq.models.stored import check_finite, source_digest
from tlq.models.streaming import LayeredModel, StreamedModel
from tlq.parallel import Ranks
from tlq.quantization.formats import Scheme, WeightQuantizer
from tlq.runtime.activations import Activations, HostMemory, host_memory
from tlq.runtime.digest import calibration_data_digest
from tlq.runtime.files import new_file
from tlq.runtime.memory import release_freed_memory
from tlq.runtime.resume import ResumeState, package_versions
from tlq.samples import Batch

#: Least number of passes over the model's weights: an interruption loses the scores of one pass.
MIN_PASSES = 4


@dataclass(frozen=True)
class BatchScores:
    """Raw importance of the micro-batch at index ``batch``: (layer, group name) -> [batch, time], padding undefined."""

    batch: int
    values: dict[GroupKey, Tensor]


def score_tokens(
    model: LayeredModel, batches: Sequence[Batch], loss: Loss | None = None, memory: HostMemory | None = None
) -> Importance:
    """Raw importance of every token of the pool, by layer and linear group.

    Args:
        loss: the answer's cross-entropy if not given.

    Raises: as ``score_batches``.
    """
    return to_pool(score_batches(model, batches, range(len(batches)), loss or AnswerLoss(), memory), batches)


def to_pool(scores: Iterable[BatchScores], batches: Sequence[Batch]) -> Importance:
    """The scores of all micro-batches as flat arrays over the pool, without padding, sorted by key."""
    indices = pool_indices(batches)
    tokens = sum(map(len, indices))
    importance: Importance = {}
    for scored in scores:
        valid = batches[scored.batch].valid
        for key, values in scored.values.items():
            if key not in importance:
                importance[key] = np.empty(tokens, np.float32)
            importance[key][indices[scored.batch]] = values[valid].numpy()
    return dict(sorted(importance.items()))


def score_resumably(
    model: StreamedModel,
    batches: Sequence[Batch],
    loss: Loss,
    state: ResumeState,
    ranks: Ranks,
    memory: HostMemory | None = None,
) -> Importance:
    """``score_tokens`` with the micro-batches divided among ranks; ``state`` keeps each scored micro-batch.

    Args:
        state: locked by the caller, who removes it after saving the scores.

    Returns:
        All scores, on every rank.

    Raises:
        ValueError: ``state`` was begun with other samples, another model or another loss. Others as ``score_batches``.
    """
    if ranks.leads:
        state.begin(
            {
                "model": source_digest(model.folder, check_finite),
                "dtype": str(model.dtype),
                "data": calibration_data_digest([batch.digest for batch in batches], {}),
                "loss": repr(loss),
                "versions": package_versions(),
            }
        )
    ranks.barrier()
    missing = [index for index in ranks.assigned(len(batches)) if state.report(index) is None]
    memory = memory or host_memory(state.folder)
    for scored in score_batches(model, batches, missing, loss, memory, show=ranks.leads):
        tensors = {f"{layer} {group}": values.contiguous() for (layer, group), values in scored.values.items()}
        with new_file(state.part(scored.batch)) as temporary:
            save_file(tensors, temporary)
        state.finish(scored.batch)
    ranks.barrier()
    return to_pool((_read_part(state.part(index), index) for index in range(len(batches))), batches)


def _read_part(path: Path, batch: int) -> BatchScores:
    values = {}
    for name, tensor in load_file(path).items():
        layer, group = name.split()
        values[int(layer), group] = tensor
    return BatchScores(batch, values)


def score_batches(
    model: LayeredModel,
    batches: Sequence[Batch],
    indices: Sequence[int],
    loss: Loss,
    memory: HostMemory | None = None,
    show: bool = True,
) -> Iterator[BatchScores]:
    """Raw importance of the micro-batches at ``indices``, in order.

    One pass over the model's weights scores as many micro-batches as fit the host's memory with their hidden states at
    every layer. The scores of a micro-batch do not depend on which others share its pass.

    Raises:
        ValueError: the decoder layers do not consist of the linears of the architecture's row.
        FloatingPointError: a loss or a gradient is not finite; the message names the sample or the layer.
    """
    check_linears(model.skeleton, model.architecture)
    model.skeleton.requires_grad_(False)
    memory = memory or host_memory()
    with tqdm(total=len(indices), desc="importance", unit="batch", disable=not show) as bar:
        for one_pass in _passes(model, batches, indices, memory.budget):
            yield from _score_pass(model, [batches[index] for index in one_pass], one_pass, loss, memory)
            bar.update(len(one_pass))


def bytes_per_token(model: LayeredModel) -> int:
    """Bytes of hidden states that scoring keeps per token: the inputs of all layers and the last layer's output."""
    text = model.skeleton.config.get_text_config()
    return int((text.num_hidden_layers + 1) * text.hidden_size * model.dtype.itemsize)


def _passes(
    model: LayeredModel, batches: Sequence[Batch], indices: Sequence[int], budget: int
) -> Iterator[Sequence[int]]:
    """Micro-batches to score in one pass: as many as fit ``budget`` bytes, at least one.

    A pass has at most 1 / MIN_PASSES of all ``batches``, because its scores are known only when it ends: an
    interruption loses no more than one pass. More passes would read the model's weights more often; therefore a rank
    with fewer micro-batches makes fewer passes of the same size.
    """
    most = -(-len(batches) // MIN_PASSES)
    per_token = bytes_per_token(model)
    one_pass: list[int] = []
    size = 0
    for index in indices:
        needed = batches[index].valid.numel() * per_token
        if one_pass and (size + needed > budget or len(one_pass) == most):
            yield one_pass
            one_pass, size = [], 0
        one_pass.append(index)
        size += needed
    if one_pass:
        yield one_pass


def _score_pass(
    model: LayeredModel, batches: Sequence[Batch], indices: Sequence[int], loss: Loss, memory: HostMemory
) -> list[BatchScores]:
    with model.outside() as entered:
        calls = enter_decoder(entered, model.architecture, batches, model.device)
    resident = ResidentBatches(model, batches, calls, memory)
    with closing(resident):
        scores = [BatchScores(index, {}) for index in indices]
        for layer, position, gradients in loss.gradients(resident):
            for group, values in gradients.items():
                if not torch.isfinite(values[batches[position].valid]).all():
                    raise FloatingPointError(
                        f"layer {layer}, group {group}: gradient is not finite; score in float32 or leave the sample "
                        "out"
                    )
                scores[position].values[layer, group] = values
    return scores


class ResidentBatches:
    """Micro-batches of one pass, whose hidden states at every decoder layer are kept.

    Attributes:
        inputs: per decoder layer, its input [batch, time, hidden] of every micro-batch; the last entry is the output of
            the last layer.
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
        """Indices of the decoder layers, in forward order."""
        return range(len(self.model.architecture.decoder_layers(self.model.skeleton)))

    @torch.no_grad()
    def forward(self, index: int, layer: nn.Module) -> None:
        """Append the output of layer ``index`` for every micro-batch."""
        self.inputs.append(
            self._activations(
                call.next_input(index, run_layer(layer, self.inputs[index][position], call.kwargs[index]))
                for position, call in enumerate(self.calls)
            )
        )

    def recompute(self, index: int, position: int, layer: nn.Module) -> tuple[Tensor, Tensor, dict[str, GroupOutputs]]:
        """Layer ``index`` once more with an autograd graph, for the micro-batch at ``position``.

        Returns:
            its input, its output, and group name -> outputs of the group's linears. ``EXPERTS`` is the name of the
            output of all experts of the layer together.
        """
        hidden = self.inputs[index][position].detach().requires_grad_()
        outputs: dict[str, GroupOutputs] = {}
        handles = []

        def observe(name: str, path: str, expert: Any = None) -> None:
            own = outputs.setdefault(name, GroupOutputs([]))

            def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
                own.outputs.append(output)
                own.tokens = None if expert is None else expert.tokens

            handles.append(layer.get_submodule(path).register_forward_hook(keep))

        for group in self.model.architecture.groups[index]:
            if group.experts is not None and EXPERTS not in outputs:
                observe(EXPERTS, group.experts)
            for path in group.linears:
                observe(group.name, path, layer.get_submodule(group.block) if group.experts else None)
        try:
            with torch.enable_grad(), _deterministic():
                output = run_layer(layer, hidden, self.calls[position].kwargs[index])
        finally:
            for handle in handles:
                handle.remove()
        return hidden, output, outputs

    def close(self) -> None:
        """Release the memory of all hidden states."""
        for states in self.inputs:
            states.clear()
        release_freed_memory()


@dataclass
class GroupOutputs:
    """Outputs [tokens, out] of the linears of a group in a pass; none of an expert that no token was routed to.

    Attributes:
        tokens: which tokens of the micro-batch they are, for a group of an expert; None means all.
    """

    outputs: list[Tensor]
    tokens: Tensor | None = None

    def importance(self, gradients: Iterator[Tensor], shape: torch.Size) -> Tensor:
        """g_t of every token, in the ``shape`` [batch, time] of the micro-batch; 0 for tokens that are not here.

        Args:
            gradients: those with respect to the outputs come first.
        """
        if not self.outputs:
            return torch.zeros(shape)
        total = torch.stack([next(gradients).float().abs().sum(-1) for _ in self.outputs]).sum(0)
        mean = total / sum(each.shape[-1] for each in self.outputs)
        if self.tokens is not None:
            mean = torch.zeros(shape.numel(), device=mean.device).index_copy_(0, self.tokens, mean)
        return mean.reshape(shape).cpu()


#: What ``Loss.gradients`` yields: layer, position of the micro-batch in the pass, group name -> g_t [batch, time].
LayerGradients = tuple[int, int, dict[str, Tensor]]


class Loss(Protocol):
    """A loss whose gradient is the importance of a token."""

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        """g_t of every layer, micro-batch and group, in any order."""
        ...


@dataclass(frozen=True)
class AnswerLoss:
    """The cross-entropy of the answer (TLQ)."""

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
        with resident.model.head():
            output_gradients = [self._last_gradient(resident, position) for position in range(len(resident.batches))]
        for index, layer in resident.model.layers(resident.order[::-1]):
            for position, output_gradient in enumerate(output_gradients):
                hidden, output, outputs = resident.recompute(index, position, layer)
                output_gradients[position], values = _gradients(output, output_gradient, hidden, outputs)
                yield index, position, values

    def _last_gradient(self, resident: ResidentBatches, position: int) -> Tensor:
        """Gradient of the loss with respect to the last layer's output, [batch, time, hidden]."""
        hidden = resident.inputs[-1][position].detach().requires_grad_()
        batch = resident.batches[position]
        with torch.enable_grad(), _deterministic():
            loss = answer_loss(_answer_logits(resident.model, hidden, batch), batch)
            (gradient,) = torch.autograd.grad(loss, [hidden])
        return gradient


@dataclass(frozen=True)
class BlockLoss:
    """The squared error of each decoder layer's output when its own weights are rounded to nearest (VLMQ).

    Attributes:
        scheme: the number format of the rounded weights.
        checkpoint_dtype: dtype of the checkpoint.
    """

    scheme: Scheme
    checkpoint_dtype: torch.dtype

    def gradients(self, resident: ResidentBatches) -> Iterator[LayerGradients]:
        architecture = resident.model.architecture
        for index, layer in resident.model.layers(resident.order):
            resident.forward(index, layer)
            with torch.no_grad(), self._rounded([get_linear(layer, path) for path in architecture.linears(index)]):
                for position, call in enumerate(resident.calls):
                    hidden, output, outputs = resident.recompute(index, position, layer)
                    difference = call.next_input(index, output.detach()) - resident.inputs[index + 1][position]
                    difference[~resident.batches[position].valid.to(difference.device)] = 0
                    yield index, position, _gradients(output, 2 * difference, hidden, outputs)[1]

    @contextmanager
    def _rounded(self, linears: Sequence[nn.Linear]) -> Iterator[None]:
        quantizer = WeightQuantizer(self.scheme, self.checkpoint_dtype)
        originals = [linear.weight.data for linear in linears]
        try:
            for linear in linears:
                linear.weight.data = quantizer.fake_quantize(linear.weight.data).to(linear.weight.dtype)
            yield
        finally:
            for linear, original in zip(linears, originals, strict=True):
                linear.weight.data = original


@contextmanager
def _deterministic() -> Iterator[None]:
    """Use torch's deterministic algorithms: on a GPU, attention's backward pass otherwise adds in the order of threads.

    A run that continues after a crash would draw other tokens than the run that crashed. The forward pass selects the
    attention kernel, so it needs this context too. ``CUBLAS_WORKSPACE_CONFIG`` keeps a value that is set already.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def _gradients(
    output: Tensor, output_gradient: Tensor, hidden: Tensor, outputs: dict[str, GroupOutputs]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gradient with respect to ``hidden``, and g_t [batch, time] of every group: mean over channels of |dL/dy_t|."""
    linear_outputs = [each for group in outputs.values() for each in group.outputs]
    with _deterministic():
        input_gradient, *rest = torch.autograd.grad(output, [hidden, *linear_outputs], output_gradient)
    gradients = iter(rest)
    return input_gradient, {name: group.importance(gradients, hidden.shape[:-1]) for name, group in outputs.items()}


def _answer_logits(model: LayeredModel, hidden: Tensor, batch: Batch) -> Tensor:
    """Logits [answer tokens, vocabulary] that predict the answer's tokens, from the last layer's output."""
    before_answer = batch.is_answer[:, 1:].to(hidden.device)
    normed = model.skeleton.get_submodule(model.architecture.final_norm)(hidden[:, :-1][before_answer])
    logits: Tensor = model.skeleton.get_output_embeddings()(normed)
    text = model.skeleton.config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1 / (getattr(text, "logits_scaling", None) or 1)
    cap = getattr(text, "final_logit_softcapping", None)
    logits = logits if scale == 1 else logits * scale
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
