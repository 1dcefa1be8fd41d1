"""Number formats: quantization parameters, quantize, dequantize.

One pair, ``quantize`` and ``dequantize``, serves every recipe, the export and the tests. Integer codes are signed, in
``[-2**(bits - 1), 2**(bits - 1) - 1]``, zero-points are on the same grid, and scales are rounded to the dtype that the
checkpoint stores, so that the search uses the saved values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from tlq.quantization.budget import Budget

FULL_PRECISION = "full_precision"


@dataclass(frozen=True)
class Scheme:
    """A number format for the linears of the decoder.

    Attributes:
        weight_bits: bits of a weight code.
        group_size: input channels that share one scale; None gives one scale per output channel.
        symmetric: whether the zero-point is fixed at 0.
        activation_bits: bits of dynamic per-token symmetric activations; None keeps them in full precision.
        overrides: (pattern, scheme name or `full_precision`); a linear whose module path matches a pattern (in shell
            style, ``*.layers.0.*``) takes that scheme instead. The first match counts.
        scale_digits: significant binary digits of a scale, which a float16 then holds too; None keeps those of the
            checkpoint's dtype.
        budget: size for which the schemes ``MIXED`` are still to be distributed over the linears (see
            ``tlq.calibration.allocation``); None once they are, as overrides, and for every other scheme.
    """

    name: str
    weight_bits: int
    group_size: int | None
    symmetric: bool
    activation_bits: int | None = None
    overrides: tuple[tuple[str, str], ...] = ()
    scale_digits: int | None = None
    budget: Budget | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for an override that a loaded checkpoint would not apply."""
        for pattern, name in self.overrides:
            if name == FULL_PRECISION:
                continue
            other = get_scheme(name)
            if not (self.symmetric and other.symmetric) or other.activation_bits != self.activation_bits:
                raise ValueError(
                    f"scheme {self.name}, override {pattern}: {name}: mixed asymmetric weights, or mixed activations, "
                    f"load wrongly with compressed-tensors; use {FULL_PRECISION} for these layers"
                )

    def of(self, path: str) -> Scheme | None:
        """The scheme of the linear at module path ``path``; None if it stays in full precision."""
        for pattern, name in self.overrides:
            if path == pattern or fnmatchcase(path, pattern):
                return None if name == FULL_PRECISION else get_scheme(name)
        return replace(self, overrides=())

    @property
    def parts(self) -> list[Scheme]:
        """The schemes of all linears: its own and those of its overrides, or all that its budget may distribute."""
        names = [name for _, name in self.overrides] if self.budget is None else [*MIXED]
        others = [get_scheme(name) for name in dict.fromkeys(names) if name != FULL_PRECISION]
        return [replace(self, overrides=()), *others]

    def bytes_of(self, out_features: int, in_features: int, scale_dtype: torch.dtype) -> int:
        """Size of a weight's codes, scales and zero-points in a checkpoint."""
        groups = out_features * (1 if self.group_size is None else in_features // self.group_size)
        codes = out_features * in_features * self.weight_bits
        zero_points = 0 if self.symmetric else groups * self.weight_bits
        return (codes + zero_points) // 8 + groups * scale_dtype.itemsize

    @property
    def dequantized(self) -> bool:
        """Whether a checkpoint asks transformers to decompress its weights when it is loaded.

        It would drop the quantization of activations, and would take one number of bits for all linears.
        """
        return self.activation_bits is None and not self.mixed

    @property
    def mixed(self) -> bool:
        """Whether linears have different numbers of bits; full precision is none of them."""
        return self.budget is not None or any(name != FULL_PRECISION for _, name in self.overrides)

    @property
    def is_mix(self) -> bool:
        """Whether a budget is, or was, distributed: every linear is named by an override."""
        return Budget.of_name(self.name) is not None

    @property
    def bits_in_words(self) -> str:
        """`3`, or `2, 3, 4 and 8` for a mix."""
        if not self.is_mix:
            return str(self.weight_bits)
        names = {name for _, name in self.overrides} - {FULL_PRECISION}
        *some, last = map(str, sorted({get_scheme(name).weight_bits for name in names}))
        return f"{', '.join(some)} and {last}" if some else last

    @property
    def tag(self) -> str:
        """Tag of a model card: `3-bit`, or `mixed-precision`."""
        return "mixed-precision" if self.is_mix else f"{self.weight_bits}-bit"

    @property
    def kind(self) -> str:
        """Bits of weights and activations: ``w4a16`` for instance."""
        return f"w{self.weight_bits}a{self.activation_bits or 16}"

    @property
    def code_range(self) -> tuple[int, int]:
        return code_range(self.weight_bits)

    def check_width(self, in_features: int, where: str) -> None:
        """Raise ValueError if the group size does not divide ``in_features``."""
        if self.group_size is not None and in_features % self.group_size:
            divisors = [size for size in (32, 64, 128, 256) if in_features % size == 0]
            raise ValueError(
                f"{where}: scheme {self.name} has groups of {self.group_size}, which do not divide its "
                f"{in_features} input channels; set group_size to one of {divisors or 'its divisors'}"
            )


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("w2a16", weight_bits=2, group_size=64, symmetric=False),
        Scheme("w2a16s", weight_bits=2, group_size=64, symmetric=True),
        Scheme("w3a16", weight_bits=3, group_size=128, symmetric=False),
        Scheme("w3a16s", weight_bits=3, group_size=128, symmetric=True),
        Scheme("w4a16", weight_bits=4, group_size=128, symmetric=False),
        Scheme("w4a16s", weight_bits=4, group_size=128, symmetric=True),
        Scheme("w8a16s", weight_bits=8, group_size=128, symmetric=True),
        Scheme("w4a8", weight_bits=4, group_size=None, symmetric=True, activation_bits=8),
        Scheme("w8a8", weight_bits=8, group_size=None, symmetric=True, activation_bits=8),
        # The blocks of GGUF. Those of q4_1 hold scale * zero-point as a float16: 7 digits times 4 are exact in its 11.
        Scheme("q4_0", weight_bits=4, group_size=32, symmetric=True, scale_digits=11),
        Scheme("q4_1", weight_bits=4, group_size=32, symmetric=False, scale_digits=7),
        Scheme("q8_0", weight_bits=8, group_size=32, symmetric=True, scale_digits=11),
    )
}


#: Schemes that a budget is distributed to. They are symmetric, because mixed asymmetric ones load wrongly.
MIXED = ("w2a16s", "w3a16s", "w4a16s", "w8a16s", FULL_PRECISION)


def get_scheme(name: str, group_size: int | None = None) -> Scheme:
    """The scheme called ``name``, with another ``group_size`` if one is given.

    ``mix3.5`` and ``mix4.2gb`` are mixes for a budget of 3.5 bits a weight and of 4.2 GB (see ``Budget``).

    Raises:
        ValueError: the scheme is unknown, or scales whole output channels and takes no group size.
    """
    if (budget := Budget.of_name(name)) is not None:
        if group_size is not None:
            raise ValueError(f"scheme {name} has the groups of its parts; remove group_size: {group_size}")
        return replace(SCHEMES["w4a16s"], name=budget.name, budget=budget)
    if name not in SCHEMES:
        raise ValueError(
            f"unknown scheme {name!r}; choose one of {', '.join(SCHEMES)}, or a mix for a number of bits a weight, for "
            "example mix3.5"
        )
    scheme = SCHEMES[name]
    if group_size is None or group_size == scheme.group_size:
        return scheme
    if scheme.group_size is None:
        raise ValueError(f"scheme {name} has one scale per output channel; remove group_size: {group_size}")
    return replace(scheme, group_size=group_size)


@dataclass(frozen=True)
class QuantizedWeight:
    """Codes [out, in] int8 with scale and zero-point [out, groups]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes represent, rounded to ``dtype``, as float32 [out, in].

        Engines that multiply in bfloat16 dequantize to bfloat16; integer kernels use the exact product.
        """
        return dequantize(self.codes, self.scale, self.zero_point).to(dtype).float()

    @classmethod
    def stacked(cls, parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
        """Stack weights with the same inputs along the output dimension."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def split(self, rows: Sequence[int]) -> list[QuantizedWeight]:
        """The inverse of ``stacked``."""
        parts = zip(*(getattr(self, field.name).split(list(rows)) for field in fields(self)), strict=True)
        return [QuantizedWeight(*part) for part in parts]

    def rescale_rows(self, factor: Tensor, scheme: Scheme) -> QuantizedWeight:
        """The same codes with every output row multiplied by ``factor`` [out] (through the scales)."""
        scale = self.scale.float() * factor.float()[:, None]
        return replace(self, scale=stored_scale(scale, scheme, self.scale.dtype))


def code_range(bits: int) -> tuple[int, int]:
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def stored_scale(scale: Tensor, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """A float32 scale, rounded to what the scheme stores in a checkpoint of ``dtype``."""
    if scheme.scale_digits is None:
        return scale.to(dtype)
    mantissa, exponent = torch.frexp(scale)
    digits = scheme.scale_digits
    return torch.ldexp(torch.round(mantissa * 2**digits), exponent - digits).half().to(dtype)


def weight_qparams(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Scale and zero-point of every group, from the range of its weights.

    Args:
        weight: [out, in].
    Returns:
        scale [out, groups] in ``scale_dtype`` and zero_point [out, groups] int8.
    """
    low, high = scheme.code_range
    groups = weight.float().unflatten(1, (-1, scheme.group_size or weight.shape[1]))
    if scheme.symmetric:
        scale = nonzero(stored_scale(groups.abs().amax(2) / ((high - low) / 2), scheme, scale_dtype))
        return scale, torch.zeros_like(scale, dtype=torch.int8)
    smallest = groups.amin(2).clamp(max=0)
    largest = groups.amax(2).clamp(min=0)
    scale = nonzero(stored_scale((largest - smallest) / (high - low), scheme, scale_dtype))
    zero_point = torch.round(low - smallest / scale.float()).clamp(low, high).to(torch.int8)
    return scale, zero_point


def nearest_codes(values: Tensor, step: Tensor, offset: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats, of float32 values with float32 scale ``step`` and zero-point ``offset``."""
    low, high = code_range(bits)
    return values.div(step).round_().add_(offset).clamp_(low, high)


def values_of(codes: Tensor, step: Tensor, offset: Tensor) -> Tensor:
    """The values that codes, given as floats, represent."""
    return codes.sub(offset).mul_(step)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Nearest codes: weight [out, in], scale and zero_point [out, groups] -> int8 [out, in]."""
    groups = weight.float().unflatten(1, (scale.shape[1], -1))
    codes = nearest_codes(groups, scale.float()[:, :, None], zero_point.float()[:, :, None], bits)
    return codes.to(torch.int8).flatten(1)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """The float32 weight that the codes represent: (code - zero_point) * scale."""
    groups = codes.float().unflatten(1, (scale.shape[1], -1))
    return values_of(groups, scale.float()[:, :, None], zero_point.float()[:, :, None]).flatten(1)


@dataclass(frozen=True)
class WeightQuantizer:
    """A scheme and the dtype in which the checkpoint stores scales: together they decide how a weight is quantized."""

    scheme: Scheme
    scale_dtype: torch.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the dequantized weight in inference engines; float32 (exact) if activations are quantized too."""
        return self.scale_dtype if self.scheme.activation_bits is None else torch.float32

    def qparams(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """As ``weight_qparams``."""
        return weight_qparams(weight, self.scheme, self.scale_dtype)

    def quantize(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Nearest codes for the given scale and zero-point, as the function ``quantize``."""
        return quantize(weight, scale, zero_point, self.scheme.weight_bits)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """``round_nearest`` followed by ``dequantize``, without the conversion to int8."""
        scale, zero_point = self.qparams(weight)
        groups = weight.float().unflatten(1, (scale.shape[1], -1))
        step, offset = scale.float()[:, :, None], zero_point.float()[:, :, None]
        return values_of(nearest_codes(groups, step, offset, self.scheme.weight_bits), step, offset).flatten(1)

    def round_nearest(self, weight: Tensor) -> QuantizedWeight:
        """Round to nearest: scale and zero-point of each group, then nearest codes."""
        scale, zero_point = self.qparams(weight)
        return QuantizedWeight(self.quantize(weight, scale, zero_point), scale, zero_point)

    def empty(self, rows: int, in_features: int, device: torch.device) -> QuantizedWeight:
        """Uninitialised codes, scales and zero-points of a weight [rows, in_features]."""
        groups = 1 if self.scheme.group_size is None else in_features // self.scheme.group_size
        return QuantizedWeight(
            torch.empty(rows, in_features, dtype=torch.int8, device=device),
            torch.empty(rows, groups, dtype=self.scale_dtype, device=device),
            torch.empty(rows, groups, dtype=torch.int8, device=device),
        )


def fake_quantize_activations(hidden_states: Tensor, bits: int) -> Tensor:
    """Dynamic symmetric quantization with one scale per token (the last dimension), as serving engines do it.

    The scale is max|x| / ((2**bits - 1) / 2), the formula of compressed-tensors, so that a loaded checkpoint computes
    the same numbers.
    """
    low, high = code_range(bits)
    scale = nonzero(hidden_states.abs().amax(-1, keepdim=True) / ((high - low) / 2))
    return torch.clamp(torch.round(hidden_states / scale), low, high) * scale


def quantize_inputs(linear: nn.Module, bits: int) -> None:
    """Make a linear quantize its input, as ``fake_quantize_activations``, at every call."""

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize_activations(args[0], bits), *args[1:])

    linear.register_forward_pre_hook(hook)


def nonzero(scale: Tensor) -> Tensor:
    """Replace a scale of 0 by 1, so that a group of zeros, or of values too small for the dtype, becomes exactly 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)
