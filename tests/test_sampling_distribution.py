"""What the sampler draws from a model with known logits: the exact truncated distribution, and independent samples.

The model is a table of logits after each token, so that the distribution of the first two tokens is known to the last digit.
Seeded, so never flaky; a chi-square beyond the 0.1% point would be a bug or a very unlucky seed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from scipy.stats import chi2

from restem.sampling import Decoding, Owed, TreeSampler
from restem.types import Problem
from tiny_models import VOCABULARY, bigram, few_shot, one_thread, vocabulary  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS = range(10, 40)
LOGITS = torch.full((VOCABULARY, VOCABULARY), -40.0)
LOGITS[10:40, :] = 2.0 * torch.randn(30, VOCABULARY, generator=torch.Generator().manual_seed(3))


def sampler(*, on_deck: bool = False) -> TreeSampler:
    return TreeSampler(bigram(LOGITS), few_shot(), on_deck=on_deck)


def truncated(column: int, decoding: Decoding) -> torch.Tensor:
    """By hand, in double precision: temperature, then top-k, top-p and min-p, each on what the former left, renormalised."""
    probability = torch.softmax(LOGITS[:, column].double() / decoding.temperature, 0)
    order = probability.argsort(descending=True)
    kept = probability[order]
    if decoding.top_k:
        kept[decoding.top_k :] = 0
        kept = kept / kept.sum()
    before = kept.cumsum(0) - kept
    kept = torch.where(before < decoding.top_p, kept, 0.0)
    kept = torch.where(kept >= decoding.min_p * kept[0], kept, 0.0)
    return torch.zeros_like(probability).index_copy_(0, order, kept / kept.sum())


def assert_follows(found: Counter[int], expected: Callable[[int], float], total: int) -> None:
    """Chi-square at the 0.1% point, cells of fewer than 5 expected draws put together."""
    cells, rest_found, rest_expected = [], 0, 0.0
    for token in TOKENS:
        if (wanted := total * expected(token)) >= 5:
            cells.append((found[token], wanted))
        else:
            rest_found, rest_expected = rest_found + found[token], rest_expected + wanted
    if rest_expected > 0:
        cells.append((rest_found, rest_expected))
    else:
        assert rest_found == 0
    assert sum(count for count, _ in cells) == total
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    assert statistic < chi2.ppf(0.999, max(1, len(cells) - 1))


@pytest.mark.parametrize("on_deck", [False, True], ids=["as on a CPU", "as on a GPU"])
@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(max_tokens=2),
        Decoding(temperature=0.7, top_k=12, max_tokens=2),
        Decoding(temperature=1.3, top_p=0.8, max_tokens=2),
        Decoding(temperature=0.7, top_k=12, top_p=0.9, max_tokens=2),
        Decoding(min_p=0.1, max_tokens=2),
        Decoding(temperature=1.5, top_k=20, top_p=0.95, min_p=0.05, max_tokens=2),
    ],
    ids=str,
)
def test_promise_5_sampled_tokens_follow_the_exact_truncated_distribution(decoding: Decoding, on_deck: bool) -> None:
    """Promise 5: of the first token, and of the second given the likeliest first one."""
    stage = [Problem(id="p", question="Q")]
    owed = [Owed("p", index) for index in range(4000)]
    pairs = [sample.token_ids for sample in sampler(on_deck=on_deck).sample(stage, owed, decoding, stream="s")]
    first = truncated(vocabulary()[":"], decoding)
    assert_follows(Counter(a for a, _ in pairs), lambda token: first[token].item(), 4000)
    likeliest = int(first.argmax())
    second = truncated(likeliest, decoding)
    behind = [b for a, b in pairs if a == likeliest]
    assert_follows(Counter(behind), lambda token: second[token].item(), len(behind))


@pytest.mark.parametrize("what", ["two samples of one problem", "samples of two problems", "tokens of one sample"])
def test_samples_are_independent(what: str) -> None:
    """Chi-square of independence between pairs of tokens, of 1,500 pairs."""
    LOGITS_FLAT = LOGITS.clone()
    LOGITS_FLAT[10:40] = torch.randn(30, generator=torch.Generator().manual_seed(3))[:, None]  # the same after every token
    model = TreeSampler(bigram(LOGITS_FLAT), few_shot())
    stage = [Problem(id=str(number), question="Q") for number in range(1500)]
    decoding = Decoding(top_k=4, max_tokens=2)
    owed = [Owed(problem.id, index) for problem in stage for index in range(2)]
    drawn = {(s.problem_id, s.index): s.token_ids for s in model.sample(stage, owed, decoding, stream="s")}
    if what == "two samples of one problem":
        pairs = [(drawn[str(n), 0][0], drawn[str(n), 1][0]) for n in range(1500)]
    elif what == "samples of two problems":
        pairs = [(drawn[str(n), 0][0], drawn[str((n + 1) % 1500), 0][0]) for n in range(1500)]
    else:
        pairs = [(drawn[str(n), 0][0], drawn[str(n), 0][1]) for n in range(1500)]
    table = Counter(pairs)
    left, right = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = {(a, b): left[a] * right[b] / 1500 for a in left for b in right}
    assert len(expected) == 16
    assert sum((table[key] - value) ** 2 / value for key, value in expected.items()) < chi2.ppf(0.999, 9)
