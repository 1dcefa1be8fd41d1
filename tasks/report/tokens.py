"""Show importance and the token-level set over sample images and by layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image

from tasks.files import CALIBSET, IMPORTANCE, PREPARED, read_importance, read_pool, read_samples
from tasks.files import read_tokens as read_token_set
from tlq.importance.pool import Importance, TokenPool
from tlq.inputs.images import decode_image
from tlq.models.linear_groups import EXPERTS, is_expert
from tlq.samples import Sample

HEAT = "inferno"
#: Colour scale for the share of the sets that a token is in; the square root makes small shares visible.
SET_COLORS = mpl.colors.LinearSegmentedColormap.from_list("set", ["#f7f9fc", "#9cc3f2", "#2a78d6", "#0d366b"])
SET_NORM = mpl.colors.PowerNorm(0.5, 0, 1)
_WIDEST = 480  # pixels of a picture in the report
_SAME_SHAPE = 1.5  # a grid whose aspect ratio differs more from the picture's does not belong to it


@dataclass(frozen=True)
class TokenData:
    """Results of the stages `prepare`, `importance` and `calibset`.

    Attributes:
        samples: the pool, in the order of importance.
        relative: importance of every token of every sample relative to the mean of its layer and group, averaged over
            layers and groups.
        share: for every token of every sample, the share of layers and groups whose set it is in.
        shares: by layer and group, see ``modality_shares``.
    """

    samples: list[Sample]
    pool: TokenPool
    relative: list[NDArray[np.float64]]
    share: list[NDArray[np.float64]]
    shares: pd.DataFrame


@dataclass(frozen=True)
class SampleTokens:
    """One sample for the report, with importance and set share per token, separately for image and text tokens."""

    id: str
    source: str
    image: Image.Image | None
    image_values: NDArray[np.float64]
    image_share: NDArray[np.float64]
    texts: list[str]
    text_values: NDArray[np.float64]
    text_share: NDArray[np.float64]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the image tokens; None if they do not form one grid over one picture (tiles)."""
        if self.image is None or not len(self.image_values):
            return None
        width, height = self.image.size
        rows, columns = grid_shape(len(self.image_values), width, height)
        stretched = (columns / rows) / (width / height)
        return (rows, columns) if 1 / _SAME_SHAPE < stretched < _SAME_SHAPE else None


def grid_shape(tokens: int, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of an image's token grid: the factors of ``tokens`` closest to the image's aspect ratio."""
    factors = [(rows, tokens // rows) for rows in range(1, tokens + 1) if tokens % rows == 0]
    return min(factors, key=lambda shape: abs(np.log(shape[1] / shape[0]) - np.log(width / height)))


def read_token_data() -> TokenData:
    """Read the results of the three stages. Raises: as the readers of tasks/files.py."""
    pool = read_pool(IMPORTANCE)
    scores = read_importance(IMPORTANCE)
    chosen = read_token_set(CALIBSET / "tokens.parquet")
    return TokenData(
        samples=read_samples(PREPARED / "calibration.parquet", pool.samples),
        pool=pool,
        relative=relative_importance(scores, pool),
        share=set_share(chosen, pool, sum(not is_expert(group) for _, group in scores)),
        shares=modality_shares(scores, chosen, pool),
    )


def relative_importance(scores: Importance, pool: TokenPool) -> list[NDArray[np.float64]]:
    """Per sample, importance over the mean of its layer and group, averaged over layers and groups, [tokens].

    The experts of a layer count together, by the importance of their common output.
    """
    together = [values for (_, group), values in scores.items() if not is_expert(group)]
    return pool.split(np.mean([values / values.mean(dtype=np.float64) for values in together], axis=0))


def set_share(chosen: pd.DataFrame, pool: TokenPool, sets: int) -> list[NDArray[np.float64]]:
    """Per sample, the share of the ``sets`` (one per layer and group) that each token is in, [tokens]."""
    experts = chosen["group"].map(is_expert)
    rows = chosen.assign(group=chosen["group"].mask(experts, EXPERTS))[["layer", "group", "sample", "position"]]
    rows = rows.drop_duplicates()
    indices = pool.cu_seqlens[rows["sample"].to_numpy()] + rows["position"].to_numpy()
    return pool.split(np.bincount(indices, minlength=len(pool)) / sets)


def modality_shares(scores: Importance, chosen: pd.DataFrame, pool: TokenPool) -> pd.DataFrame:
    """Share of image tokens in percent, by layer and group.

    Returns:
        columns layer, group, tokens (of all tokens), importance (of raw importance), chosen (of the set's weight).
    """
    is_image = pool.is_image
    of_set = {}
    groups = chosen["group"].mask(chosen["group"].map(is_expert), EXPERTS)
    for key, part in chosen.groupby([chosen["layer"], groups]):
        weight = part["weight"].to_numpy(float)
        of_set[cast(tuple[int, str], key)] = 100 * weight[part["is_image"].to_numpy(bool)].sum() / weight.sum()
    rows = []
    for (layer, group), raw in scores.items():
        if is_expert(group):
            continue
        values = raw.astype(np.float64)
        rows.append(
            {
                "layer": layer,
                "group": group,
                "tokens": 100 * is_image.mean(),
                "importance": 100 * values[is_image].sum() / values.sum(),
                "chosen": of_set.get((layer, group), np.nan),
            }
        )
    return pd.DataFrame(rows)


def show_samples(data: TokenData, count: int, tokenizer: Any) -> list[SampleTokens]:
    """Up to ``count`` samples, from as many different sources as there are."""
    return [show_sample(data, index, tokenizer) for index in spread(data.samples, count)]


def show_sample(data: TokenData, index: int, tokenizer: Any) -> SampleTokens:
    sample, image = data.samples[index], data.pool.split(data.pool.is_image)[index]
    values, share = data.relative[index], data.share[index]
    return SampleTokens(
        id=sample.id,
        source=sample.source,
        image=decode_image(sample.images[0]) if len(sample.images) == 1 else None,
        image_values=values[image],
        image_share=share[image],
        texts=[tokenizer.decode([token]) for token in data.pool.split(data.pool.token_ids)[index][~image]],
        text_values=values[~image],
        text_share=share[~image],
    )


def spread(samples: list[Sample], count: int) -> list[int]:
    """Indices of up to ``count`` samples, from as many different sources as there are."""
    by_source: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        by_source.setdefault(sample.source, []).append(index)
    rounds = max(len(indices) for indices in by_source.values())
    order = [indices[turn] for turn in range(rounds) for indices in by_source.values() if turn < len(indices)]
    return order[:count]


def heat_norm(samples: list[SampleTokens]) -> mpl.colors.LogNorm:
    """One colour scale for all samples, so that they are comparable."""
    values = np.concatenate([np.concatenate([each.image_values, each.text_values]) for each in samples])
    positive = values[values > 0]
    low = max(float(np.quantile(positive, 0.02)), 1e-3) if len(positive) else 1e-3
    return mpl.colors.LogNorm(low, max(float(values.max()), 2 * low))


def plain_picture(sample: SampleTokens) -> Image.Image:
    """The sample's image at the size that the report shows."""
    assert sample.image is not None
    picture = sample.image.copy()
    picture.thumbnail((_WIDEST, _WIDEST))
    factor = max(1, _WIDEST // max(picture.size))
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def heat_picture(sample: SampleTokens, norm: mpl.colors.Normalize) -> Image.Image:
    """The grey image with each token's importance as a colour on top."""
    return _under(sample, mpl.colormaps[HEAT](norm(np.maximum(sample.image_values, norm.vmin or 0.0))))


def set_picture(sample: SampleTokens) -> Image.Image:
    """The grey image with each token's share of the sets as a colour on top."""
    return _under(sample, SET_COLORS(SET_NORM(sample.image_share)))


def _under(sample: SampleTokens, rgba: NDArray[np.float64]) -> Image.Image:
    picture = plain_picture(sample).convert("L").convert("RGB")
    return Image.blend(picture, _on_grid(sample, rgba[:, :3], picture.size), 0.72)


def _on_grid(sample: SampleTokens, colors: NDArray[np.float64], size: tuple[int, int]) -> Image.Image:
    """Colours [image tokens, 3] in [0, 1] as an image of ``size``, a rectangle per token."""
    assert sample.grid is not None
    cells = np.rint(255 * colors).astype(np.uint8).reshape(*sample.grid, 3)
    return Image.fromarray(cells).resize(size, Image.Resampling.NEAREST)


def text_colors(values: NDArray[np.float64], norm: mpl.colors.Normalize) -> list[tuple[str, str]]:
    """(background, ink) of each text token as hex colours; ink is black or white, whichever is readable."""
    colors = mpl.colormaps[HEAT](norm(np.maximum(values, norm.vmin or 0.0)))
    luminance = colors[:, :3] @ np.array([0.2126, 0.7152, 0.0722])
    inks = np.where(luminance < 0.42, "#ffffff", "#000000")
    return [(mpl.colors.to_hex(color), str(ink)) for color, ink in zip(colors, inks, strict=True)]
