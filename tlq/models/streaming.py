"""Read a model's decoder layers from disk one at a time, so that no process holds all weights.

``StreamedModel`` builds the model without weights and reads them when they are needed: the vision tower and the tokens'
embeddings to enter the decoder, then one decoder layer at a time, with the next layer prefetched. ``ResidentModel`` has
the same interface for a model in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tlq.models.architectures import Architecture, architecture_of, get_linear, linear_paths
from tlq.models.checkpoint import checkpoint_dtype_of, local_folder, read_config
from tlq.models.conversion import Content, StackedTensor, contents_of_stored
from tlq.models.experts import DOWN, GATE_UP, SeparateExperts
from tlq.models.linear_groups import LinearGroup
from tlq.models.reading import copy_of, read_tensor, read_together
from tlq.models.skeleton import empty_model
from tlq.models.stored import (
    WEIGHT_DTYPES,
    StoredTensor,
    open_tensors,
    refuse_quantized,
    refuse_stated_quantization,
    stored_tensors,
)
from tlq.runtime.memory import release_freed_memory


class LayeredModel(Protocol):
    """A model whose weights may be loaded part by part.

    Attributes:
        skeleton: the model's modules; outside the contexts below their weights may be missing.
        architecture: the place of its decoder, and the decoder's linear groups.
        device, dtype: of its computation.
    """

    skeleton: PreTrainedModel
    architecture: Architecture
    device: torch.device
    dtype: torch.dtype

    def entrance(self) -> Any:
        """A context in which all that the model computes before its decoder layers has its weights."""
        ...

    def head(self) -> Any:
        """A context in which the final norm and the output embeddings have their weights."""
        ...

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield (index, decoder layer) in ``order``; each layer has its weights until the next one is yielded."""
        ...

    def whole(self) -> AbstractContextManager[ResidentModel]:
        """A context in which all weights are in memory."""
        ...


@dataclass
class ResidentModel:
    """A model in memory; changes to a layer are permanent."""

    skeleton: PreTrainedModel

    def __post_init__(self) -> None:
        self.architecture = architecture_of(self.skeleton.config)
        self.device = next(self.skeleton.parameters()).device
        self.dtype = next(self.architecture.decoder_layers(self.skeleton)[0].parameters()).dtype

    @contextmanager
    def entrance(self) -> Iterator[nn.Module]:
        yield self.skeleton

    head = entrance

    @contextmanager
    def whole(self) -> Iterator[ResidentModel]:
        yield self

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        layers = self.architecture.decoder_layers(self.skeleton)
        return ((index, layers[index]) for index in order)


class StreamedModel:
    """A checkpoint directory or hub id whose weights are read when they are needed.

    Attributes:
        config: of the checkpoint.
        checkpoint_dtype: dtype of the stored weights.
        weight_map: name of a parameter in the module tree -> its place on disk.
        unnamed: name -> place of the stored tensors that the module tree does not name (heads that transformers leaves
            out, such as `mtp.*`).
        untied: the checkpoint holds two values of weights that its config ties.
    """

    def __init__(
        self,
        checkpoint: str | Path,
        dtype: torch.dtype | str = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Raises: as ``read_config``; ValueError if a weight is missing or its stored form differs from the model's."""
        self.config = self._read_config(checkpoint)
        self.folder = local_folder(checkpoint)
        self.checkpoint_dtype = checkpoint_dtype_of(self.config, self.folder)
        self.device = torch.device(device)
        self.architecture = architecture_of(self.config)
        wanted = self.checkpoint_dtype if dtype == "auto" else dtype
        self.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
        self.skeleton = empty_model(self.config, checkpoint, self.dtype)
        self.skeleton.requires_grad_(False)
        #: They keep the dtype in which they are stored, as in transformers: a router's bias decides between experts.
        strict = self.skeleton._keep_in_fp32_modules_strict or ()
        self._uncast = {name for name, _ in self.skeleton.named_buffers()}
        self._uncast |= {name for name in self.skeleton.state_dict() for each in strict if f".{each}." in f".{name}."}
        self._experts = {
            path: module for path, module in self.skeleton.named_modules() if isinstance(module, SeparateExperts)
        }
        for module in self.skeleton.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(self.device)
        self.weight_map, self.unnamed = self._find_tensors()

    def _read_config(self, checkpoint: str | Path) -> Any:
        config = read_config(checkpoint)
        refuse_stated_quantization(config, checkpoint)
        return config

    def _stored(self) -> dict[str, StoredTensor]:
        """The tensors of the checkpoint, by key."""
        stored = stored_tensors(self.folder)
        refuse_quantized(stored)
        return stored

    def _find_tensors(self) -> tuple[dict[str, StoredTensor], dict[str, StoredTensor]]:
        """Places of the tensors that the module tree names, and of those that it does not."""
        wanted = self.skeleton.state_dict()
        content_of = contents_of_stored(self.skeleton)
        found: dict[str, StoredTensor] = {}
        unnamed: dict[str, StoredTensor] = {}
        stacks: dict[str, dict[int, StoredTensor]] = {}
        for key, whole in self._stored().items():
            try:
                content = content_of(key)
            except ValueError as error:
                raise ValueError(f"{self.folder}: {error}") from error
            if content.position is not None:
                stacks.setdefault(content.names[0], {})[content.position] = whole
                continue
            for name, place in self._parts(content, whole, wanted):
                if name in wanted:
                    self._check_form(place, wanted[name])
                    found[name] = place
                elif not self._is_unread(name):
                    unnamed[name] = place
        for name, sources in stacks.items():
            if name.startswith(self._inside):
                raise ValueError(
                    f"{self.folder}: {name} is stored in {len(sources)} tensors, in which an export would not have a "
                    "place; convert the checkpoint"
                )
            found[name] = StackedTensor.of([sources[position] for position in sorted(sources)])
            self._check_form(found[name], wanted[name])
        self._check_joined(found)
        self.untied = self._tie(found)
        missing = [name for name, value in wanted.items() if name not in found and value.is_meta]
        if missing:
            raise ValueError(
                f"{self.folder}: {len(missing)} weights are missing, the first is {missing[0]}; the checkpoint is "
                "incomplete, download it again"
            )
        return found, unnamed

    def _is_unread(self, name: str) -> bool:
        """Whether a stored tensor is of a linear that only other decoder layers have: keys of a layer that shares them.

        The result leaves it out: no program computes with it, and in full precision it would not fit its layer.
        """
        if not name.startswith(self._inside):
            return False
        number, _, rest = name.removeprefix(self._inside).partition(".")
        inside = number.isdecimal() and int(number) < len(self.architecture.groups)  # others predict further tokens
        return inside and any(rest.rpartition(".")[0] in group.linears for group in self._every_group)

    @cached_property
    def _every_group(self) -> list[LinearGroup]:
        return list(dict.fromkeys(group for groups in self.architecture.kinds for group in groups))

    def _parts(
        self, content: Content, place: StoredTensor, wanted: dict[str, Tensor]
    ) -> Iterator[tuple[str, StoredTensor]]:
        """The tensors of the module tree that a stored one holds, with their places: itself, or parts of it."""
        if len(content.names) > 1 or content.transposed:
            shapes = {name: tuple(wanted[name].shape) for name in content.names}
            yield from place.in_rows(shapes, content.transposed)
            return
        (name,) = content.names
        path, _, leaf = name.rpartition(".")
        experts = self._experts.get(path)
        if experts is None or leaf not in (GATE_UP, DOWN):
            yield name, place
            return
        linears = ("gate_proj", "up_proj") if leaf == GATE_UP else ("down_proj",)
        rows = {linear: get_linear(experts[0], linear).out_features for linear in linears}
        width = get_linear(experts[0], linears[0]).in_features
        if place.shape[:1] != (len(experts),):
            raise ValueError(
                f"{place.file}: {place.key} has {place.shape[0]} experts, the model of its config.json {len(experts)}; "
                "download the checkpoint again"
            )
        parent = place.key.rpartition(".")[0]
        for linear in place.of_experts(rows, width, experts.transposed):
            yield f"{path}{linear.name.removeprefix(parent)}", linear

    def _check_joined(self, found: dict[str, StoredTensor]) -> None:
        """Raise ValueError if several linears are in one tensor, where the family's row says that they are not.

        Its exports would be said to load in transformers.
        """
        if self.architecture.joined:
            return
        for index in range(len(self.architecture.groups)):
            for path in linear_paths(self.architecture, index):
                place = found.get(f"{path}.weight")
                if place is not None and place.is_joined:
                    raise ValueError(
                        f"{place.file}: {place.key} holds {path} and others, which is known of other families only; "
                        "load the checkpoint with transformers and save it with save_original_format=False"
                    )

    def _check_form(self, place: StoredTensor, wanted: Tensor) -> None:
        """Raise ValueError if a stored weight has another shape than the model's, or is no floating-point number."""
        if place.shape != tuple(wanted.shape):
            raise ValueError(
                f"{place.file}: {place.key} has shape {list(place.shape)}, the model of its config.json needs "
                f"{list(wanted.shape)}; download the checkpoint again"
            )
        if wanted.is_floating_point() and place.dtype not in WEIGHT_DTYPES:
            raise ValueError(
                f"{place.file}: {place.key} is stored as {place.dtype}, which cannot be quantized; weights must "
                "have 16 or 32 bits"
            )

    def _tie(self, found: dict[str, StoredTensor]) -> bool:
        """Give tied parameters one place, as transformers does: of two that are stored with other values, each its own.

        Returns:
            Whether there are such two: they are not tied, although the config says so.
        """
        untied = False
        for name, source in self.skeleton.all_tied_weights_keys.items():
            if name in found and source in found:
                if found[name] == found[source] or torch.equal(read_tensor(found[name]), read_tensor(found[source])):
                    found[name] = found[source]
                else:
                    untied = True
            elif name in found:
                found[source] = found[name]
            elif source in found:
                found[name] = found[source]
        return untied

    @property
    def _inside(self) -> str:
        return f"{self.architecture.layers}."

    @property
    def outside_names(self) -> list[str]:
        """Names of the stored tensors outside the decoder layers."""
        return [name for name in self.weight_map if not name.startswith(self._inside)]

    def layer_names(self, index: int) -> list[str]:
        """Names of the stored tensors of a decoder layer."""
        return [name for name in self.weight_map if name.startswith(f"{self._inside}{index}.")]

    @property
    def entrance_names(self) -> list[str]:
        """Names of the stored tensors that ``entrance`` reads whole: vision tower and connector, mostly."""
        embeddings = {f"{path}.weight" for path in self._embeddings}
        output = self._path_of(self.skeleton.get_output_embeddings())
        return [name for name in self.outside_names if name not in embeddings and not name.startswith(f"{output}.")]

    @cached_property
    def _embeddings(self) -> list[str]:
        """Paths of the tokens' embeddings: the decoder's input, and others next to its layers (Gemma 4: per layer)."""
        decoder = self.architecture.layers.rpartition(".")[0]
        beside = self.skeleton.get_submodule(decoder).named_children()
        others = [f"{decoder}.{name}" for name, module in beside if isinstance(module, nn.Embedding)]
        return list(dict.fromkeys([self._path_of(self.skeleton.get_input_embeddings()), *others]))

    @contextmanager
    def entrance(self) -> Iterator[nn.Module]:
        with self._with_weights(self.entrance_names), ExitStack() as stack:
            for path in self._embeddings:
                embeddings: Any = self.skeleton.get_submodule(path)
                stack.enter_context(self._read_by_row(embeddings, self.weight_map[f"{path}.weight"]))
            yield self.skeleton

    @contextmanager
    def _read_by_row(self, embeddings: nn.Embedding, place: StoredTensor) -> Iterator[None]:
        """Inside this context embeddings read the rows of the tokens that they are called with: a few of 150,000."""
        whole, padding = embeddings.weight, embeddings.padding_idx

        def read_rows(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens, positions = args[0].unique(return_inverse=True)
            with open_tensors(place.file) as opened:
                rows = place.read_rows(opened, tokens.cpu()).to(self.device, self.dtype)
            embeddings.weight = nn.Parameter(rows, requires_grad=False)
            return (positions, *args[1:])

        handle = embeddings.register_forward_pre_hook(read_rows)
        embeddings.padding_idx = None  # it names a row of the whole
        try:
            yield
        finally:
            handle.remove()
            embeddings.weight, embeddings.padding_idx = whole, padding

    def head(self) -> Any:
        norm, output = self.architecture.final_norm, self._path_of(self.skeleton.get_output_embeddings())
        return self._with_weights([name for name in self.outside_names if name.startswith((f"{norm}.", f"{output}."))])

    def _path_of(self, wanted: nn.Module) -> str:
        return next(name for name, module in self.skeleton.named_modules() if module is wanted)

    @contextmanager
    def whole(self) -> Iterator[ResidentModel]:
        with self._with_weights(self.weight_map):
            yield ResidentModel(self.skeleton)

    @contextmanager
    def _with_weights(self, names: Iterable[str]) -> Iterator[nn.Module]:
        with self._filled(self.read(names)):
            yield self.skeleton
        release_freed_memory()

    def layers(self, order: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        modules = self.architecture.decoder_layers(self.skeleton)
        with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as reader:
            coming: Future[dict[str, Tensor]] | None = None
            for index, following in zip_longest(order, order[1:]):
                tensors = coming.result() if coming is not None else self.read(self.layer_names(index))
                coming = None if following is None else reader.submit(self.read, self.layer_names(following))
                with self._filled(tensors):
                    del tensors
                    yield index, modules[index]
                release_freed_memory()

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors by name on the compute device; floating-point ones in ``dtype``, else in the dtype of computation."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.weight_map[name].file, []).append(name)
        tensors: dict[str, Tensor] = {}
        read: dict[StoredTensor, str] = {}
        for file, part in by_file.items():
            for together in read_together((name, self.weight_map[name]) for name in part):
                with open_tensors(file) as opened:
                    for name, place in together:
                        twin = read.setdefault(place, name)
                        if twin != name:  # tied weights
                            tensors[name] = tensors[twin]
                            continue
                        wanted = None if name in self._uncast else dtype or self.dtype
                        # A copy even if dtype and device stay: the file must not remain mapped.
                        tensors[name] = copy_of(place, opened, self.device, wanted)
        return tensors

    @contextmanager
    def _filled(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Hold the weights in the skeleton during the context."""
        empty: list[tuple[nn.Module, str, Any]] = []
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            module = self.skeleton.get_submodule(path)
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
                continue
            empty.append((module, leaf, module._parameters[leaf]))
            module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        try:
            yield
        finally:
            for module, leaf, parameter in empty:
                module._parameters[leaf] = parameter
