"""From logits to a token: the exact truncated distribution, and the log-probability under the untruncated model."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import transformers

from restem.sampling import Decoding, Owed, uniforms
from restem.sampling.decoding import choose

GRID = 20_000


def random_logits(size: int, spread: float, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def grid(count: int = GRID) -> torch.Tensor:
    """Evenly spaced numbers in (0, 1): an interval of length p holds p * count of them, to within one."""
    return (torch.arange(count, dtype=torch.float64) + 0.5) / count


def counts(logits: torch.Tensor, decoding: Decoding, count: int = GRID) -> torch.Tensor:
    tokens, _ = choose(logits.expand(count, -1), grid(count), decoding)
    return torch.bincount(tokens, minlength=len(logits)).double()


def by_warpers(logits: torch.Tensor, decoding: Decoding) -> torch.Tensor:
    """The distribution as transformers' own generation makes it, in its own order: temperature, top-k, top-p, min-p."""
    scores = transformers.TemperatureLogitsWarper(decoding.temperature)(None, logits.double()[None])
    if decoding.top_k:
        scores = transformers.TopKLogitsWarper(decoding.top_k)(None, scores)
    if decoding.top_p < 1:
        scores = transformers.TopPLogitsWarper(decoding.top_p)(None, scores)
    if decoding.min_p:
        scores = transformers.MinPLogitsWarper(decoding.min_p)(None, scores)
    return torch.softmax(scores[0], -1)


COMBINATIONS = list(itertools.product((0.3, 0.7, 1.0, 1.7), (0, 1, 7, 40), (1.0, 0.9, 0.5), (0.0, 0.1)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), COMBINATIONS)
def test_row_11_frequencies_are_those_of_the_truncated_softmax(
    temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Row 11, and row 10: the kept set and the order temperature, top-k, top-p, min-p are those of transformers."""
    logits = random_logits(120, spread=2.0)
    decoding = Decoding(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found, exact = counts(logits, decoding), by_warpers(logits, decoding)
    assert (found - GRID * exact).abs().max() <= 1.02  # one by construction, the rest for float32
    assert not found[exact == 0].any()


def test_row_10_no_token_beyond_top_k_is_ever_chosen() -> None:
    """Row 10: the paper's top-k 40, on logits that are nearly flat, with the extreme random numbers too."""
    logits = random_logits(1000, spread=0.01)
    allowed = set(logits.topk(40).indices.tolist())
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    uniform = torch.cat([grid(4000), ends])
    tokens, _ = choose(logits.expand(len(uniform), -1), uniform, Decoding(temperature=0.7, top_k=40))
    assert set(tokens.tolist()) == allowed


def test_row_11_a_nucleus_worked_out_by_hand() -> None:
    """Row 11: of 0.4, 0.3, 0.2, 0.1 the smallest set that reaches 0.6 is the first two, which then share all."""
    logits = torch.tensor([0.2, 0.4, 0.1, 0.3]).log()
    found = counts(logits, Decoding(top_p=0.6), 7000)
    assert found.tolist() == [0, 4000, 0, 3000]


def test_row_11_the_temperature_divides_the_logits() -> None:
    """Row 11: odds of 2 at temperature 1 are odds of 4 at 0.5."""
    found = counts(torch.tensor([2.0, 1.0]).log(), Decoding(temperature=0.5), 5000)
    assert found.tolist() == [4000, 1000]


def test_top_p_counts_after_top_k() -> None:
    """0.4, 0.3, 0.2, 0.1 with top-k 2 is 4/7, 3/7; the first alone reaches 0.55 of that, though not of the whole."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert counts(logits, Decoding(top_k=2, top_p=0.55), 100).tolist() == [100, 0, 0, 0]
    assert counts(logits, Decoding(top_p=0.55), 700).tolist() == [400, 300, 0, 0]


@pytest.mark.parametrize(("top_p", "min_p"), [(0.95, 0.0), (1.0, 0.2), (0.95, 0.2), (0.5, 0.0)])
def test_a_nucleus_of_thousands_of_tokens_is_exact(top_p: float, min_p: float) -> None:
    """A flat vocabulary of 5,000, where the nucleus is larger than the list of likeliest candidates."""
    logits = random_logits(5000, spread=0.3)
    decoding = Decoding(top_p=top_p, min_p=min_p)
    exact = by_warpers(logits, decoding)
    assert int((exact > 0).sum()) > 1024
    order = logits.argsort(descending=True)
    above = torch.empty_like(exact)
    above[order] = exact[order].cumsum(0)  # the share of all tokens up to each one, likeliest first
    uniform = grid(500)
    tokens, _ = choose(logits.expand(500, -1), uniform, decoding)
    assert (exact[tokens] > 0).all()
    assert (uniform <= above[tokens] + 1e-5).all()
    assert (uniform >= above[tokens] - exact[tokens] - 1e-5).all()


def test_rows_with_large_and_small_nuclei_do_not_disturb_each_other() -> None:
    flat, sharp = random_logits(5000, spread=0.3), random_logits(5000, spread=5.0)
    decoding = Decoding(top_p=0.95)
    both = torch.stack([flat, sharp]).repeat(20, 1)
    tokens, logprobs = choose(both, grid(40), decoding)
    for row in range(40):
        token, logprob = choose(both[row : row + 1], grid(40)[row : row + 1], decoding)
        assert (token.item(), logprob.item()) == (tokens[row].item(), logprobs[row].item())


def test_temperature_0_takes_the_likeliest_whatever_else_is_set() -> None:
    logits = random_logits(300, spread=1.0)
    tokens, _ = choose(logits.expand(50, -1), grid(50), Decoding(temperature=0, top_k=3, top_p=0.5, min_p=0.3))
    assert set(tokens.tolist()) == {int(logits.argmax())}


@pytest.mark.parametrize(
    "decoding",
    [Decoding(), Decoding(top_k=5), Decoding(top_p=0.9), Decoding(min_p=0.2), Decoding(temperature=0), Decoding(temperature=2)],
    ids=str,
)
def test_log_probabilities_are_those_of_the_untruncated_model_at_temperature_1(decoding: Decoding) -> None:
    logits = random_logits(200, spread=3.0)
    tokens, logprobs = choose(logits.expand(100, -1), grid(100), decoding)
    assert torch.allclose(logprobs.double(), torch.log_softmax(logits.double(), -1)[tokens], atol=1e-5)


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(top_k=4), Decoding(top_p=0.99), Decoding(min_p=0.01)], ids=str)
def test_a_token_of_probability_0_is_never_chosen(decoding: Decoding) -> None:
    logits = torch.tensor([-math.inf, 0.0, -math.inf, 1.0, 2.0, -math.inf])
    uniform = torch.tensor([0.0, 0.3, 0.9, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    tokens, logprobs = choose(logits.expand(4, -1), uniform, decoding)
    assert set(tokens.tolist()) <= {1, 3, 4}
    assert logprobs.isfinite().all()


def test_the_last_token_of_a_nucleus_is_the_last_at_the_largest_random_number() -> None:
    uniform = torch.tensor([math.nextafter(1.0, 0.0)], dtype=torch.float64)
    for seed in range(200):
        logits = random_logits(50, spread=1.0, seed=seed)
        for decoding in (Decoding(top_p=0.8), Decoding(top_k=20, top_p=0.8), Decoding(top_k=20, min_p=0.3)):
            token, _ = choose(logits[None], uniform, decoding)
            assert by_warpers(logits, decoding)[token] > 0


def test_row_11_logits_in_bfloat16_lose_nothing_more() -> None:
    """Row 11: the frequencies are those of the bfloat16 numbers as they stand."""
    logits = random_logits(120, spread=2.0).bfloat16()
    for decoding in (Decoding(temperature=0.7), Decoding(temperature=0.7, top_k=40), Decoding(top_p=0.95)):
        exact = by_warpers(logits.float(), decoding)
        found = counts(logits, decoding)
        # Tied logits share an interval in an order of their own, and a tie at the border is cut where sorting puts it.
        values = logits.unique()
        grouped = torch.stack([torch.stack([found[logits == v].sum(), GRID * exact[logits == v].sum()]) for v in values])
        assert (grouped[:, 0] - grouped[:, 1]).abs().max() <= 2


def test_each_sample_has_numbers_of_its_own() -> None:
    """Another stream, problem or index is another sequence; the same is the same, and a longer one begins alike."""
    keys = [(stream, Owed(problem, index)) for stream in ("a", "b") for problem in ("p", "q") for index in (0, 1)]
    drawn = [uniforms(stream, owed, 50) for stream, owed in keys]
    assert len({float(number) for numbers in drawn for number in numbers}) == 8 * 50
    assert all((numbers >= 0).all() and (numbers < 1).all() for numbers in drawn)
    assert uniforms("a", Owed("p", 0), 80)[:50].tolist() == drawn[0].tolist()
