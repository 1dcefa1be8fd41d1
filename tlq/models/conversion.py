"""What the tensors of a checkpoint hold of the module tree, where transformers converts them as it loads them.

transformers renames stored tensors, takes their rows apart, transposes them, or puts several into one. Here they are
read in place instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Split,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

from tlq.models.experts import DOWN, GATE_UP, SeparateExperts
from tlq.models.reading import read_tensor
from tlq.models.stored import StoredTensor, TensorFile


@dataclass(frozen=True)
class Content:
    """What a stored tensor holds of the module tree.

    Attributes:
        names: of the tensors that follow each other in its rows; one as a rule.
        transposed: whether it is [in, out] and not [out, in].
        position: its place among the stored tensors that hold the rows of the one tensor that is named; None if it
            holds all of them.
    """

    names: list[str]
    transposed: bool = False
    position: int | None = None


def contents_of_stored(model: PreTrainedModel) -> Callable[[str], Content]:
    """The function from the key of a stored tensor to its content, as transformers renames and converts it.

    It raises ValueError if transformers would change the tensor in another way, other than to put experts together.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [
        each
        for each in transforms
        if isinstance(each, WeightConverter) and not all(".experts." in target for target in each.target_patterns)
    ]
    wanted: dict[str, Any] = model.state_dict()
    for path, module in model.named_modules():
        if isinstance(module, SeparateExperts):
            wanted |= dict.fromkeys((f"{path}.{GATE_UP}", f"{path}.{DOWN}"), True)  # None would count as absent

    def content_of(key: str) -> Content:
        name, source = rename_source_key(key, renamings, converters, model.base_model_prefix, wanted)
        if source is None:
            return Content([key if name not in wanted and key in wanted else name])
        converter = next(each for each in converters if source in each.source_patterns)
        targets, (operation, *more) = converter.target_patterns, converter.operations
        names = [name.replace(targets[0], target) for target in targets]
        if not more and all(name in wanted for name in names):
            if isinstance(operation, Chunk | Split) and operation.dim == 0:
                return Content(names)
            if isinstance(operation, Transpose) and {operation.dim0, operation.dim1} == {0, 1}:
                return Content(names, transposed=True)
            if isinstance(operation, Concatenate) and operation.dim == 0 and len(names) == 1:
                return Content(names, position=converter.source_patterns.index(source))
        raise ValueError(f"{key} is not stored in the form that the model uses; convert the checkpoint")

    return content_of


@dataclass(frozen=True)
class StackedTensor(StoredTensor):
    """A tensor of the module tree whose rows are in several stored tensors, the first of which is in ``file``.

    Attributes:
        sources: the stored tensors, in the order of their rows.
    """

    sources: tuple[StoredTensor, ...] = ()

    @classmethod
    def of(cls, sources: Sequence[StoredTensor]) -> StackedTensor:
        first = sources[0]
        shape = (sum(source.shape[0] for source in sources), *first.shape[1:])
        return cls(first.file, first.key, shape, first.dtype, sources=tuple(sources))

    @property
    def originals(self) -> tuple[StoredTensor, ...]:
        return self.sources

    def read(self, opened: TensorFile) -> Tensor:
        return torch.cat([self._read(source, opened, slice(None)) for source in self.sources])

    def read_rows(self, opened: TensorFile, rows: Tensor) -> Tensor:
        found, order, start = [], [], 0
        for source in self.sources:
            own = (rows >= start) & (rows < start + source.shape[0])
            found.append(self._read(source, opened, rows[own] - start))
            order.append(own.nonzero().flatten())
            start += source.shape[0]
        return torch.cat(found)[torch.cat(order).argsort()]

    def _read(self, source: StoredTensor, opened: TensorFile, rows: Any) -> Tensor:
        whole = source.read(opened) if source.file == self.file else read_tensor(source)
        return whole[rows]
