"""Which problems of two groups share a long run of words: a reason to look at them, where equal content is a fault.

The rule is that of GPT-3's filter (Brown et al. 2020, arXiv 2005.14165, appendix C): 13 words in a row, a word being what
stands between blanks, in lower case and without punctuation; runs that are in more than 10 texts are boilerplate and do not
count. What it cannot see: the same problem in other words, texts of fewer than 13 words (equal ones are found by content hash),
and a problem that a group holds in more than 10 variants, which looks like boilerplate.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from restem.types import Problem

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

WORDS = 13
"""Words in a row that two problems must share (GPT-3, appendix C)."""
BOILERPLATE = 10
"""A run that more problems of one group hold is wording of the set, not of a problem (GPT-3 counts training documents)."""

_PUNCTUATION = re.compile(r"[^\w\s]|_")


def shared_ngrams(
    groups: Mapping[str, Sequence[Problem]],
    *,
    question_only: Collection[str] = (),
    size: int = WORDS,
    boilerplate: int = BOILERPLATE,
) -> dict[str, tuple[str, ...]]:
    """Give, for every pair of groups ("train and test"), the ids of the first one's problems that share `size` words in a row
    with a problem of the second.

    The text of a problem is its question and the solution in its meta, or its question alone if its group is in
    `question_only`; no run goes from one into the other. Runs that more than `boilerplate` problems of any one group hold are
    left out, so in groups of no more than that many problems nothing is.

    Runs are compared as 64-bit numbers that depend on the words alone; that a million different runs give one false match has
    a chance below 1 in a million. Memory: some 100 bytes a word of the largest group.
    """
    import numpy as np

    found = {
        name: _ngrams([_passages(problem, with_solution=name not in question_only) for problem in problems], size)
        for name, problems in groups.items()
    }
    common = [_in_more_than(boilerplate, ngrams) for ngrams in found.values()]
    found = {name: _without(np.concatenate(common), ngrams) for name, ngrams in found.items()}
    names = list(groups)
    return {
        f"{one} and {other}": tuple(groups[one][place].id for place in _sharing(found[one], found[other]))
        for position, one in enumerate(names)
        for other in names[position + 1 :]
    }


def words(text: str) -> list[str]:
    """What stands between blanks, in lower case and without punctuation; what is punctuation alone is no word."""
    return _PUNCTUATION.sub("", text.casefold()).split()


def _passages(problem: Problem, *, with_solution: bool) -> list[str]:
    solution = problem.meta.get("solution") if with_solution else None
    return [problem.question, solution] if isinstance(solution, str) else [problem.question]


class _Ngrams(NamedTuple):
    """The runs of one group, each once for every problem that holds it, in the order of the numbers. _G: run, _W: word."""

    number_G: NDArray[np.uint64]
    place_G: NDArray[np.int64]
    """Which problem of the group."""


def _ngrams(texts: Sequence[Sequence[str]], size: int) -> _Ngrams:
    import numpy as np

    vocabulary: dict[str, int] = {}
    entries: list[int] = []
    lengths: list[int] = []
    places: list[int] = []
    for place, passages in enumerate(texts):
        for passage in passages:
            before = len(entries)
            entries.extend(vocabulary.setdefault(word, len(vocabulary)) for word in words(passage))
            lengths.append(len(entries) - before)
            places.append(place)
    word_W = np.array([_number(word) for word in vocabulary], dtype=np.uint64)[np.array(entries, dtype=np.int64)]
    passage_W = np.repeat(np.arange(len(lengths)), np.array(lengths, dtype=np.int64))
    count = max(0, word_W.size - size + 1)
    # The sum of word x factor of its place, modulo 2**64 (multilinear hashing): sliding over all words at once is quick.
    number_G = np.zeros(count, dtype=np.uint64)
    for step in range(size):
        number_G += np.uint64(_number(f"place {step}") | 1) * word_W[step : step + count]
    ends_where_it_began_G = passage_W[:count] == passage_W[size - 1 : size - 1 + count]
    place_G = np.array(places, dtype=np.int64)[passage_W[:count]]
    return _once_per_problem(number_G[ends_where_it_began_G], place_G[ends_where_it_began_G])


def _number(text: str) -> int:
    """64 bits that depend on the text alone, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _once_per_problem(number_G: NDArray[np.uint64], place_G: NDArray[np.int64]) -> _Ngrams:
    import numpy as np

    order_G = np.lexsort((place_G, number_G))  # by number, then by problem
    number_G, place_G = number_G[order_G], place_G[order_G]
    is_new_G = np.ones(number_G.size, dtype=np.bool_)
    is_new_G[1:] = (number_G[1:] != number_G[:-1]) | (place_G[1:] != place_G[:-1])
    return _Ngrams(number_G[is_new_G], place_G[is_new_G])


def _in_more_than(most: int, ngrams: _Ngrams) -> NDArray[np.uint64]:
    """The runs that more than `most` problems hold."""
    import numpy as np

    number_U, count_U = np.unique(ngrams.number_G, return_counts=True)
    return number_U[count_U > most]


def _without(numbers: NDArray[np.uint64], ngrams: _Ngrams) -> _Ngrams:
    import numpy as np

    kept_G = ~np.isin(ngrams.number_G, numbers)
    return _Ngrams(ngrams.number_G[kept_G], ngrams.place_G[kept_G])


def _sharing(one: _Ngrams, other: _Ngrams) -> list[int]:
    """The problems of one group that hold a run of the other, in their order."""
    import numpy as np

    return [int(place) for place in np.unique(one.place_G[np.isin(one.number_G, other.number_G)])]
