"""TextVQA: VQA accuracy over ten human answers, on text cleaned by the EvalAI processor.

The processor is the official one with its faults, because all published numbers use it: the punctuation list lacks
apostrophe, colon, $, % and &; periods are removed unless a digit follows, but at most 32 of them; capitalised
contraction keys never match lower-cased text (so "im" stays "im").
`repaired=True` cleans without these faults; its accuracy is an additional metric.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PROMPT_SUFFIX = "\nAnswer the question using a single word or phrase."

ARTICLES = frozenset({"a", "an", "the"})
NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(value) for value, word in enumerate(NUMBER_WORDS.split())} | {"none": "0"}

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
UNLISTED_PUNCTUATION = ":$%&"  # and the apostrophe, which contractions need
DIGIT_COMMA = re.compile(r"(?<=\d),+(?=\d)")
# The official pattern should keep a period between digits, but its look-behind is a misspelt look-ahead and always
# holds; its flag (re.UNICODE, 32) is passed as the replacement count.
PERIOD = re.compile(r"\.(?!\d)")
PERIOD_REPLACEMENTS = 32

# Contractions without their apostrophe, as published with the VQA evaluation. Most follow from dropping the apostrophes
# of the right form; the official table also lists some partial forms, and lacks others.
_ONE_APOSTROPHE = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd
how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't
should've shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's
where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll
you're you've"""
_PARTIAL = """couldn'tve:couldn't've couldnt've:couldn't've hadnt've:hadn't've hadn'tve:hadn't've hed've:he'd've
he'dve:he'd've itd've:it'd've it'dve:it'd've let's:let's mightnt've:mightn't've mightn'tve:mightn't've
ow's'at:'ow's'at 'ows'at:'ow's'at 'ow'sat:'ow's'at shed've:she'd've she'dve:she'd've she's:she's
shouldnt've:shouldn't've shouldn'tve:shouldn't've somebody'd:somebodyd somebodyd've:somebody'd've
somebody'dve:somebody'd've someoned've:someone'd've someone'dve:someone'd've somethingd've:something'd've
something'dve:something'd've thered've:there'd've there'dve:there'd've theyd've:they'd've they'dve:they'd've
wed've:we'd've we'dve:we'd've whod've:who'd've who'dve:who'd've wouldnt've:wouldn't've wouldn'tve:wouldn't've
yall'll:y'all'll y'allll:y'all'll yall'd've:y'all'd've y'alld've:y'all'd've y'all'dve:y'all'd've youd've:you'd've
you'dve:you'd've"""
_CAPITALISED = "Id've:I'd've I'dve:I'd've Im:I'm Ive:I've"

CONTRACTIONS = {right.replace("'", ""): right for right in _ONE_APOSTROPHE.split()} | dict(
    pair.split(":") for pair in f"{_PARTIAL} {_CAPITALISED}".split()
)
REPAIRED_CONTRACTIONS = {key.lower(): right.lower() for key, right in CONTRACTIONS.items()}


def prompt(doc: Mapping[str, Any], suffix: str = PROMPT_SUFFIX) -> str:
    """Question with its first letter upper-cased and the rest lower-cased (as the reference does), no OCR tokens."""
    question = doc["question"].replace("<image>", "image")
    return f"<image>{question.capitalize()}{suffix}"


def target(doc: Mapping[str, Any]) -> str:
    """Most frequent answer, the earliest of equals, or the empty text; NLL and KL use it."""
    answers = [answer for answer in doc["answers"] or [] if answer.strip()]
    return max(answers, key=answers.count) if answers else ""


def clean_answer(text: str, repaired: bool = False) -> str:
    """Normalise an answer for comparison."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    return _clean_words(_clean_punctuation(text, repaired), repaired)


def _clean_punctuation(text: str, repaired: bool) -> str:
    """Drop a punctuation mark that touches a space anywhere in the text; otherwise replace it by a space."""
    cleaned = text
    drop_all = DIGIT_COMMA.search(text) is not None
    for mark in PUNCTUATION + (UNLISTED_PUNCTUATION if repaired else ""):
        drop = drop_all or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if drop else " ")
    return PERIOD.sub("", cleaned, count=0 if repaired else PERIOD_REPLACEMENTS)


def _clean_words(text: str, repaired: bool) -> str:
    """Convert number words to digits, remove articles, and restore the apostrophes of contractions."""
    contractions = REPAIRED_CONTRACTIONS if repaired else CONTRACTIONS
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(reply: str, answers: Sequence[str] | None, clean: Callable[[str], str] = clean_answer) -> float:
    """Mean over the answers of min(1, matches among the *other* answers / 3); 0 without answers."""
    if not answers:
        return 0.0
    cleaned_reply = clean(reply)
    matches = [clean(answer) == cleaned_reply for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - match) / 3) for match in matches) / len(matches)


def _clean_repaired(text: str) -> str:
    return clean_answer(text, repaired=True)


def score(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval `process_results`: the published accuracy, and the accuracy with a repaired processor."""
    reply = results[0]
    return {
        "vqa_accuracy": vqa_accuracy(reply, doc["answers"]),
        "vqa_accuracy_repaired": vqa_accuracy(reply, doc["answers"], _clean_repaired),
    }
