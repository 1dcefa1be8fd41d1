"""The tensors of a checkpoint on disk: which files hold them, as transformers decides it."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tlq.runtime.digest import kept_digests

#: Files that hold a whole checkpoint, and indices of files that hold parts of it, in the order of transformers.
_SOURCES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


#: Element types in which weights are kept, by safetensors' names.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
WEIGHT_DTYPES = frozenset(_DTYPES.values())

#: Beginnings of the names of element types of 8 bits and fewer.
_SMALL = ("I8", "U8", "F8", "F6", "F4")

#: Ends of the names of weights; the last two are those of all experts of a layer.
_WEIGHTS = (".weight", ".gate_up_proj", ".down_proj")

#: Ends of the names of what belongs to a quantized weight: compressed-tensors, float8 of DeepSeek and Qwen, AWQ, GPTQ.
_QUANTIZED = (".weight_scale", ".weight_scale_inv", ".weight_packed", ".qweight", ".qzeros", ".scales")


@dataclass(frozen=True)
class Part:
    """A tensor of the module tree within a stored tensor that holds several, or holds it transposed.

    Attributes:
        rows: its first row, and the row after its last.
        transposed: whether the stored tensor is [in, out] and not [out, in].
        expert: index in the first dimension of a tensor that holds all experts of a layer.
        name: the name of a linear of an expert in place of the stored tensor's own: ``3.up_proj.weight``. Other parts
            are exported together again, under the name of the stored tensor.
    """

    rows: tuple[int, int]
    transposed: bool
    expert: int | None = None
    name: str | None = None


@dataclass(frozen=True)
class StoredTensor:
    """The file of a tensor, its key in that file, and its form.

    Attributes:
        dtype: name of the element type in safetensors' words, ``BF16`` for instance.
        part: the part of the stored tensor that this is; None if it is all of it.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str
    part: Part | None = None

    @property
    def name(self) -> str:
        """The name under which an export stores it: the key, or that of a linear of its own."""
        if self.part is None or self.part.name is None:
            return self.key
        return f"{self.key.rpartition('.')[0]}.{self.part.name}"

    @property
    def is_joined(self) -> bool:
        """Whether an export joins it with the other parts of the stored tensor."""
        return self.part is not None and self.part.name is None

    @property
    def originals(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it is a part of, or that it consists of, whole."""
        return (replace(self, part=None),)

    @property
    def is_transposed(self) -> bool:
        """Whether the stored tensor is [in, out] and not [out, in]."""
        return self.part is not None and self.part.transposed

    @property
    def rows(self) -> tuple[int, int]:
        """Its first row in the stored tensor, and the row after its last."""
        return (0, self.shape[0] if self.shape else 1) if self.part is None else self.part.rows

    def in_rows(self, shapes: Mapping[str, tuple[int, ...]], transposed: bool) -> Iterator[tuple[str, StoredTensor]]:
        """Names and places of the tensors that follow each other in the rows of this one.

        Args:
            shapes: of the tensors, by name, in their order.
            transposed: whether this one is [in, out].

        Raises:
            ValueError: this one has another shape.
        """
        total = (sum(shape[0] for shape in shapes.values()), *next(iter(shapes.values()))[1:])
        needed = total[::-1] if transposed else total
        if self.shape != needed:
            raise ValueError(
                f"{self.file}: {self.key} has shape {list(self.shape)}, the model of its config.json needs "
                f"{list(needed)}; download the checkpoint again"
            )
        start = 0
        for name, shape in shapes.items():
            yield name, replace(self, shape=shape, part=Part((start, start + shape[0]), transposed))
            start += shape[0]

    def of_experts(self, rows: Mapping[str, int], width: int, transposed: bool = False) -> Iterator[StoredTensor]:
        """Places of the linears in a tensor that holds all experts of a layer, whichever way round.

        Args:
            rows: output channels of each linear of an expert that the tensor holds, in their order.
            width: their input channels.
            transposed: whether square weights are [in, out].

        Raises:
            ValueError: the tensor has another shape.
        """
        total = sum(rows.values())
        forms = ((width, total), (total, width)) if transposed else ((total, width), (width, total))
        if len(self.shape) != 3 or self.shape[1:] not in forms:
            raise ValueError(
                f"{self.file}: {self.key} has shape {list(self.shape)}, the model of its config.json needs "
                f"{total} x {width} for every expert; download the checkpoint again"
            )
        transposed = transposed == (self.shape[1:] == forms[0])
        for expert in range(self.shape[0]):
            start = 0
            for linear, count in rows.items():
                rows_of = (start, start + count)
                part = Part(rows_of, transposed, expert, f"{expert}.{linear}.weight")
                yield replace(self, shape=(count, width), part=part)
                start += count

    def read(self, opened: TensorFile) -> Tensor:
        """The tensor from its open file; it may be mapped from the file."""
        return opened.get_tensor(self.key) if self.part is None else self.part_of(opened.get_slice(self.key))

    def read_rows(self, opened: TensorFile, rows: Tensor) -> Tensor:
        """Rows by their numbers [n], from its open file; no others are read."""
        return self.read(opened)[rows]

    def part_of(self, whole: Any) -> Tensor:
        """The tensor from the stored one (or a slice of safetensors) that holds it."""
        assert self.part is not None
        rows, of_expert = slice(*self.part.rows), () if self.part.expert is None else (self.part.expert,)
        part: Tensor = whole[(*of_expert, slice(None), rows)].t() if self.part.transposed else whole[(*of_expert, rows)]
        return part.contiguous()

    @property
    def nbytes(self) -> int:
        """Size of the tensor's elements."""
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


class TensorFile(Protocol):
    """An open file of tensors."""

    def keys(self) -> Iterable[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...

    def get_slice(self, name: str) -> Any: ...


class _PickledTensors:
    """A file written by ``torch.save``, whose tensors stay on disk until they are read."""

    def __init__(self, file: Path) -> None:
        self._tensors: Mapping[str, Tensor] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)

    def keys(self) -> Iterable[str]:
        return self._tensors.keys()

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    def get_slice(self, name: str) -> _Slice:
        return _Slice(self._tensors[name])


class _Slice:
    """Shape, dtype and parts of a tensor, as a slice of safetensors gives them."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def __getitem__(self, index: Any) -> Tensor:
        return self._tensor[index]

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        return _DTYPES.get(self._tensor.dtype, str(self._tensor.dtype))


@contextmanager
def open_tensors(file: Path) -> Iterator[TensorFile]:
    """The tensors of a safetensors or PyTorch file, read one by one; they may be mapped from the file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        opened: Any = safe_open(file, "pt") if file.suffix == ".safetensors" else nullcontext(_PickledTensors(file))
    except (SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{file}: not readable ({reason}); download it again") from error
    with opened as tensors:
        yield tensors


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads: one that holds everything comes before an index, safetensors before PyTorch.

    Raises:
        FileNotFoundError: the folder has none of them, or a file that its index names is missing.
    """
    source = next((folder / name for name in _SOURCES if (folder / name).exists()), None)
    if source is None:
        raise FileNotFoundError(f"{folder}: has no {', no '.join(_SOURCES)}; give a checkpoint with its weights")
    if source.suffix != ".json":
        return [_regular(source)]
    names = _shard_names(source)
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise FileNotFoundError(f"{folder / absent[0]}: not found, but {source.name} names it; download it again")
    return [_regular(folder / name) for name in names]


def _regular(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"{file}: is no regular file; download it again")
    return file


def read_json(file: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises ValueError, with the file's name, if it holds anything else."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:  # also of bytes that are no text
        raise ValueError(f"{file}: not readable as JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: holds {type(content).__name__}, a JSON object is needed; download it again")
    return content


def _shard_names(index: Path) -> list[str]:
    """Names of the files that an index names, each once; a file lies next to its index.

    Raises:
        ValueError: the index is damaged, or names a file somewhere else.
    """
    placed = read_json(index).get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ValueError(f"{index}: has no weight_map from tensors to file names; download it again")
    names = sorted(set(placed.values()))
    for name in names:
        if Path(name).name != name or name == "..":
            raise ValueError(f"{index}: names {name!r}, which is not in the checkpoint's folder; download it again")
    return names


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by its key; of a key in two files, the last file's.

    Raises:
        FileNotFoundError: see ``weight_files``.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        tensors |= tensors_of(file)
    return tensors


def tensors_of(file: Path) -> dict[str, StoredTensor]:
    """Every tensor of a file by its key."""
    with open_tensors(file) as opened:
        forms = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {key: StoredTensor(file, key, tuple(form.get_shape()), form.get_dtype()) for key, form in forms.items()}


def stated_quantization(config: Any) -> str | None:
    """The method of quantization that a config states; None if it states none."""
    stated = getattr(config, "quantization_config", None)
    return str(dict(stated).get("quant_method", "of an unknown method")) if stated is not None else None


def refuse_foreign_quantization(config: Any, checkpoint: str | Path) -> None:
    """Raise ValueError if a config states a quantization that is not stored as compressed-tensors."""
    method = stated_quantization(config)
    if method not in (None, "compressed-tensors"):
        raise ValueError(
            f"model {checkpoint!s}: it is quantized ({method}); this program loads only checkpoints of "
            "compressed-tensors, give one of those or the original, whose weights have 16 or 32 bits"
        )


def refuse_stated_quantization(config: Any, checkpoint: str | Path) -> None:
    """Raise ValueError if a config states any quantization: what is to be quantized must be an original."""
    if method := stated_quantization(config):
        raise ValueError(
            f"model {checkpoint!s}: it is quantized already ({method}); quantize the original, whose weights have "
            f"16 or 32 bits, or if its weights are FP8 the result of `tlq dequantize {checkpoint!s} --out FOLDER`"
        )


def refuse_quantized(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ValueError if weights have 8 bits or fewer, or have scales: a config need not say so."""
    for key, place in tensors.items():
        small = key.endswith(_WEIGHTS) and place.dtype.startswith(_SMALL)
        if small or key.endswith(_QUANTIZED):
            raise ValueError(
                f"{place.file}: {key} ({place.dtype}) is a part of a quantized weight, so the checkpoint is quantized "
                "already; quantize the original, whose weights have 16 or 32 bits"
            )


def refuse_non_finite(tensors: Iterable[tuple[str, Tensor]], place: str) -> None:
    """Raise FloatingPointError, with the name and the ``place`` of the tensors, if one of them is not finite."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.itemsize > 1 and not _all_finite(tensor):
            raise FloatingPointError(f"{place}: {name} is not finite; the checkpoint is damaged, download it again")


def _all_finite(tensor: Tensor) -> bool:
    """Some elements at a time: the test of all of them takes three times their memory."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(2**24))


def source_digest(folder: Path, check: Callable[[Path], None] | None = None) -> str:
    """SHA-256 of a checkpoint's config and of every byte of its weight files.

    The digests of the files are kept in a hidden file next to the folder, so a large model is read for them once.

    Args:
        check: called once for every weight file, ``check_finite`` for instance; the hidden file says which passed.
    """
    total = hashlib.sha256((folder / "config.json").read_bytes())
    kept = folder.with_name(f".{folder.resolve().name}.sha256.json")
    digests = kept_digests(weight_files(folder), kept, check)
    for name, digest in sorted(digests.items()):
        total.update(f"{name} {digest} ".encode())
    return total.hexdigest()


def dtype_of_weights(folder: Path) -> torch.dtype:
    """The dtype of the first floating-point tensor of the first file, which transformers takes for ``auto``."""
    with open_tensors(weight_files(folder)[0]) as opened:
        for key in opened.keys():  # noqa: SIM118
            dtype = opened.get_tensor(key).dtype
            if dtype.is_floating_point and dtype.itemsize > 1:
                return dtype
    return torch.float32
