"""MMMU: college-level questions with up to seven images, multiple choice or open.

Replies are parsed as lmms-eval parses them, which is the official parser with the form "A." in addition and with a
tie-break in place of a guess. Open questions follow the official evaluation: lmms-eval keeps a single parsed candidate
and compares its characters, so that no open answer is ever right there; its score is an additional metric
(`accuracy_lmms_eval`).
"""

import ast
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

CHOICE_SUFFIX = "\n\nAnswer with the option's letter from the given choices directly."
OPEN_SUFFIX = "\n\nAnswer the question using a single word or phrase."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
IMAGE_MENTION = re.compile(r"<image (\d)>")
MAX_IMAGES = 7

DISCIPLINES = {
    "art_and_design": "Art Art_Theory Design Music",
    "business": "Accounting Economics Finance Manage Marketing",
    "science": "Biology Chemistry Geography Math Physics",
    "health_and_medicine": (
        "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health"
    ),
    "humanities_and_social_science": "History Literature Sociology Psychology",
    "tech_and_engineering": (
        "Agriculture Architecture_and_Engineering Computer_Science Electronics Energy_and_Power Materials "
        "Mechanical_Engineering"
    ),
}
DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects.split()}

STRIPPED_MARKS = ",.!?;:'"
LONG_REPLY_WORDS = 5
INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
TRIVIAL_REPLIES = frozenset(":,.!?;'")
# Faster forms of the official patterns with the same matches: a number starts where a run of digits starts, and
# matching does not backtrack into a run. The official patterns take time quadratic in the number of digits.
NUMBER_PATTERNS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?(?<!\d)\d++(?:\.\d++)?[eE][+-]?\d+"),
    re.compile(r"-?(?:(?<!\d)\d++\.\d++|\.\d++|(?<!\d)\d++\b)(?![eE][+-]?\d+)(?![,\d])"),
)


# --- Prompt ---------------------------------------------------------------------------------------


def options(doc: Mapping[str, Any]) -> list[str]:
    """Options of a question; the hub data set stores them as the text of a Python list."""
    value = doc["options"]
    try:
        parsed = ast.literal_eval(value) if isinstance(value, str) else value
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"MMMU {doc['id']}: options are not a list: {value!r:.80}") from error
    return [str(option) for option in parsed]


def is_choice(doc: Mapping[str, Any]) -> bool:
    return doc["question_type"] == "multiple-choice"


def _text(doc: Mapping[str, Any], suffix: str | None = None) -> str:
    """Question, options as lettered lines, and instruction, with unchanged image mentions."""
    question = doc["question"].replace("<image>", "image")
    if not is_choice(doc):
        return question + (OPEN_SUFFIX if suffix is None else suffix)
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options(doc), strict=False)]
    return "\n".join([question, *lines]) + (CHOICE_SUFFIX if suffix is None else suffix)


def _image_numbers(doc: Mapping[str, Any]) -> list[int]:
    """Numbers of the images in the order of the model's inputs.

    Images that the text never mentions come first, the others follow in the order of their first mention.
    """
    present = [n for n in range(1, MAX_IMAGES + 1) if doc.get(f"image_{n}") is not None]
    mentioned = [int(number) for number in IMAGE_MENTION.findall(_text(doc))]
    ordered = [n for n in dict.fromkeys(mentioned) if n in present]
    return [n for n in present if n not in ordered] + ordered


def images(doc: Mapping[str, Any]) -> list[Any]:
    """Images of a question, one per placeholder of the prompt and in the same order."""
    return [doc[f"image_{number}"] for number in _image_numbers(doc)]


def prompt(doc: Mapping[str, Any], suffix: str | None = None) -> str:
    """Prompt with one `<image>` placeholder per image; `suffix` replaces the instruction of both kinds of question.

    An image is placed at its first mention; images that the text never mentions go before it. Later mentions, and
    mentions of images that do not exist, are written out ("image 2"). No blank follows a single image that comes first.
    """
    text, numbers = _text(doc, suffix), _image_numbers(doc)
    waiting = set(numbers)
    mentioned = {int(number) for number in IMAGE_MENTION.findall(text)}
    unmentioned = sum(number not in mentioned for number in numbers)

    def place(match: re.Match[str]) -> str:
        number = int(match[1])
        if number in waiting:
            waiting.discard(number)
            return "<image>"
        return f"image {number}"

    placed = "<image>" * unmentioned + IMAGE_MENTION.sub(place, text)
    return re.sub(r"^<image>\s+", "<image>", placed) if len(numbers) == 1 else placed


# --- Answers --------------------------------------------------------------------------------------


def choices(doc: Mapping[str, Any]) -> list[str]:
    """The letters that the model chooses between; none if the question is open."""
    return list(LETTERS[: len(options(doc))]) if is_choice(doc) else []


def answers(doc: Mapping[str, Any]) -> list[str]:
    """Accepted answers; an open question may store several as the text of a Python list."""
    value = doc["answer"]
    if isinstance(value, str) and not is_choice(doc) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            return [value]
    return [str(answer) for answer in value] if isinstance(value, list) else [str(value)]


def target(doc: Mapping[str, Any]) -> str:
    """First accepted answer, which NLL and KL use."""
    accepted = answers(doc)
    return accepted[0] if accepted else ""


def find_choices(reply: str, option_texts: Sequence[str]) -> tuple[list[str], str]:
    """Letters that a reply names, and the form in which they appear.

    Forms are tried in the order "(A)", "A ", "A." and, in a reply of more than five words, the option's own text.

    Returns:
        The letters in option order, and the format of the form ("({})", "{} ", "{}.", "text"; "" if none was found).
    """
    padded = _pad(reply)
    letters = LETTERS[: len(option_texts)]
    for form in ("({})", "{} ", "{}."):
        found = [letter for letter in letters if form.format(letter) in padded]
        if found:
            return found, form
    if len(padded.split()) > LONG_REPLY_WORDS:
        lowered = padded.lower()
        pairs = zip(letters, option_texts, strict=False)
        found = [letter for letter, text in pairs if text.lower() in lowered]
        if found:
            return found, "text"
    return [], ""


def _pad(reply: str) -> str:
    for mark in STRIPPED_MARKS:
        reply = reply.strip(mark)
    return f" {reply} "


def parse_choice(reply: str, option_texts: Sequence[str]) -> str | None:
    """Letter that a reply chooses, or None if it names none.

    Of several letters in parentheses, and of several option texts, the last counts. Of several bare letters the one
    that stands last between blanks counts, so that no word that ends in a letter ("DNA is") is an answer. If none
    stands between blanks, the first in option order counts, as in lmms-eval; the official code guesses.
    """
    letters, form = find_choices(reply, option_texts)
    if not letters:
        return None
    padded = _pad(reply)
    if form == "text":
        lowered = padded.lower()
        places = [lowered.rfind(option_texts[LETTERS.index(letter)].lower()) for letter in letters]
    else:
        looked_for = form if form == "({})" else " {} "
        places = [padded.rfind(looked_for.format(letter)) for letter in letters]
    return letters[places.index(max(places))]


def random_choice(doc: Mapping[str, Any], n_options: int) -> str:
    """Guess for a reply that names no option: random over items, fixed for each item."""
    if n_options == 0:
        return ""
    return random.Random(f"mmmu:{doc['id']}").choice(LETTERS[:n_options])


def normalize(text: str) -> list[str | float]:
    """A number rounded to two decimals, or lower-case text; a single letter matches only at the edge of a word."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def extract_numbers(text: str) -> list[str]:
    """Numbers in a text: with thousands separators, in scientific notation, or plain."""
    return [number for pattern in NUMBER_PATTERNS for number in pattern.findall(text)]


def key_phrases(reply: str) -> list[str]:
    """The shortest tail of each sentence after an indicator such as "is "; the whole reply without an indicator.

    As in the official code, only line ends split sentences (the code lower-cases the text before it searches a capital
    after the period). "=" is an indicator in the last sentence only.
    """
    whole = reply.strip().strip(".").lower()
    sentences = whole.split("\n")
    phrases = []
    for position, sentence in enumerate(sentences):
        indicators = (*INDICATORS, "=") if position == len(sentences) - 1 else INDICATORS
        shortest = ""
        for indicator in indicators:
            tail = sentence.rsplit(indicator, 1)[-1].strip() if indicator in sentence else None
            if tail is not None and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest and shortest not in TRIVIAL_REPLIES:
            phrases.append(shortest)
    return phrases or [whole]


def parse_open(reply: str) -> list[str | float]:
    """All candidate answers in a reply: normalised key phrases and the numbers in them, in order."""
    phrases = key_phrases(reply)
    texts = phrases + [number for phrase in phrases for number in extract_numbers(phrase)]
    return list(dict.fromkeys(candidate for text in texts for candidate in normalize(text)))


def is_open_correct(reply: str, accepted: Sequence[str]) -> bool:
    """Whether a candidate contains an accepted text or equals an accepted number."""
    wanted = [form for answer in accepted if answer.strip() for form in normalize(answer)]
    texts = [form for form in wanted if isinstance(form, str)]
    numbers = [form for form in wanted if isinstance(form, float)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in numbers
        for candidate in parse_open(reply)
    )


# --- Score ----------------------------------------------------------------------------------------


def subject(doc: Mapping[str, Any]) -> str:
    """Subject from an id such as validation_Art_Theory_12."""
    return "_".join(doc["id"].split("_")[1:-1])


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: accuracy, overall and by discipline, subject and question type; and `unparsed`."""
    reply = results[0]
    if not is_choice(doc):
        correct = float(is_open_correct(reply, answers(doc)))
        return {"accuracy": correct, "accuracy_lmms_eval": 0.0, "open": correct} | _parts(doc, correct)
    texts, accepted = options(doc), answers(doc)
    guess = random_choice(doc, len(texts))
    letter = parse_choice(reply, texts)
    correct = float((letter or guess) in accepted)
    return {
        "accuracy": correct,
        "accuracy_lmms_eval": correct,
        "unparsed": float(letter is None),
        "multiple_choice": correct,
    } | _parts(doc, correct)


def _parts(doc: Mapping[str, Any], correct: float) -> dict[str, float]:
    name = subject(doc)
    if name not in DISCIPLINE_OF:
        return {"other": correct}
    return {DISCIPLINE_OF[name]: correct, name: correct}
