"""The report in a browser: desktop and phone, light and dark."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install '.[dev]'")

CHROMIUM = os.environ.get("TLQ_CHROMIUM") or shutil.which("chromium") or ""
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium, or set TLQ_CHROMIUM to its path"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield chromium
        chromium.close()


class Opened:
    """The report in a new window, with the browser's errors and requests."""

    def __init__(self, browser: Any, report: Path, width: int, colors: str) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=colors)
        self.page = context.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_renders(browser: Any, reported: Path, width: int, colors: str) -> None:
    report = reported / "report/index.html"
    opened = Opened(browser, report, width, colors)
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [report.as_uri()]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    wide = opened.page.eval_on_selector_all(
        "figure, p, h1, h2, pre, .scroll, .tile",
        "all => all.filter(each => each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML)",
    )
    assert wide == []
    broken = opened.page.eval_on_selector_all(
        "img", "all => all.filter(each => !each.complete || !each.naturalWidth).length"
    )
    assert broken == 0
    heights = opened.page.eval_on_selector_all("figure svg", "all => all.map(each => each.clientHeight)")
    assert min(heights) > 60


def test_letters_of_charts_can_be_read_on_a_phone(browser: Any, reported: Path) -> None:
    page = Opened(browser, reported / "report/index.html", 390, "light").page
    sizes = page.eval_on_selector_all(
        "figure svg text",
        """all => all.map(each => {
            const {a, b} = each.getScreenCTM()  // of upright and of turned text
            return parseFloat(getComputedStyle(each).fontSize) * Math.hypot(a, b)
        })""",
    )
    assert min(sizes) >= 9


@pytest.mark.parametrize("width", [390, 1280])
def test_every_score_is_seen_without_scrolling_sideways(browser: Any, reported: Path, width: int) -> None:
    """On a phone every cell is below its own label, in letters of 12 pixels at least."""
    page = Opened(browser, reported / "report/index.html", width, "light").page
    cells = page.eval_on_selector_all(
        "section#scores table.blocks td",
        """all => all.map(each => {
            const {left, right} = each.getBoundingClientRect()
            const frame = each.closest('.scroll').getBoundingClientRect()
            const label = getComputedStyle(each, '::before')
            const inside = left >= frame.left - 1 && right <= frame.right + 1
            return {inside, wide: each.scrollWidth > each.clientWidth, label: label.content,
                    size: parseFloat(label.fontSize)}
        })""",
    )
    assert len(cells) > 20
    assert all(cell["inside"] and not cell["wide"] for cell in cells)
    labels = [cell["label"] for cell in cells[:7]]
    names = ["demo_textvqa", "demo_mmmu", "mean", "retention %", "KL", "NLL", "gate"]
    assert labels == ([f'"{name}"' for name in names] if width == 390 else ["none"] * 7)
    if width == 390:
        assert min(cell["size"] for cell in cells) >= 12


def test_letters_stand_out_in_both_colour_schemes(browser: Any, reported: Path) -> None:
    luminance = """() => {
        const gray = text => { const [r, g, b] = text.match(/[\\d.]+/g).map(Number); return (r + g + b) / 3 }
        const style = getComputedStyle(document.querySelector('figure svg text'))
        return [gray(style.fill), gray(getComputedStyle(document.querySelector('section#scores')).backgroundColor)]
    }"""
    for colors, dark in (("light", False), ("dark", True)):
        letters, ground = Opened(browser, reported / "report/index.html", 1280, colors).page.evaluate(luminance)
        assert (ground < letters) == dark
        assert abs(ground - letters) > 80
