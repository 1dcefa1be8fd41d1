"""Embed figures and pictures in an HTML page, without extra files and with the page's light or dark colours."""

from __future__ import annotations

import base64
import hashlib
import io
import re

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

from tasks.report.charts import GRID, INK, MUTED, SERIES, SURFACE

#: Colours of the charts, and the CSS variables that replace them on the page.
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    SURFACE: "--surface",
    **{color: f"--series-{number}" for number, color in enumerate(SERIES, 1)},
}


def svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an ``<svg>`` element.

    Args:
        name: unique on the page; ids inside begin with it.
        title: description of the chart for screen readers.
    """
    buffer = io.StringIO()
    salt = hashlib.sha256(name.encode()).hexdigest()
    with mpl.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\b(id="|href="#)', rf"\g<1>{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    for color, variable in VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r'(<svg [^>]*?)width="[^"]*"', r"\1", text, count=1, flags=re.S)
    text = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", text, count=1, flags=re.S)
    label = Markup.escape(title)
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1))


def png_uri(picture: Image.Image) -> str:
    """The picture as a ``data:`` URI."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def jpeg_uri(picture: Image.Image) -> str:
    """An RGB picture as a ``data:`` URI: a photograph takes a fraction of a PNG's bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
