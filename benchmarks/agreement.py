"""What two tools made of the same problems, side by side: prompts, completions, the answers read from them, the verdicts.

Completions of a model in bfloat16 part ways by rounding. So the answers are compared on the same texts, the peer's, each read
by both tools: what differs there is a difference of reading. Whose reading is right is for a person to say, who finds all that
is needed in the list of differences.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from restem.types import Problem, Sample

SHOWN = 160
"""Characters of a completion's end that a difference shows."""
KINDS = ("prompt", "verdict", "answer", "completion")
"""The order in which differences are listed."""


class Reading(NamedTuple):
    """What one way of reading makes of a completion."""

    answer: str | None
    correct: bool


@dataclass(frozen=True, kw_only=True)
class Both:
    """One problem as both tools have put and answered it."""

    problem: Problem
    prompt: str
    prompt_ids: Sequence[int]
    sample: Sample
    """Our completion, graded."""
    peer_prompt: str
    peer_prompt_ids: Sequence[int]
    peer_text: str
    ours: Mapping[str, Reading]
    """Our ways to read the peer's completion, by name; the first is the one that samples are graded with."""
    theirs: Mapping[str, Reading]
    """The peer's ways to read the same text."""


def counts(pairs: Sequence[Both]) -> dict[str, Any]:
    """How often the two agree. Readings are counted for each of our ways with each of theirs, on the peer's completions."""
    first = pairs[0]
    readings = {
        f"{mine} / {other}": {
            "equal verdicts": sum(pair.ours[mine].correct == pair.theirs[other].correct for pair in pairs),
            "equal answers": sum(same(pair.ours[mine].answer, pair.theirs[other].answer) for pair in pairs),
        }
        for mine in first.ours
        for other in first.theirs
    }
    return {
        "problems": len(pairs),
        "equal prompts": sum(list(pair.prompt_ids) == list(pair.peer_prompt_ids) for pair in pairs),
        "equal completions": sum(pair.sample.text == pair.peer_text for pair in pairs),
        "same answer in both completions": sum(_same_in_both(pair) for pair in pairs),
        "our completions that were cut off": sum(pair.sample.finish == "length" for pair in pairs),
        "readings of the peer's completions": readings,
    }


def scores(pairs: Sequence[Both]) -> dict[str, Any]:
    """Correct answers: ours as an evaluation of restem counts them, on our completions; theirs on theirs."""
    theirs = {name: sum(pair.theirs[name].correct for pair in pairs) for name in pairs[0].theirs}
    mine = sum(pair.sample.finish == "stop" and bool(pair.sample.reward) for pair in pairs)
    return {"restem": mine, **theirs}


def differences(pairs: Sequence[Both]) -> list[dict[str, Any]]:
    """Every problem on which the two differ in more than the wording of a completion, the gravest first."""
    found = [(kinds, pair) for pair in pairs if (kinds := _kinds(pair))]
    found.sort(key=lambda item: min(KINDS.index(kind.partition(":")[0]) for kind in item[0]))
    return [_shown(kinds, pair) for kinds, pair in found]


def speeds(found: Mapping[str, float], unit: str, rounds: int) -> dict[str, Any]:
    """How fast each was, as a benchmark's line says it. `found`: units per second, ours under "restem"."""
    mine = found["restem"]
    peers = {who: value for who, value in found.items() if who != "restem"}
    return {
        "unit": unit,
        "ours": round(mine, 3),
        "peers": {who: round(value, 3) for who, value in peers.items()},
        "ratios": {who: round(mine / value, 2) for who, value in peers.items()},
        "rounds": rounds,
    }


def same(one: str | None, other: str | None) -> bool:
    """Whether two readings are one answer. Blanks, dollars, commas, brackets, case and a full stop at the end do not count;
    numbers count by their value."""
    return _tidy(one) == _tidy(other)


def _tidy(answer: str | None) -> str | Fraction | None:
    if answer is None or answer == "[invalid]":  # what lm-eval writes where a pattern is not found
        return None
    text = re.sub(r"[\s$,()]", "", answer).rstrip(".").casefold()
    return Fraction(text) if re.fullmatch(r"-?\d+(\.\d+)?", text) else text


def _same_in_both(pair: Both) -> bool:
    return same(pair.sample.answer, next(iter(pair.ours.values())).answer)


def _kinds(pair: Both) -> list[str]:
    kinds = [] if list(pair.prompt_ids) == list(pair.peer_prompt_ids) else ["prompt"]
    for mine, reading in pair.ours.items():
        for name, other in pair.theirs.items():
            if reading.correct != other.correct:
                kinds.append(f"verdict: {mine} / {name}")
            elif not same(reading.answer, other.answer):
                kinds.append(f"answer: {mine} / {name}")
    return kinds if _same_in_both(pair) else [*kinds, "completion"]


def _shown(kinds: list[str], pair: Both) -> dict[str, Any]:
    shown: dict[str, Any] = {"problem": pair.problem.id, "differs": kinds, "reference": str(pair.problem.reference)}
    if "prompt" in kinds:
        at = _first_difference(pair.prompt, pair.peer_prompt)
        shown["prompts"] = {"restem": pair.prompt[at : at + 40], "peer": pair.peer_prompt[at : at + 40], "from character": at}
    shown["restem reads"] = {name: reading._asdict() for name, reading in pair.ours.items()}
    shown["peer reads"] = {name: reading._asdict() for name, reading in pair.theirs.items()}
    shown["end of the peer's completion"] = pair.peer_text[-SHOWN:]
    if "completion" in kinds:
        shown["restem's own completion"] = {"answer": pair.sample.answer, "end": pair.sample.text[-SHOWN:]}
        shown["completions part at character"] = _first_difference(pair.sample.text, pair.peer_text)
    return shown


def _first_difference(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))
