"""The report's pictures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tasks.pictures import TokenPicture, draw_scores, draw_tokens, grid_shape
from tasks.report import _spread
from tlq.samples import Sample


@pytest.mark.parametrize(
    ("tokens", "width", "height", "shape"),
    [(50, 160, 80, (5, 10)), (32, 128, 64, (4, 8)), (12, 30, 40, (4, 3)), (7, 100, 100, (1, 7))],
)
def test_token_grid_follows_the_aspect_ratio(tokens: int, width: int, height: int, shape: tuple[int, int]) -> None:
    rows, columns = grid_shape(tokens, width, height)
    assert {(rows, columns), (columns, rows)} >= {shape}
    assert rows * columns == tokens


def test_token_picture_outlines_the_chosen_image_tokens() -> None:
    picture = TokenPicture(
        title="one",
        image=Image.new("RGB", (64, 32)),
        image_values=np.array([0.1, 2.0, 0.3, 0.4, 0.5, 0.6, 0.7, 3.0], np.float32),
        texts=["what", "\n", "is"],
        text_values=np.array([1.0, 0.2, 5.0], np.float32),
        chosen_image=np.array([0, 1, 0, 0, 0, 0, 0, 1], bool),
        chosen_texts=np.array([1, 0, 1], bool),
    )
    figure = draw_tokens([picture])
    left, right = figure.axes[:2]
    assert [patch.get_xy() for patch in left.patches] == [(1.04, 0.04), (3.04, 1.04)]
    assert [text.get_text() for text in right.texts] == ["what", "⏎", "is"]


def test_scores_are_drawn_with_their_intervals() -> None:
    frame = pd.DataFrame(
        [("full", "a", 80.0, 75.0, 85.0), ("rtn-w3a16", "a", 60.0, 50.0, 70.0)],
        columns=["variant", "benchmark", "score", "low", "high"],
    )
    (axes,) = draw_scores(frame).axes
    assert [bar.get_width() for bar in axes.patches] == [80.0, 60.0]


def test_samples_shown_come_from_different_sources() -> None:
    samples = [Sample(str(index), [], [], source) for index, source in enumerate("aaabbc")]
    assert _spread(samples, 4) == [0, 3, 5, 1]
