"""The demo world: small deterministic pictures that a small model can learn to read.

A *scene* describes the content of a picture; ``render`` draws it and ``cell_labels`` labels its cells.
The canvas is a grid of 16-pixel cells, one per merged vision token (patch 8, merge 2), and most of it is background.
There are four kinds of scene: two signs with words, a bar chart, a line of characters, groups of shapes to count.

Every scene has a key, its content without position or jitter, and the key's hash decides its split: no sign pair,
chart, string or set of shapes of the training split can occur among calibration or test scenes.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 16
COLUMNS, ROWS = 10, 5
WIDTH, HEIGHT = COLUMNS * CELL, ROWS * CELL

Kind = Literal["signs", "chart", "text", "shapes"]
Split = Literal["train", "calibration", "test"]
TextStyle = Literal["regular", "irregular", "artistic", "non-semantic", "digits"]

KINDS: tuple[Kind, ...] = get_args(Kind)
TEXT_STYLES: tuple[TextStyle, ...] = get_args(TextStyle)

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 40),
    "green": (35, 150, 55),
    "blue": (45, 80, 220),
    "yellow": (240, 205, 35),
    "purple": (150, 50, 180),
    "black": (30, 30, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SHAPE_COLOURS = ("red", "green", "blue", "yellow")  # four, so that one list of options serves every question
BACKGROUNDS = ((250, 250, 250), (232, 238, 244), (244, 238, 224), (226, 240, 228))
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"  # no I and O: strings are read without context
DIGITS = "0123456789"
GLYPHS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + DIGITS
BAR_VALUES = range(1, 10)
COUNTS = range(1, 5)

_WORDS = """
    ACORN ALBUM ALLEY APPLE ARENA BACON BAKER BANK BARN BASIN BEACH BEAR BELL BIKE BIRD BOAT BOOK BOOT
    BRICK BUS CABIN CAFE CAKE CAMP CANDY CAR CEDAR CHEF CHESS CITY CLAY CLOCK CLUB COAL COAST COCOA
    CORAL CORN CRAB CREAM DAIRY DANCE DELTA DESK DINER DOCK DOOR DOVE DREAM DRUM DUCK DUSK EAGLE EARTH
    EAST EGG ELBOW ELM EMBER ENTRY EXIT FABLE FARM FERRY FIELD FILM FIRE FISH FLAG FLOUR FORD FORK FOX
    FROG FRUIT GALA GAME GATE GIANT GIFT GLASS GOAT GOLD GOLF GRAIN GRAPE GULF GYM HALL HARP HAWK HERB
    HILL HOME HONEY HORN HOTEL HOUSE ICE INK INN IRIS IRON ISLE IVORY IVY JADE JAM JAZZ JET JEWEL JOKER
    JUDGE JUICE KAYAK KEY KING KIOSK KITE KIWI KNIFE KNOT LAKE LAMP LANE LEMON LIBRA LILY LIME LION
    LOBBY LODGE MAPLE MELON METRO MILK MILL MINT MOON MOTEL MUSIC NEST NET NORTH NOVEL NURSE NUT OAK
    OASIS OCEAN OLIVE ONION OPERA ORBIT OTTER OVEN OWL PALM PAPER PARK PEACH PEARL PIANO PIER PILOT PINE
    PIZZA PLAZA POND PORT QUAIL QUEEN QUILL QUIZ RADIO RANCH RAVEN REEF RICE RIVER ROAD ROBIN ROSE RUBY
    RUGBY SALON SALT SEAL SHOP SILK SKI SNOW SOAP SOUP SPA STAR STOP TAXI TEA TENT TIGER TOAST TOWER
    TRAIL TRAIN TULIP TUNA ULTRA UNION URBAN USHER VALE VALVE VAN VAULT VET VILLA VINE VIOLA VISTA WAFER
    WAGON WATER WELL WEST WHALE WHEAT WINE WOLF WOOD YACHT YARD YARN YOGA YOLK ZEBRA ZINC ZONE ZOO
"""
SIGN_WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Sign:
    """A coloured plate with a word, one letter per cell, starting at (row, column)."""

    word: str
    colour: str
    row: int
    column: int


@dataclass(frozen=True)
class Bar:
    """A bar of a chart on the bottom row, with its value printed at its foot."""

    colour: str
    value: int
    column: int


@dataclass(frozen=True)
class Text:
    """A line of characters, one per cell, starting at (row, column), with one ink colour per character."""

    text: str
    style: TextStyle
    colours: tuple[str, ...]
    row: int
    column: int


@dataclass(frozen=True)
class Group:
    """Several equal shapes, each in a separate cell (row, column)."""

    shape: str
    colour: str
    cells: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        return len(self.cells)


Item = Sign | Bar | Text | Group


@dataclass(frozen=True)
class Scene:
    """Content of one picture; ``jitter`` seeds the small displacements and tints of its drawing."""

    kind: Kind
    items: tuple[Item, ...]
    jitter: int

    @property
    def signs(self) -> list[Sign]:
        """The signs from top to bottom."""
        return [item for item in self.items if isinstance(item, Sign)]

    @property
    def bars(self) -> list[Bar]:
        """The bars from left to right."""
        return [item for item in self.items if isinstance(item, Bar)]

    @property
    def groups(self) -> list[Group]:
        return [item for item in self.items if isinstance(item, Group)]

    @property
    def line(self) -> Text:
        (line,) = [item for item in self.items if isinstance(item, Text)]
        return line

    @property
    def key(self) -> str:
        """The content that splits must not share, without position, jitter and, for signs and text, colour."""
        match self.kind:
            case "signs":
                content = "+".join(sorted(sign.word for sign in self.signs))
            case "chart":
                content = "+".join(f"{bar.colour}{bar.value}" for bar in self.bars)
            case "text":
                content = self.line.text
            case "shapes":
                content = "+".join(sorted(f"{g.count}{g.colour}{g.shape}" for g in self.groups))
        return f"{self.kind}:{content}"


def split_of(scene: Scene) -> Split:
    """The split that a scene belongs to, by the hash of its key: 80 % train, 10 % calibration, 10 % test."""
    bucket = int.from_bytes(hashlib.sha256(scene.key.encode()).digest()[:4]) % 10
    return "train" if bucket < 8 else "calibration" if bucket == 8 else "test"


# --- drawing scenes at random -------------------------------------------------------------------------------------


def _random_signs(rng: random.Random) -> tuple[Item, ...]:
    """Two signs, one in the upper and one in the lower half, different in colour and first letter."""
    first = rng.choice(SIGN_WORDS)
    second = rng.choice([word for word in SIGN_WORDS if word[0] != first[0]])
    colours = rng.sample(list(COLOURS), 2)
    rows = (rng.randrange(ROWS // 2), rng.randrange(ROWS - ROWS // 2, ROWS))
    return tuple(
        Sign(word, colour, row, rng.randint(0, COLUMNS - len(word)))
        for word, colour, row in zip((first, second), colours, rows, strict=True)
    )


def _random_chart(rng: random.Random) -> tuple[Item, ...]:
    """Three or four bars in every other column, all different in colour and value."""
    n = rng.choice((3, 4))
    start = rng.randint(0, COLUMNS - 2 * n + 1)
    colours, values = rng.sample(list(COLOURS), n), rng.sample(BAR_VALUES, n)
    return tuple(Bar(colours[i], values[i], start + 2 * i) for i in range(n))


def _random_string(style: TextStyle, rng: random.Random) -> str:
    """A pronounceable name for the word styles, random characters for the others."""
    if style == "digits":
        return "".join(rng.choices(DIGITS, k=rng.randint(4, 6)))
    if style == "non-semantic":
        return "".join(rng.choices(LETTERS + DIGITS, k=rng.randint(4, 6)))
    pattern = rng.choice(("CVCV", "CVCVC", "VCVC", "CVCCV", "CVCCVC"))
    return "".join(rng.choice("AEU" if slot == "V" else "BCDFGHJKLMNPRSTVWXZ") for slot in pattern)


def _random_text(rng: random.Random) -> tuple[Item, ...]:
    style = rng.choice(TEXT_STYLES)
    text = _random_string(style, rng)
    if style == "artistic":
        colours = tuple(rng.choices(list(COLOURS), k=len(text)))
    else:
        colours = (rng.choice(list(COLOURS)),) * len(text)
    return (Text(text, style, colours, rng.randrange(ROWS), rng.randint(0, COLUMNS - len(text))),)


def _random_shapes(rng: random.Random) -> tuple[Item, ...]:
    """Two or three groups of one to four shapes, all groups different in shape and colour."""
    n = rng.choice((2, 3))
    counts = [rng.choice(COUNTS) for _ in range(n)]
    cells = rng.sample([(row, column) for row in range(ROWS) for column in range(COLUMNS)], sum(counts))
    shapes, colours = rng.sample(SHAPES, n), rng.sample(SHAPE_COLOURS, n)
    ends = np.cumsum(counts).tolist()
    return tuple(
        Group(shape, colour, tuple(sorted(cells[end - count : end])))
        for shape, colour, count, end in zip(shapes, colours, counts, ends, strict=True)
    )


_RANDOM_ITEMS: dict[Kind, Callable[[random.Random], tuple[Item, ...]]] = {
    "signs": _random_signs,
    "chart": _random_chart,
    "text": _random_text,
    "shapes": _random_shapes,
}


def random_scene(kind: Kind, split: Split, rng: random.Random) -> Scene:
    """A scene of ``kind`` whose key belongs to ``split``, by rejection sampling."""
    while True:
        scene = Scene(kind, _RANDOM_ITEMS[kind](rng), rng.getrandbits(32))
        if split_of(scene) == split:
            return scene


# --- drawing pictures ---------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _glyph(character: str, size: int) -> Image.Image:
    """A [20, 20] mask of one character, centred."""
    mask = Image.new("L", (20, 20))
    font = ImageFont.load_default(size)
    ImageDraw.Draw(mask).text((10, 10), character, fill=255, font=font, anchor="mm")
    return mask


def _tint(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, channel + rng.randint(-12, 12))) for channel in colour)
    return red, green, blue


def _ink_on(colour: str) -> tuple[int, int, int]:
    return (20, 20, 20) if colour == "yellow" else (252, 252, 252)


def _paste_glyph(
    image: Image.Image, glyph: Image.Image, row: int, column: int, ink: tuple[int, int, int], shift: tuple[int, int]
) -> None:
    left, top = column * CELL - 2 + shift[0], row * CELL - 2 + shift[1]
    image.paste(ink, (left, top, left + 20, top + 20), glyph)


def _draw_sign(image: Image.Image, sign: Sign, rng: random.Random) -> None:
    left, top = sign.column * CELL, sign.row * CELL
    box = (left, top + rng.randint(0, 1), left + len(sign.word) * CELL - 1, top + CELL - 1 - rng.randint(0, 1))
    ImageDraw.Draw(image).rectangle(box, fill=_tint(COLOURS[sign.colour], rng))
    shift, size = (rng.randint(-1, 1), rng.randint(-1, 1)), rng.choice((14, 15))
    for i, letter in enumerate(sign.word):
        _paste_glyph(image, _glyph(letter, size), sign.row, sign.column + i, _ink_on(sign.colour), shift)


def _bar_height(bar: Bar) -> int:
    """Pixels from the bottom of the picture to the top of the bar."""
    return 8 + 7 * bar.value


def _draw_bar(image: Image.Image, bar: Bar, rng: random.Random) -> None:
    left = bar.column * CELL + rng.randint(0, 1)
    box = (left, HEIGHT - _bar_height(bar), left + CELL - 2, HEIGHT - 1)
    ImageDraw.Draw(image).rectangle(box, fill=_tint(COLOURS[bar.colour], rng))
    glyph = _glyph(str(bar.value), 13)
    _paste_glyph(image, glyph, ROWS - 1, bar.column, _ink_on(bar.colour), (rng.randint(-1, 1), rng.randint(1, 2)))


def _draw_text(image: Image.Image, line: Text, rng: random.Random) -> None:
    size, drift = rng.choice((14, 15, 16)), (rng.randint(-1, 1), rng.randint(-1, 1))
    for i, (character, colour) in enumerate(zip(line.text, line.colours, strict=True)):
        glyph, shift = _glyph(character, size), drift
        if line.style == "irregular":
            glyph = glyph.rotate(rng.uniform(-12, 12), Image.Resampling.BILINEAR)
            shift = (drift[0], rng.randint(-2, 2))
        _paste_glyph(image, glyph, line.row, line.column + i, _tint(COLOURS[colour], rng), shift)


def _draw_group(image: Image.Image, group: Group, rng: random.Random) -> None:
    draw, colour = ImageDraw.Draw(image), _tint(COLOURS[group.colour], rng)
    for row, column in group.cells:
        x, y = column * CELL + 8 + rng.randint(-1, 1), row * CELL + 8 + rng.randint(-1, 1)
        r = rng.choice((5, 6))
        match group.shape:
            case "circle":
                draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
            case "square":
                draw.rectangle((x - r, y - r, x + r, y + r), fill=colour)
            case "triangle":
                draw.polygon(((x - r, y + r), (x + r, y + r), (x, y - r)), fill=colour)
            case "cross":
                draw.rectangle((x - r, y - 2, x + r, y + 1), fill=colour)
                draw.rectangle((x - 2, y - r, x + 1, y + r), fill=colour)


def render(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, [HEIGHT, WIDTH]; the same scene always gives the same bytes."""
    rng = random.Random(scene.jitter)
    image = Image.new("RGB", (WIDTH, HEIGHT), rng.choice(BACKGROUNDS))
    for item in scene.items:
        match item:
            case Sign():
                _draw_sign(image, item, rng)
            case Bar():
                _draw_bar(image, item, rng)
            case Text():
                _draw_text(image, item, rng)
            case Group():
                _draw_group(image, item, rng)
    return image


# --- labels of the cells -------- ---------------------------------------------------------------------------------

CELL_CLASSES = {"glyph": len(GLYPHS) + 1, "colour": len(COLOURS) + 1, "thing": 3 + len(SHAPES) + 1, "fill": CELL + 1}


def cell_labels(scene: Scene) -> dict[str, np.ndarray]:
    """Class of every cell, [ROWS, COLUMNS] int64 per head of ``CELL_CLASSES``; class 0 means that the cell has none.

    ``thing`` is sign, bar, character or one of the shapes; ``fill`` is the number of pixel rows that a bar covers.
    """
    labels = {name: np.zeros((ROWS, COLUMNS), dtype=np.int64) for name in CELL_CLASSES}
    palette = list(COLOURS)

    def mark(row: int, column: int, thing: int, colour: str, glyph: str = "") -> None:
        labels["thing"][row, column] = thing
        labels["colour"][row, column] = 1 + palette.index(colour)
        labels["glyph"][row, column] = 1 + GLYPHS.index(glyph) if glyph else 0

    for item in scene.items:
        match item:
            case Sign():
                for i, letter in enumerate(item.word):
                    mark(item.row, item.column + i, 1, item.colour, letter)
            case Bar():
                for row in range(ROWS):
                    covered = min(CELL, max(0, _bar_height(item) - (ROWS - 1 - row) * CELL))
                    if covered:
                        mark(row, item.column, 2, item.colour, str(item.value) if row == ROWS - 1 else "")
                        labels["fill"][row, item.column] = covered
            case Text():
                for i, (character, colour) in enumerate(zip(item.text, item.colours, strict=True)):
                    mark(item.row, item.column + i, 3, colour, character)
            case Group():
                for row, column in item.cells:
                    mark(row, column, 4 + SHAPES.index(item.shape), item.colour)
    return labels
