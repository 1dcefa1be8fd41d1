"""Score tokens: how sensitive a loss is to an error on each token, at each linear group.

For token t of a group with output y_t the raw importance is g_t = mean over channels of |dL/dy_t|. L is the
cross-entropy of the answer (TLQ, arXiv 2602.07899) or the error of the block's own rounding (VLMQ, arXiv 2508.03351).
Weights stay frozen: only activations carry gradients. Where the model and the graph of a micro-batch fit the device,
it is scored in one forward and one backward pass. Elsewhere decoder layers are loaded one at a time: the forward pass
keeps the input of each layer, the backward pass computes each layer once more (gradient checkpointing).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from tlq.importance.losses import AnswerLoss, Loss, ResidentBatches
from tlq.importance.pool import GroupKey, Importance, pool_indices
from tlq.models.architectures import check_linears
from tlq.models.decoder import enter_decoder
from tlq.models.reading import check_finite
from tlq.models.sizes import ActivationSizes, ModelSizes
from tlq.models.stored import source_digest
from tlq.models.streaming import LayeredModel, StreamedModel
from tlq.parallel import Ranks
from tlq.runtime.activations import HostMemory, host_memory
from tlq.runtime.digest import calibration_data_digest
from tlq.runtime.files import new_file
from tlq.runtime.memory import device_memory, processes_here
from tlq.runtime.resume import ResumeState, package_versions
from tlq.samples import Batch

logger = logging.getLogger(__name__)

#: Least number of passes over the model's weights: an interruption loses the scores of one pass.
MIN_PASSES = 4


@dataclass(frozen=True)
class BatchScores:
    """Raw importance of the micro-batch at index ``batch``: (layer, group name) -> [tokens], row by row, no padding."""

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
        for key, values in scored.values.items():
            if key not in importance:
                importance[key] = np.empty(tokens, np.float32)
            importance[key][indices[scored.batch]] = values.numpy()
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
                "values": "[tokens]",  # parts of a version that kept [batch, time] are refused
                "versions": package_versions(),
            }
        )
    ranks.barrier()
    missing = [index for index in ranks.assigned(len(batches)) if state.report(index) is None]
    memory = memory or host_memory(state.folder)
    for scored in score_batches(model, batches, missing, loss, memory, show=ranks.leads):
        tensors = {f"{layer} {group}": values for (layer, group), values in scored.values.items()}
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
    left = list(indices)
    with tqdm(total=len(indices), desc="importance", unit="batch", disable=not show) as bar:
        if left and loss.keeps_graph and keeps_graph(model, batches):
            try:
                with model.whole() as resident:
                    while left:
                        yield from _score_pass(resident, batches, left[:1], loss, memory, keeps_graph=True)
                        del left[0]
                        bar.update()
            except torch.OutOfMemoryError:
                logger.warning("the device has too little memory for all layers at once; they are read one by one")
        for one_pass in scoring_passes(model, batches, left, memory.budget):
            yield from _score_pass(model, batches, one_pass, loss, memory)
            bar.update(len(one_pass))


def keeps_graph(model: LayeredModel, batches: Sequence[Batch]) -> bool:
    """Whether scoring keeps all weights and the graph of a micro-batch in memory: if they fit half of what is free."""
    if isinstance(model, StreamedModel):
        sizes = ModelSizes(model)
        needed = sizes.whole + sizes.graph(batches)
    else:  # the weights are in memory already
        needed = ActivationSizes(model).graph(batches)
    processes = 1 if model.device.type == "cuda" else processes_here()
    return 2 * needed * processes <= device_memory(model.device)


def bytes_per_token(model: LayeredModel) -> int:
    """Bytes that scoring keeps per token: inputs of all layers, the last one's output, what layers leave for later."""
    sizes = ActivationSizes(model)
    return int((sizes.layers + 1) * sizes.state + sizes.carried)


def scoring_passes(
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
    model: LayeredModel,
    batches: Sequence[Batch],
    indices: Sequence[int],
    loss: Loss,
    memory: HostMemory,
    keeps_graph: bool = False,
) -> list[BatchScores]:
    """Scores of the micro-batches at ``indices``."""
    own = [batches[index] for index in indices]
    with model.entrance() as entered:
        calls = enter_decoder(entered, model.architecture, own, model.device)
    resident = ResidentBatches(model, own, calls, memory, keeps_graph, loss.of_answers)
    with closing(resident):
        scores = [BatchScores(index, {}) for index in indices]
        for layer, position, gradients in loss.gradients(resident):
            for group, padded in gradients.items():
                values = padded[own[position].valid]
                if not torch.isfinite(values).all():
                    raise FloatingPointError(
                        f"layer {layer}, group {group}: gradient is not finite; score in float32 or leave the sample "
                        "out"
                    )
                scores[position].values[layer, group] = values
    return scores
