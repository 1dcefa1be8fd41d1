"""Search for equalization scales: find the candidate with the smallest error.

Every error measure is a sum of non-negative parts, over output channels or over tokens, so the search need not measure
every candidate in full. ``least_error`` drops a candidate as soon as the sum of its parts exceeds the error of another
candidate, and finds the same winner as an exhaustive search. ``successive_halving`` drops the worse half of the
candidates each time the number of measured parts has doubled. It needs a fraction of the work and finds a candidate
whose error is close to the smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tlq.quantization.equalization import Candidate
from tlq.quantization.errors import CandidateErrors

_FIRST_PARTS = 1


def least_error(errors: CandidateErrors, tried: Sequence[Candidate]) -> Candidate:
    """The candidate with the smallest error, the first of equals; it does not depend on the number of ranks.

    The candidate with the smallest first part is measured in full first. Every other candidate is measured part by part
    until its sum exceeds that error.
    """
    totals = errors.measure([(candidate, 0) for candidate in tried])
    rest = range(1, errors.parts)
    likely = min(range(len(tried)), key=totals.__getitem__)
    for value in errors.measure([(tried[likely], part) for part in rest]):
        totals[likely] += value
    left = [number for number in range(len(tried)) if number != likely]
    for part in rest:
        left = [number for number in left if totals[number] <= totals[likely]]
        for number, value in zip(left, errors.measure([(tried[number], part) for number in left]), strict=True):
            totals[number] += value
    return tried[min(sorted([likely, *left]), key=totals.__getitem__)]


def successive_halving(errors: CandidateErrors, tried: Sequence[Candidate]) -> Candidate:
    """The winner of successive halving (Jamieson and Talwalkar, arXiv 1502.07943), the first of equals.

    All candidates are compared on the first parts, the better half on twice as many parts, and so on until one
    candidate is left or all parts are measured.
    """
    left, totals = list(range(len(tried))), [0.0] * len(tried)
    for count, parts in halving_rounds(len(tried), errors.parts):
        left = sorted(left, key=lambda number: (totals[number], number))[:count]
        pairs = [(number, part) for part in parts for number in left]
        values = errors.measure([(tried[number], part) for number, part in pairs])
        for (number, _), value in zip(pairs, values, strict=True):
            totals[number] += value
    return tried[min(left, key=lambda number: (totals[number], number))]


def halving_rounds(candidates: int, parts: int) -> Iterator[tuple[int, range]]:
    """The rounds of successive halving: how many candidates are left, and the parts that are measured for each."""
    measured = 0
    while candidates > 1 and measured < parts:
        following = min(parts, max(_FIRST_PARTS, 2 * measured))
        yield candidates, range(measured, following)
        measured, candidates = following, -(-candidates // 2)


#: Searches by the name that ``Equalization.search`` gives them.
SEARCHES: dict[str, Callable[[CandidateErrors, Sequence[Candidate]], Candidate]] = {
    "exhaustive": least_error,
    "halving": successive_halving,
}
