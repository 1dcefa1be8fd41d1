"""Contrast of the page's text, by the formula of WCAG 2, in light and in dark colours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tasks.report

CSS = (Path(tasks.report.__file__).parent / "templates/page.css").read_text()
LEAST = 4.5  # level AA, for text of any size
DARK = "@media (prefers-color-scheme: dark)"
#: Backgrounds by the variable of the text on them.
GROUNDS = {
    "--link": ("--page", "--surface"),
    "--muted": ("--page", "--surface"),
    "--ink": ("--page", "--surface", "--notice"),
}


def variables(scheme: str) -> dict[str, str]:
    """The colours of a scheme; dark ones replace light ones."""
    light, dark = CSS.split(DARK)
    found = dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", light))
    return found | (dict(re.findall(r"(--[\w-]+): (#[0-9a-f]{6})", dark)) if scheme == "dark" else {})


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(first: str, second: str) -> float:
    lighter, darker = sorted((luminance(first), luminance(second)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def test_the_formula_gives_the_known_values() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("text", GROUNDS)
def test_text_and_links_have_enough_contrast(scheme: str, text: str) -> None:
    colors = variables(scheme)
    for ground in GROUNDS[text]:
        assert contrast(colors[text], colors[ground]) >= LEAST, f"{text} on {ground}"


def test_every_text_has_one_of_these_colours() -> None:
    used = set(re.findall(r"(?<![\w-])color: (.*?);", CSS.replace("color-scheme:", "")))
    assert used == {f"var({name})" for name in GROUNDS}
    for selector in ("a", "summary"):
        assert re.search(rf"^{selector} \{{[^}}]*color: var\(--link\)", CSS, re.M)
