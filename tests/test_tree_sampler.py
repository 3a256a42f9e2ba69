"""The tree sampler draws what the model itself would: token for token when greedy, exactly distributed when sampling."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch

import tiny_models
from restem.errors import RestemError
from restem.prompts import Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.tree import shared_length
from restem.types import Problem, Sample
from tiny_models import END, REFUSED, SERVED, bare, few_shot, one_thread, problems, scripted, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

GREEDY = Decoding(temperature=0, max_tokens=20)
PAPER = Decoding(temperature=0.7, top_k=40, max_tokens=20)
Key = tuple[str, int]


def owe(stage: Sequence[Problem], num_samples: int) -> list[Owed]:
    return [Owed(problem.id, index) for problem in stage for index in range(num_samples)]


def draw(
    model: Any,
    renderer: Renderer,
    stage: Sequence[Problem],
    owed: Iterable[Owed],
    decoding: Decoding,
    *,
    stream: str = "run 1",
    rows: int | None = None,
) -> dict[Key, Sample]:
    """All samples by identity; none may come twice."""
    drawn = list(TreeSampler(model, renderer, rows=rows).sample(stage, owed, decoding, stream=stream))
    by_key = {(sample.problem_id, sample.index): sample for sample in drawn}
    assert len(by_key) == len(drawn)
    return by_key


def tokens(samples: dict[Key, Sample]) -> dict[Key, tuple[int, ...]]:
    return {key: sample.token_ids for key, sample in samples.items()}


def generate(model: Any, prompt: tuple[int, ...], max_tokens: int, ends: list[int] | None) -> list[int]:
    """transformers' own greedy decoding of one prompt alone, without its end token."""
    model.generation_config.eos_token_id = ends
    settings = {"max_new_tokens": max_tokens, "do_sample": False, "pad_token_id": 0}
    out = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **settings)[0, len(prompt) :]
    return [token for token in out.tolist() if token not in (ends or [])]


def an_end_that_some_reach(completions: list[list[int]]) -> int:
    """The token that is in about half of the completions."""
    tokens = sorted({token for completion in completions for token in completion})
    return min(tokens, key=lambda token: abs(sum(token in c for c in completions) - len(completions) / 2))


def forward_logprobs(model: Any, prompt: tuple[int, ...], completion: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [tokens, vocabulary] at the places of the completion, by one plain forward pass."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)


# --- promise 5: greedy equality --------------------------------------------------------------------------------------------


RENDERERS = {
    "sharing a few-shot prefix": (few_shot, range(64, 200)),
    "sharing a few tokens": (lambda: Renderer(Prompt(), tiny_models.tokenizer()), range(1, 64)),
    "sharing nothing": (bare, range(1)),
}
"""How prompts are made, and how many tokens all of them begin with: a prefix of less than 64 goes another way."""


@pytest.mark.parametrize("prompts", RENDERERS)
@pytest.mark.parametrize("name", SERVED)
def test_greedy_completions_equal_generate_token_by_token(name: str, prompts: str) -> None:
    """Each prompt alone in `generate`; here 30 samples through 16 rows, so that rows are refilled in the middle. Some
    completions end by one of two end tokens, some at the limit."""
    model, stage = tiny(name), problems()
    make, shared = RENDERERS[prompts]
    renderer = make()
    encoded = [renderer.encode(problem) for problem in stage]
    assert len({len(prompt) for prompt in encoded}) > 4 and shared_length(encoded) in shared
    free = [generate(model, prompt, GREEDY.max_tokens, None) for prompt in encoded]
    ends = [an_end_that_some_reach(free), END]
    expected = {
        problem.id: generate(model, prompt, GREEDY.max_tokens, ends) for problem, prompt in zip(stage, encoded, strict=True)
    }
    samples = draw(model, renderer, stage, owe(stage, 3), GREEDY, rows=16)
    assert {key: list(sample.token_ids) for key, sample in samples.items()} == {
        (problem.id, index): expected[problem.id] for problem in stage for index in range(3)
    }
    ended = {problem_id: len(completion) < GREEDY.max_tokens for problem_id, completion in expected.items()}
    assert set(ended.values()) == {True, False}
    assert all((sample.finish == "stop") == ended[sample.problem_id] for sample in samples.values())


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_the_tree_would_compute_wrongly_is_refused_by_name(name: str) -> None:
    model = tiny(name, table=REFUSED)
    with pytest.raises(RestemError, match=model.config.model_type):
        TreeSampler(model, few_shot())


def test_a_model_that_does_something_of_its_own_to_its_logits_is_refused() -> None:
    model = tiny()
    own = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits * 3
        return out

    model.forward = scaled
    with pytest.raises(RestemError, match="logits differ from the model's own"):
        TreeSampler(model, few_shot())


def test_a_model_with_broken_weights_is_refused() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(RestemError, match="not finite"):
        TreeSampler(model, few_shot())


# --- promise 1: a sample depends on nothing but its stream, problem and index -----------------------------------------------


def number_formats() -> list[Any]:
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    reason = "this processor does not multiply in bfloat16"
    return [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not native, reason=reason))]


@pytest.mark.parametrize("prompts", RENDERERS)
@pytest.mark.parametrize("dtype", number_formats(), ids=str)
def test_a_sample_does_not_depend_on_what_else_is_owed(dtype: torch.dtype, prompts: str) -> None:
    """All at once, one at a time, a part in another order, few rows: the same tokens."""
    model, renderer, stage = tiny().to(dtype), RENDERERS[prompts][0](), problems()
    owed = owe(stage, 8)
    whole = tokens(draw(model, renderer, stage, owed, PAPER))
    assert len(set(whole.values())) > 60
    part = owed[::-3]
    assert tokens(draw(model, renderer, stage, part, PAPER)) == {tuple(key): whole[key] for key in part}
    assert tokens(draw(model, renderer, stage, owed, PAPER, rows=16)) == whole
    for key in owed[:: len(owed) // 4]:
        assert tokens(draw(model, renderer, stage, [key], PAPER)) == {tuple(key): whole[key]}


def test_a_second_call_of_one_sampler_draws_the_same() -> None:
    stage, sampler = problems(4), TreeSampler(tiny(), few_shot())
    first, second = ({s.token_ids for s in sampler.sample(stage, owe(stage, 3), PAPER, stream="a")} for _ in range(2))
    assert first == second


def test_samples_of_one_problem_differ() -> None:
    stage = problems(1)
    assert len(set(tokens(draw(tiny(), few_shot(), stage, owe(stage, 20), PAPER)).values())) == 20


def test_two_problems_with_one_question_share_no_noise() -> None:
    stage = [Problem(id=name, question="3 + 4?") for name in ("a", "b")]
    drawn = tokens(draw(tiny(), few_shot(), stage, owe(stage, 10), PAPER))
    assert len(set(drawn.values())) == 20


def test_another_stream_draws_other_samples() -> None:
    model, stage = tiny(), problems(4)
    one, other = (tokens(draw(model, few_shot(), stage, owe(stage, 4), PAPER, stream=name)) for name in ("1", "2"))
    assert not set(one.values()) & set(other.values())


def test_nothing_owed_draws_nothing() -> None:
    assert draw(tiny(), few_shot(), problems(), [], PAPER) == {}


# --- the distribution -------------------------------------------------------------------------------------------------------


def test_row_11_first_tokens_follow_the_exact_truncated_distribution() -> None:
    """Row 11: 4,000 samples of one problem against softmax over the top 12 at temperature 0.7; seeded, so never flaky."""
    model, renderer, stage = tiny(), few_shot(), problems(3)
    decoding = Decoding(temperature=0.7, top_k=12, max_tokens=1)
    drawn = draw(model, renderer, stage, owe(stage[1:2], 4000), decoding)
    logits = forward_logprobs(model, renderer.encode(stage[1]), [0])[0] / decoding.temperature
    top = logits.topk(12)
    expected = 4000 * torch.softmax(top.values, -1)
    found = torch.tensor([sum((s.token_ids or (END,)) == (token,) for s in drawn.values()) for token in top.indices.tolist()])
    assert found.sum() == 4000
    assert ((found - expected) ** 2 / expected).sum() < 31.3  # chi-square, 11 degrees of freedom: p = 0.001


def test_row_10_no_sampled_token_is_ranked_beyond_top_k() -> None:
    """Row 10: ranks by a plain forward pass over what was drawn."""
    model, renderer, stage = tiny("qwen2"), few_shot(), problems(4)
    samples = draw(model, renderer, stage, owe(stage, 8), Decoding(temperature=1.5, top_k=5, max_tokens=20))
    ranks = set()
    for sample in samples.values():
        prompt = renderer.encode(next(problem for problem in stage if problem.id == sample.problem_id))
        logprobs = forward_logprobs(model, prompt, sample.token_ids)
        chosen = logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None])
        ranks |= set((logprobs > chosen + 1e-6).sum(-1).tolist())
    assert ranks == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["llama", "granite", "gpt2"])
def test_the_log_probability_is_that_of_a_plain_forward_pass(name: str) -> None:
    """Of all tokens and the end token, at temperature 1 and without truncation."""
    model, renderer, stage = tiny(name), few_shot(), problems(5)
    end = an_end_that_some_reach([generate(model, renderer.encode(problem), 20, None) for problem in stage])
    model.generation_config.eos_token_id = end
    samples = draw(model, renderer, stage, owe(stage, 12), Decoding(temperature=0.6, top_k=40, max_tokens=20))
    stopped = 0
    for sample in samples.values():
        prompt = renderer.encode(next(problem for problem in stage if problem.id == sample.problem_id))
        # With two end tokens, the sample does not say which one it drew.
        endings = [[END], [end]] if sample.finish == "stop" else [[]]
        sums = []
        for ending in endings:
            completion = [*sample.token_ids, *ending]
            sums.append(forward_logprobs(model, prompt, completion).gather(-1, torch.tensor(completion)[:, None]).sum().item())
        assert min(abs(total - sample.logprob) for total in sums) < 1e-4 * max(1, abs(sample.logprob))
        stopped += sample.finish == "stop"
    assert 0 < stopped < len(samples)


def test_row_2_sampling_changes_no_weight() -> None:
    """Row 2: the hash of all weights before and after, and the model is handed back as it came."""
    model, stage = tiny(), problems(4)
    model.train()
    before, attention = tiny_models.fingerprint(model), model.config._attn_implementation
    draw(model, few_shot(), stage, owe(stage, 8), PAPER)
    assert tiny_models.fingerprint(model) == before
    assert (model.config._attn_implementation, model.training) == (attention, True)
    assert all(parameter.grad is None for parameter in model.parameters())


# --- how a completion ends --------------------------------------------------------------------------------------------------

STAGE = [Problem(id="p", question="Q")]


def complete(script: Sequence[str | int], *, stop: tuple[str, ...] = (), max_tokens: int = 30, ends: Any = None) -> Sample:
    """The greedy completion of a model that writes this script."""
    model, renderer = scripted(script), few_shot()
    model.generation_config.eos_token_id = ends
    decoding = Decoding(temperature=0, max_tokens=max_tokens, stop=stop)
    (sample,) = draw(model, renderer, STAGE, owe(STAGE, 1), decoding).values()
    assert renderer.decode(sample.token_ids) == sample.text
    return sample


def test_an_end_token_ends_a_completion_and_is_not_part_of_it() -> None:
    sample = complete(["x", "y", END])
    assert (sample.text, sample.finish, len(sample.token_ids)) == ("xy", "stop", 2)


def test_a_completion_may_be_empty() -> None:
    sample = complete([END])
    assert (sample.text, sample.finish, sample.token_ids) == ("", "stop", ())
    assert sample.logprob == pytest.approx(0, abs=1e-4)


def test_max_tokens_cuts_a_completion_off() -> None:
    sample = complete(["x", "y", "z", "w", END], max_tokens=3)
    assert (sample.text, sample.finish) == ("xyz", "length")


def test_an_end_token_right_behind_max_tokens_comes_too_late() -> None:
    assert complete(["x", "y", END], max_tokens=2).finish == "length"
    assert complete(["x", "y", END], max_tokens=3).finish == "stop"


@pytest.mark.parametrize("ends", [5, [5, 6], [6, 5], None])
def test_every_end_token_of_the_generation_settings_ends_a_completion(ends: Any) -> None:
    """The tokenizer's own end token ends it in any case."""
    for last in [END, *(ends if isinstance(ends, list) else [ends] if ends else [])]:
        sample = complete(["x", last, "y"], ends=ends)
        assert (sample.text, sample.finish) == ("x", "stop")


def test_a_stop_string_across_tokens_is_cut_off() -> None:
    sample = complete(["x", "y", "Ċ", "Q", "u", "e", "z"], stop=("\nQue",))
    assert (sample.text, sample.finish, len(sample.token_ids)) == ("xy", "stop", 2)


def test_a_cut_inside_a_token_keeps_the_characters_before_it() -> None:
    """ "abc" is one token; of "xabcd", "xa" is kept, in tokens that decode to it."""
    sample = complete(["x", "abc", "d", "z"], stop=("bcd",))
    assert (sample.text, sample.finish, len(sample.token_ids)) == ("xa", "stop", 2)


def test_the_first_stop_string_in_the_text_counts() -> None:
    """Both are complete with one token; the one that begins first is cut."""
    assert complete(["x", "abc", "z"], stop=("c", "b")).text == "xa"
    assert complete(["x", "ĊĊ", "z"], stop=("\n\n", "\nQuestion:")).text == "x"


def test_a_stop_string_at_the_very_beginning_leaves_nothing() -> None:
    sample = complete(["ĊĊ", "x"], stop=("\n\n",))
    assert (sample.text, sample.token_ids, sample.finish) == ("", (), "stop")


def test_a_stop_string_completed_by_the_last_allowed_token_counts() -> None:
    sample = complete(["x", "y", "Ċ", "Q", "z"], stop=("\nQ",), max_tokens=4)
    assert (sample.text, sample.finish) == ("xy", "stop")


def test_half_a_stop_string_is_kept() -> None:
    sample = complete(["x", "Ċ", "Q", "y", END], stop=("\nQuestion:",))
    assert (sample.text, sample.finish) == ("x\nQy", "stop")


def test_the_prompt_does_not_take_part_in_a_stop_string() -> None:
    """The prompt ends in "Answer:"; a stop string ":x" is not completed by an "x"."""
    assert complete(["x", "y", END], stop=(":x",)).text == "xy"


def test_the_sum_of_log_probabilities_of_a_cut_sample_is_finite_and_negative() -> None:
    assert -1 < complete(["x", "abc", "d"], stop=("bcd",)).logprob <= 0


def test_random_bytes_decode_to_the_text_of_the_sample() -> None:
    """A random model writes bytes that are no text; the ids and the text still agree, with stop strings of single bytes."""
    renderer, stage = few_shot(), problems(5)
    decoding = Decoding(temperature=1.5, max_tokens=40, stop=("b", "1", "x\n"))
    samples = draw(tiny(), renderer, stage, owe(stage, 20), decoding)
    assert {sample.finish for sample in samples.values()} == {"stop", "length"}
    for sample in samples.values():
        assert renderer.decode(sample.token_ids) == sample.text
        assert not any(stop in sample.text for stop in decoding.stop)


# --- the context ------------------------------------------------------------------------------------------------------------


def test_a_prompt_longer_than_the_context_is_an_error_that_names_the_problem() -> None:
    stage = [*problems(2), Problem(id="too-long", question="x" * 600)]
    with pytest.raises(RestemError, match=r"too-long has 6\d\d tokens.*512"):
        draw(tiny(), few_shot(), stage, owe(stage[:2], 1), GREEDY)


def test_a_completion_ends_where_the_context_does() -> None:
    """A prompt of 505 tokens leaves 7 of 512. A short prompt beside it has all of its 20."""
    model = tiny()
    model.generation_config.eos_token_id = None
    renderer = bare()
    stage = [Problem(id="long", question="x" * 504), Problem(id="short", question="y")]
    samples = draw(model, renderer, stage, owe(stage, 1), GREEDY)
    assert {key[0]: (len(s.token_ids), s.finish) for key, s in samples.items()} == {
        "long": (7, "length"),
        "short": (20, "length"),
    }
    assert list(samples["long", 0].token_ids) == generate(model, renderer.encode(stage[0]), 7, None)


def test_a_prompt_that_is_the_beginning_of_another_is_served() -> None:
    """All prompts share all but the last token of the shortest."""
    model = tiny()
    template = "{{ messages[0]['content'] }}"
    renderer = Renderer(Prompt(style="chat"), tiny_models.tokenizer(template=template))
    stage = [Problem(id=text, question=text) for text in ("x", "xy", "xyz", "xyzxyz")]
    samples = draw(model, renderer, stage, owe(stage, 2), GREEDY)
    for (problem_id, _), sample in samples.items():
        assert list(sample.token_ids) == generate(model, tuple(renderer.encode(Problem(id="", question=problem_id))), 20, [END])


def test_one_problem_alone_has_the_completion_that_it_has_among_others() -> None:
    """Its prefix is then its own prompt but for the last token; the numbers differ in rounding only."""
    model, renderer, stage = tiny(), few_shot(), problems()
    among = tokens(draw(model, renderer, stage, owe(stage, 1), GREEDY))
    alone = {
        key: ids
        for problem in stage
        for key, ids in tokens(draw(model, renderer, [problem], owe([problem], 1), GREEDY)).items()
    }
    assert alone == among


def test_no_padding_token_is_needed() -> None:
    model, renderer = tiny(), few_shot()
    assert renderer.tokenizer.pad_token_id is None
    assert model.config.pad_token_id is None
    stage = problems(3)
    assert len(draw(model, renderer, stage, owe(stage, 2), PAPER)) == 6


def test_a_vocabulary_larger_than_the_tokenizer_is_served() -> None:
    """Models pad their output layer; a token that has no text is a token like any other."""
    model, renderer, stage = tiny(), few_shot(), problems(3)
    model.resize_token_embeddings(tiny_models.VOCABULARY + 40, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-40:] = model.lm_head.weight[5:45] * 1.3
    samples = draw(model, renderer, stage, owe(stage, 20), PAPER)
    assert any(token >= tiny_models.VOCABULARY for sample in samples.values() for token in sample.token_ids)
    assert all(renderer.decode(sample.token_ids) == sample.text for sample in samples.values())


# --- memory and pace --------------------------------------------------------------------------------------------------------


def test_running_out_of_memory_halves_the_rows_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device refuses more than 40 rows at once; every sample still comes, and is the one that it would have been."""
    model, renderer, stage = tiny(), few_shot(), problems(5)
    owed = owe(stage, 20)
    expected = tokens(draw(model, renderer, stage, owed, PAPER))
    own = TreeSampler.forward

    def forward(self: TreeSampler, ids: torch.Tensor, positions: torch.Tensor, attends: Any) -> torch.Tensor:
        if len(ids) > 40:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(self, ids, positions, attends)

    monkeypatch.setattr(TreeSampler, "forward", forward)
    said: list[str] = []
    sampler = TreeSampler(model, renderer, say=said.append)
    samples = list(sampler.sample(stage, owed, PAPER, stream="run 1"))
    assert {(s.problem_id, s.index): s.token_ids for s in samples} == expected
    assert len(samples) == len(owed)
    assert any("out of memory" in text for text in said)


def test_no_memory_at_all_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    model, stage = tiny(), problems(2)
    sampler = TreeSampler(model, few_shot())
    monkeypatch.setattr(TreeSampler, "forward", forward)
    with pytest.raises(RestemError, match=r"generate\.max_tokens"):
        list(sampler.sample(stage, owe(stage, 2), PAPER, stream="run 1"))


def test_the_memory_of_keys_and_values_is_stated_before_anything_is_drawn() -> None:
    said: list[str] = []
    stage = problems(2)
    sampler = TreeSampler(tiny(), few_shot(), rows=32, say=said.append)
    next(sampler.sample(stage, owe(stage, 32), PAPER, stream="run 1"))
    assert said == [said[0]]
    assert "at most 32 samples in flight" in said[0]


def test_more_rows_are_tried_as_long_as_they_make_the_machine_faster() -> None:
    from restem.sampling.flight import Pace

    def settled(seconds: Any, most: int) -> int:
        pace = Pace(64, most)
        for _ in range(200):
            pace.step(pace.rows, seconds(pace.rows))
        return pace.rows

    assert settled(lambda rows: 1.0, 1000) == 1000  # a step costs the same whatever it holds
    assert settled(lambda rows: 0.01 * rows, 1000) == 64  # no gain: one doubling shows it
    assert settled(lambda rows: max(1.0, rows / 300), 1000) == 512


def test_a_later_stage_keeps_as_many_rows_as_an_earlier_one_found_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else every stage would try more, and memory would grow from one to the next."""
    from restem.sampling.flight import Pace

    step = Pace.step
    monkeypatch.setattr(Pace, "step", lambda pace, rows, _: step(pace, rows, 0.01 * rows))  # more rows are no faster
    seen: list[int] = []
    forward = TreeSampler.forward

    def watched(sampler: TreeSampler, tokens: Any, *rest: Any) -> Any:
        seen.append(len(tokens))
        return forward(sampler, tokens, *rest)

    monkeypatch.setattr(TreeSampler, "forward", watched)
    stage, sampler = problems(), TreeSampler(tiny(), few_shot())
    most = []
    for stream in ("run 1", "run 2"):
        seen.clear()
        assert len(list(sampler.sample(stage, owe(stage, 60), Decoding(max_tokens=20), stream=stream))) == 600
        most.append(max(seen))
    assert most == [256, 128]


def test_rows_that_end_at_once_while_the_batch_grows_are_replaced() -> None:
    """A third of the samples is empty: rows come and go before their slots exist, while 128 rows become 256 and 512."""
    logits = torch.full((tiny_models.VOCABULARY, tiny_models.VOCABULARY), -40.0)
    logits[[END, 10, 11]] = 0.0
    stage, model = problems(), tiny_models.bigram(logits)
    sampler = TreeSampler(model, few_shot())
    decoding = Decoding(max_tokens=30)
    grown = {(s.problem_id, s.index): s.token_ids for s in sampler.sample(stage, owe(stage, 120), decoding, stream="s")}
    assert len(grown) == 1200
    assert 300 < sum(not ids for ids in grown.values()) < 500
    few = TreeSampler(model, few_shot(), rows=16).sample(stage[:2], owe(stage[:2], 120), decoding, stream="s")
    assert all(grown[s.problem_id, s.index] == s.token_ids for s in few)
