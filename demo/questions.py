"""Questions about scenes: the text after the image in the user turn, and the answer.

Benchmark questions (``signs``, ``chart``, ``text``, ``shapes``) have exactly the wording of the task, with
the suffix. Study questions are for training only: they are short, ask for dense answers ("list the bars.") or for
single steps of a longer question, and have no suffix.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from demo.world import COLOURS, COUNTS, ROWS, SHAPE_COLOURS, SHAPES, SIGN_WORDS, Bar, Group, Kind, Scene

SUFFIX: dict[Kind, str] = {
    "signs": "\nAnswer the question using a single word or phrase.",
    "chart": "\nAnswer the question with a single word.",
    "text": "",
    "shapes": "\n\nAnswer with the option's letter from the given choices directly.",
}
LETTERS = "ABCD"
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}


@dataclass(frozen=True)
class Question:
    """A question, its answer and its options.

    Attributes:
        text: without suffix and options.
        answer: the reply, or the letter of the right option if there are ``options``.
    """

    skill: str
    text: str
    answer: str
    options: tuple[str, ...] = field(default=())
    suffix: str = ""

    @property
    def prompt(self) -> str:
        """The whole text of the user turn, with options as lines "A. ..." after the question."""
        lines = (f"\n{letter}. {option}" for letter, option in zip(LETTERS, self.options, strict=False))
        return self.text + "".join(lines) + self.suffix


def _choice(skill: str, text: str, right: str, options: Sequence[str]) -> Question:
    """A multiple-choice question; options keep the given order (rising counts, fixed order of colours and shapes)."""
    return Question(skill, text, LETTERS[options.index(right)], tuple(options))


# --- questions of the benchmarks ----------------------------------------------------------------------------------


def sign_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions about the words of both signs, by colour and by place, and about their colours."""
    questions = []
    for place, sign in zip(("top", "bottom"), scene.signs, strict=True):
        word, colour = sign.word, sign.colour
        questions += [
            Question("word by colour", f"What is written on the {colour} sign?", word),
            Question("word by place", f"What is written on the {place} sign?", word),
            Question("colour by place", f"What colour is the {place} sign?", colour),
        ]
    return questions


def chart_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Questions about the value of each bar, and about the colour of the highest and of the lowest bar."""
    bars = sorted(scene.bars, key=lambda bar: bar.value)
    values = [Question("value", f"What is the value of the {bar.colour} bar?", str(bar.value)) for bar in scene.bars]
    extremes = [
        Question("highest", "What colour is the highest bar?", bars[-1].colour),
        Question("lowest", "What colour is the lowest bar?", bars[0].colour),
    ]
    return values + extremes


def text_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """The question about the line of characters, in OCRBench's words."""
    line = scene.line
    noun = "what is the number in the image?" if line.style == "digits" else "what is written in the image?"
    return [Question(line.style, noun, line.text)]


def _group_question(skill: str, group: Group) -> Question:
    counts = [str(count) for count in COUNTS]
    if skill == "count by shape":
        return _choice(skill, f"How many {PLURALS[group.shape]} are there?", str(group.count), counts)
    if skill == "count by colour":
        return _choice(skill, f"How many {group.colour} shapes are there?", str(group.count), counts)
    if skill == "colour by shape":
        return _choice(skill, f"What colour are the {PLURALS[group.shape]}?", group.colour, SHAPE_COLOURS)
    return _choice(skill, f"What shape are the {group.colour} ones?", group.shape, SHAPES)


SHAPE_SKILLS = ("count by shape", "count by colour", "colour by shape", "shape by colour")


def shape_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Multiple-choice questions about count, colour and shape of each group."""
    return [_group_question(skill, group) for group in scene.groups for skill in SHAPE_SKILLS]


_BENCHMARK: dict[Kind, Callable[[Scene, random.Random], list[Question]]] = {
    "signs": sign_questions,
    "chart": chart_questions,
    "text": text_questions,
    "shapes": shape_questions,
}


def benchmark_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every benchmark question about a scene, with its suffix."""
    suffix = SUFFIX[scene.kind]
    return [replace(question, suffix=suffix) for question in _BENCHMARK[scene.kind](scene, rng)]


def benchmark_question(scene: Scene, rng: random.Random) -> Question:
    """One benchmark question about a scene, with equal probability for every skill."""
    questions = benchmark_questions(scene, rng)
    skill = rng.choice(sorted({question.skill for question in questions}))
    return rng.choice([question for question in questions if question.skill == skill])


# --- questions for training only ----------------------------------------------------------------------------------


def _study_signs(scene: Scene, rng: random.Random) -> list[Question]:
    sign, word = rng.choice(scene.signs), rng.choice(SIGN_WORDS)
    place = "top" if sign is scene.signs[0] else "bottom"
    return [
        Question("spell", f"Spell {word.lower()}.", word),
        Question("place by word", f"Where is {sign.word.lower()}?", place),
        Question("list", "List the signs.", ", ".join(f"{s.colour} {s.word}" for s in scene.signs)),
        Question("list", "List the words.", ", ".join(s.word for s in scene.signs)),
    ]


def _study_chart(scene: Scene, rng: random.Random) -> list[Question]:
    def listing(bars: list[Bar]) -> str:
        return ", ".join(f"{bar.colour} {bar.value}" for bar in bars)

    bar = rng.choice(scene.bars)
    rising = sorted(scene.bars, key=lambda bar: bar.value)
    return [
        Question("list", "List the bars.", listing(scene.bars)),
        Question("list", "List the bars from low to high.", listing(rising)),
        Question("list", "List the bars from high to low.", listing(rising[::-1])),
        Question("colour by value", f"What colour is the bar with value {bar.value}?", bar.colour),
    ]


def _study_text(scene: Scene, rng: random.Random) -> list[Question]:
    line = scene.line
    spot = rng.randrange(len(line.text))
    order = ("first", "second", "third", "fourth", "fifth", "sixth")[spot]
    return [
        Question("list", "List the characters.", " ".join(line.text)),
        Question("list", "List the colours.", " ".join(line.colours)),
        Question("first", "What is the first character?", line.text[0]),
        Question("last", "What is the last character?", line.text[-1]),
        Question("colour", f"What colour is the {order} character?", line.colours[spot]),
        Question("character", f"What is the {order} character?", line.text[spot]),
    ]


def _study_shapes(scene: Scene, rng: random.Random) -> list[Question]:
    group = rng.choice(scene.groups)
    ordered = sorted(scene.groups, key=lambda group: SHAPES.index(group.shape))
    listing = ", ".join(f"{g.count} {g.colour} {PLURALS[g.shape]}" for g in ordered)
    rows = [sum(row == cell_row for g in scene.groups for cell_row, _ in g.cells) for row in range(ROWS)]
    return [
        Question("list", "List the shapes.", listing),
        Question("rows", "How many shapes are in each row?", " ".join(str(n) for n in rows)),
        Question("count by shape", f"How many {PLURALS[group.shape]} are there?", str(group.count)),
        Question("count by colour", f"How many {group.colour} shapes are there?", str(group.count)),
        Question("colour by shape", f"What colour are the {PLURALS[group.shape]}?", group.colour),
        Question("shape by colour", f"What shape are the {group.colour} ones?", group.shape),
    ]


_STUDY: dict[Kind, Callable[[Scene, random.Random], list[Question]]] = {
    "signs": _study_signs,
    "chart": _study_chart,
    "text": _study_text,
    "shapes": _study_shapes,
}


def study_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Study questions about a scene, without suffix."""
    return _STUDY[scene.kind](scene, rng)


def option_question(rng: random.Random) -> Question:
    """A question that needs no picture: the letters of some options, or the options of some letters.

    Only these questions teach the step from an answer to its letter, which every question about shapes needs. Half of
    the answers contain letters and options, so that the model can learn the lookup token by token first.
    """
    pool = rng.choice(([str(count) for count in COUNTS], list(COLOURS), list(SHAPES)))
    options = tuple(rng.sample(pool, rng.choice((2, 3, 4, 4))))
    asked = rng.sample(range(len(options)), rng.randint(1, min(3, len(options))))
    letters, names = [LETTERS[i] for i in asked], [options[i] for i in asked]
    by_name, both, suffix = rng.random() < 0.75, rng.random() < 0.5, SUFFIX["shapes"] if rng.random() < 0.2 else ""
    keys, values = (names, letters) if by_name else (letters, names)
    if both:
        pairs = ", ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
        return Question("pairs", f"List option {', '.join(keys)}.", pairs, options, suffix)
    if by_name:
        return Question("option", f"Which option is {', '.join(keys)}?", ", ".join(values), options, suffix)
    return Question("letter", f"What is option {', '.join(keys)}?", ", ".join(values), options, suffix)
