"""The sampler's path off the CPU, run on CPU tensors: it draws what the path for a CPU does, whose tests are in
`test_tree_sampler.py`. What only a GPU can show, speed and CUDA's own graphs, is not here."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import tiny_models
from restem.errors import RestemError
from restem.memory import free_bytes, is_out_of_memory
from restem.prompts import Exemplar, Prompt, Renderer
from restem.sampling import Decoding, Owed, TreeSampler
from restem.sampling.blocks import Blocks
from restem.sampling.deck_flight import DeckFlight
from restem.sampling.graphs import Replays, rounded
from restem.sampling.room import Lengths, Needs
from restem.types import Problem, Sample
from test_tree_sampler import RENDERERS, forward_logprobs, number_formats, owe
from tiny_models import END, SERVED, few_shot, one_thread, problems, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

PAPER = Decoding(temperature=0.7, top_k=40, max_tokens=16)
GREEDY = Decoding(temperature=0, max_tokens=16)
Tokens = dict[tuple[str, int], tuple[int, ...]]


def again(step: Callable[[], None]) -> Callable[[], None]:
    """A recording as a CPU makes it: the step itself."""
    return step


def sampler(model: Any, renderer: Renderer, *, on_deck: bool = True, record: Any = again, **settings: Any) -> TreeSampler:
    made = TreeSampler(model, renderer, on_deck=on_deck, **settings)
    made.record = record
    return made


def draw(
    model: Any, renderer: Renderer, stage: Sequence[Problem], owed: Sequence[Owed], decoding: Decoding, **how: Any
) -> Tokens:
    drawn = list(sampler(model, renderer, **how).sample(stage, owed, decoding, stream="s"))
    by_key = {(sample.problem_id, sample.index): sample.token_ids for sample in drawn}
    assert len(by_key) == len(drawn)
    return by_key


# --- the same samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decoding", [GREEDY, PAPER], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", SERVED)
def test_samples_are_those_of_the_path_for_a_cpu(name: str, decoding: Decoding) -> None:
    """Whose greedy completions are those of `generate`. 20 samples through 16 rows, log-probabilities included."""
    model, renderer, stage = tiny(name), few_shot(), problems(5)
    found, expected = (
        sorted(sampler(model, renderer, on_deck=deck, rows=16).sample(stage, owe(stage, 4), decoding, stream="s"), key=key_of)
        for deck in (True, False)
    )
    assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
    assert [sample.finish for sample in found] == [sample.finish for sample in expected]
    assert [s.logprob for s in found] == pytest.approx([s.logprob for s in expected], abs=1e-3)


def key_of(sample: Sample) -> tuple[str, int]:
    return sample.problem_id, sample.index


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma2"])
@pytest.mark.parametrize("prompts", RENDERERS)
def test_prompts_that_share_much_a_little_or_nothing_give_the_same_samples(prompts: str, name: str) -> None:
    model, renderer, stage = tiny(name), RENDERERS[prompts][0](), problems()
    owed = owe(stage, 2)
    assert draw(model, renderer, stage, owed, PAPER) == draw(model, renderer, stage, owed, PAPER, on_deck=False)


@pytest.mark.parametrize("name", ["llama", "mistral-window"])
def test_samples_of_several_blocks_are_the_same(name: str) -> None:
    model, stage = tiny(name), problems(3)
    decoding = Decoding(temperature=1.2, max_tokens=150)
    found = draw(model, few_shot(), stage, owe(stage, 3), decoding)
    assert found == draw(model, few_shot(), stage, owe(stage, 3), decoding, on_deck=False)
    assert max(map(len, found.values())) == 150


@pytest.mark.parametrize("dtype", number_formats(), ids=str)
def test_a_sample_does_not_depend_on_what_else_is_owed(dtype: torch.dtype) -> None:
    model, renderer, stage = tiny().to(dtype), few_shot(), problems()
    owed = owe(stage, 8)
    whole = draw(model, renderer, stage, owed, PAPER)
    assert len(set(whole.values())) > 60
    part = owed[::-3]
    assert draw(model, renderer, stage, part, PAPER) == {tuple(key): whole[key] for key in part}
    assert draw(model, renderer, stage, owed, PAPER, rows=16) == whole
    for key in owed[:: len(owed) // 4]:
        assert draw(model, renderer, stage, [key], PAPER) == {tuple(key): whole[key]}


def test_many_samples_of_one_problem_share_several_copies_of_its_question() -> None:
    model, stage = tiny(), problems(2)
    owed = owe(stage[:1], 100)
    assert draw(model, few_shot(), stage, owed, PAPER) == draw(model, few_shot(), stage, owed, PAPER, on_deck=False)


def test_a_prompt_of_which_only_the_last_token_is_its_own_is_served() -> None:
    """Alone in its stage: everything else is the prefix, and its question has no block."""
    model, stage = tiny(), problems(1)
    owed = owe(stage, 20)
    assert draw(model, few_shot(), stage, owed, PAPER) == draw(model, few_shot(), stage, owed, PAPER, on_deck=False)


@pytest.mark.parametrize("decoding", [Decoding(top_p=0.97, max_tokens=3), Decoding(min_p=0.05, max_tokens=3)], ids=str)
def test_a_nucleus_larger_than_the_candidates_is_exact(decoding: Decoding) -> None:
    """A flat vocabulary of 1,500: the tokens are those of whole sorted rows."""
    logits = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0)) * 0.3
    model, stage = tiny_models.bigram(logits), problems(2)
    found = draw(model, few_shot(), stage, owe(stage, 20), decoding)
    assert found == draw(model, few_shot(), stage, owe(stage, 20), decoding, on_deck=False)
    order = logits[:, tiny_models.vocabulary()[":"]].argsort(descending=True).tolist()
    assert any(order.index(tokens[0]) >= 1024 for tokens in found.values())


def test_rows_that_end_at_once_are_replaced() -> None:
    """A third of the samples is empty, and the others end at any time: rows come and go across blocks."""
    logits = torch.full((tiny_models.VOCABULARY, tiny_models.VOCABULARY), -40.0)
    logits[10:70] = 0.0
    logits[END] = 1.0
    stage, model = problems(), tiny_models.bigram(logits)
    owed, decoding = owe(stage, 40), Decoding(max_tokens=200)
    found = draw(model, few_shot(), stage, owed, decoding, rows=64)
    assert len(found) == 400
    assert found == draw(model, few_shot(), stage, owed, decoding, on_deck=False, rows=64)
    assert min(map(len, found.values())) == 0 and max(map(len, found.values())) > 64


def test_rows_go_on_where_their_blocks_are_moved_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples end at any time by one of six end tokens; towards the end, the blocks that are left move together."""
    model, stage = tiny(), problems()
    model.generation_config.eos_token_id = [20, 40, 60, 80, 100]
    moved: list[int] = []
    own = Blocks.tidy

    def tidy(blocks: Blocks) -> Any:
        moves = own(blocks)
        moved.append(sum(target >= blocks.count // 2 for _, target in moves))
        return moves

    monkeypatch.setattr(Blocks, "tidy", tidy)
    decoding = Decoding(temperature=1.5, max_tokens=70)
    found = draw(model, few_shot(), stage, owe(stage, 10), decoding)
    assert found == draw(model, few_shot(), stage, owe(stage, 10), decoding, on_deck=False)
    assert sum(moved) > 10


def test_what_fills_a_pack_stays_within_the_context() -> None:
    """GPT-2 has a table of positions, here of 512: the prompts share 430 tokens, and a pack is filled up to 256."""
    model, stage = tiny("gpt2"), problems(4)
    exemplar = Exemplar(question="2 + 5?", solution="2 + 5 = 7. " * 33 + "The answer is 7.")
    renderer = Renderer(Prompt(instruction="Add the numbers.", exemplars=(exemplar,)), tiny_models.tokenizer())
    assert 400 < len(renderer.encode(stage[0])) < 512 - 16
    owed = owe(stage, 2)
    assert draw(model, renderer, stage, owed, PAPER) == draw(model, renderer, stage, owed, PAPER, on_deck=False)


# --- number formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [0.0, 30.0, 100.0, 300.0])
def test_large_key_biases_cost_bfloat16_no_more_than_they_cost_sdpa(bias: float) -> None:
    """As Qwen2.5 has them: scores of hundreds, which bfloat16 would round to whole numbers. Error of the log-probabilities
    against the same weights in float32, of this path and of transformers' sdpa, over the same tokens."""
    low = tiny("qwen2")
    with torch.no_grad():
        for layer in low.model.layers:
            keys = layer.self_attn.k_proj.bias
            keys.copy_(bias * torch.randn(keys.shape, generator=torch.Generator().manual_seed(1)))
    low = low.to(torch.bfloat16)
    exact, renderer, stage = copy.deepcopy(low).float(), few_shot(), problems()
    prompts = {problem.id: renderer.encode(problem) for problem in stage}
    samples = list(sampler(low, renderer).sample(stage, owe(stage, 2), Decoding(max_tokens=24), stream="s"))
    ours = sdpa = 0.0
    for sample in samples:
        completion = [*sample.token_ids, *([END] if sample.finish == "stop" else [])]
        places = torch.tensor(completion)[:, None]
        of = [forward_logprobs(m, prompts[sample.problem_id], completion).gather(-1, places).sum().item() for m in (exact, low)]
        ours += (sample.logprob - of[0]) ** 2
        sdpa += (of[1] - of[0]) ** 2
    assert ours**0.5 < 1.5 * sdpa**0.5


# --- recorded steps ---------------------------------------------------------------------------------------------------------


def test_a_size_is_recorded_when_it_comes_again_and_replayed_from_then_on() -> None:
    made, replayed = [], []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        made.append(step)

        def replay() -> None:
            replayed.append(step)
            step()

        return replay

    model, stage = tiny(), problems(3)
    found = draw(model, few_shot(), stage, owe(stage, 5), GREEDY, record=record)
    assert found == draw(model, few_shot(), stage, owe(stage, 5), GREEDY, on_deck=False)
    assert 0 < len(made) <= 3 < len(replayed)


@pytest.mark.parametrize("fault", ["recording fails", "a replay computes something else"])
def test_a_faulty_recording_is_said_once_and_changes_no_sample(fault: str) -> None:
    def record(step: Callable[[], None]) -> Callable[[], None]:
        if fault == "recording fails":
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda: None

    said: list[str] = []
    model, stage = tiny(), problems(3)
    found = draw(model, few_shot(), stage, owe(stage, 5), PAPER, record=record, say=said.append)
    assert found == draw(model, few_shot(), stage, owe(stage, 5), PAPER, on_deck=False)
    assert len([text for text in said if "operation by operation" in text]) == 1


def test_a_faulty_recording_is_not_tried_again_in_a_later_stage() -> None:
    tried, said = [], list[str]()

    def record(step: Callable[[], None]) -> Callable[[], None]:
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing")

    stage = problems(3)
    sampler = TreeSampler(tiny(), few_shot(), say=said.append, on_deck=True)
    sampler.record = record
    for stream in ("one", "two"):
        assert len(list(sampler.sample(stage, owe(stage, 5), GREEDY, stream=stream))) == 15
    assert len(tried) == len([text for text in said if "operation by operation" in text]) == 1


def test_a_replay_is_compared_with_what_was_computed_before_it_is_used() -> None:
    """Rounding may differ; a token in twenty may, too."""
    out = torch.tensor([[5.0] * 20, [-1.0] * 20])

    def outcome(change: float, rows: int) -> list[str]:
        said: list[str] = []
        calls = [0]

        def step() -> None:
            calls[0] += 1
            out[0], out[1] = 5.0, -1.0

        def replay() -> None:
            step()
            out[1, :rows] += change

        replays = Replays(lambda _: replay, said.append)
        for _ in range(4):
            replays.run("size", step, out)
        return said

    assert not outcome(0.01, 20) and not outcome(3.0, 1)
    assert outcome(3.0, 3)


def test_sizes_are_few_and_never_a_third_too_large() -> None:
    sizes = [rounded(count) for count in range(1, 5000)]
    assert len(set(sizes)) < 20
    assert all(count <= size < 1.5 * count for count, size in zip(range(17, 5000), sizes[16:], strict=True))


# --- room -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "each"), [(4, 3), (2, 7)], ids=["few a problem", "many a problem"])
def test_a_full_pool_sends_the_youngest_rows_back_and_they_come_out_the_same(
    monkeypatch: pytest.MonkeyPatch, count: int, each: int
) -> None:
    """Samples of 130 tokens where 65 were expected, in a pool of 13 blocks."""
    model, stage = tiny(), problems(count)
    owed, decoding = owe(stage, each), Decoding(temperature=1.2, max_tokens=130)
    expected = draw(model, few_shot(), stage, owed, decoding)
    back: list[int] = []
    own = DeckFlight._give_back

    def give_back(flight: DeckFlight) -> None:
        back.append(len(flight.rows))
        own(flight)

    monkeypatch.setattr(DeckFlight, "_give_back", give_back)
    block = sampler(model, few_shot()).model.config.num_hidden_layers * 2 * 64 * 2 * 8 * 4
    monkeypatch.setattr("restem.sampling.tree.free_bytes", lambda device: 2 * 13 * block)
    assert draw(model, few_shot(), stage, owed, decoding) == expected
    assert back


def test_a_pool_for_not_even_one_sample_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("restem.sampling.tree.free_bytes", lambda device: 100_000)
    stage = problems(2)
    with pytest.raises(RestemError, match=r"generate\.max_tokens"):
        draw(tiny(), few_shot(), stage, owe(stage, 2), Decoding(max_tokens=300))


def test_the_memory_of_the_pool_is_stated_before_anything_is_drawn() -> None:
    """40 samples of 16 tokens with 5 problems: each a block, and as many for questions, some of them computed ahead."""
    said: list[str] = []
    stage = problems(5)
    next(sampler(tiny(), few_shot(), say=said.append).sample(stage, owe(stage, 8), PAPER, stream="s"))
    (text,) = said
    assert text.startswith("at most 40 samples in flight: 0.00 GB of keys and values, enough for answers of ")


def test_rows_are_planned_at_the_lengths_seen_so_far() -> None:
    needs: dict[str, Any] = {"block": 1000, "row": 1, "longest": 32, "asked": [1, 3] * 50, "samples": 3200}
    lengths = Lengths()
    assert lengths.expected(2048) == 1024  # nothing seen: half of the longest
    for _ in range(100):
        lengths.add(200)
    assert lengths.expected(2048) == 250
    long = Needs(expected=16, **needs).plan(2_000_000, 4096, least_seats=1)
    short = Needs(expected=4, **needs).plan(2_000_000, 4096, least_seats=1)
    assert (long.blocks, short.blocks) == (1000, 1000)
    assert (long.rows, short.rows) == (48, 192)  # 62 and 246 would fit; a full size is better
    assert (short.seats, short.share) == (32, 2 / 32)
    whole = Needs(expected=4, **needs).plan(
        10**9, 320, least_seats=1
    )  # ten questions, the other ninety ahead, one as the longest
    assert (whole.rows, whole.blocks) == (320, 320 * 8 + (10 + 100) * 2 + 3)


def test_blocks_are_found_where_their_lists_say_whatever_comes_and_goes() -> None:
    """Against a dictionary: 3,000 random steps of taking, giving back and closing holes."""
    generator, blocks = random.Random(0), Blocks(60, 4)
    rows: dict[int, list[int]] = {}
    questions: dict[int, list[int]] = {}
    memory: dict[int, int] = {}
    for number in range(3000):
        kind = generator.choice(["row", "question", "go", "go", "tidy"])
        if kind == "tidy":
            for source, target in blocks.tidy():
                memory[target] = memory.pop(source)
            assert (blocks.asked.high, blocks.own.high) == (sum(map(len, questions.values())), sum(map(len, rows.values())))
        elif kind == "go" and (holders := [(side, name) for side in (rows, questions) for name in side]):
            side, name = generator.choice(holders)
            for block in side[name]:
                assert memory.pop(blocks.at(block) if side is rows else block) == name
            (blocks.give_own if side is rows else blocks.give_asked)(side.pop(name))
        elif kind in ("row", "question") and not blocks.is_scattered(3):
            mine: list[int] = []
            if kind == "row":
                places = [blocks.take_own(mine, number, 7)]
                rows[number] = mine
            else:
                blocks.take_asked(mine, 0, generator.randint(1, 192))
                questions[number], places = mine, list(mine)
            assert not set(places) & set(memory)
            memory.update(dict.fromkeys(places, number))
        assert blocks.free == 60 - len(memory)


def test_running_out_of_memory_is_recognised_in_the_words_of_every_device() -> None:
    for text in ("CUDA out of memory. Tried", "MPS backend out of memory", "DefaultCPUAllocator: can't allocate memory"):
        assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(torch.OutOfMemoryError("no"))
    assert not is_out_of_memory(RuntimeError("shapes differ"))


def test_memory_that_pytorch_holds_and_does_not_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20)
    assert free_bytes(torch.device("cuda")) == 40
