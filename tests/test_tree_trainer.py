"""The tree trainer computes what training on one sequence per row computes, and goes on after a kill as if there was none."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

import tiny_models
from cuda_rules import CudaRules
from restem import models
from restem.compatibility import tree_attention
from restem.config import ImproveConfig, SelectConfig
from restem.errors import RestemError
from restem.sampling import Decoding, Owed, TreeSampler
from restem.selection import select
from restem.training import Interval, TreeTrainer
from restem.training.batches import Pack, make_packs, plan_steps, shared_prompt, token_weights
from restem.training.loss import PackLoss, SharedPrompt
from restem.types import Example
from tiny_models import END, REFUSED, SERVED, VOCABULARY, bigram, few_shot, one_thread, problems, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def random_tree(
    *, prefix: int = 20, branches: Sequence[int] = (3, 1, 4), longest: int = 30, seed: int = 0, weights: bool = True
) -> list[Example]:
    """Examples of some problems under one prefix, with so many completions each, of 1 to `longest` tokens."""
    chance = random.Random(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(chance.randrange(2, VOCABULARY) for _ in range(count))

    shared, examples = ids(prefix), []
    for number, count in enumerate(branches):
        prompt = (*shared, *ids(chance.randrange(1, 12)))
        for index in range(count):
            completion = (*ids(chance.randrange(longest)), END)
            weight = chance.choice([0.25, 0.5, 1.0, 2.0]) if weights else 1.0
            examples.append(
                Example(prompt_ids=prompt, completion_ids=completion, weight=weight, problem_id=f"p{number}", index=index)
            )
    return examples


TREES = {
    "uneven": random_tree(),
    "without a shared prefix": random_tree(prefix=0, branches=(2, 3)),
    "a single example": random_tree(branches=(1,)),
    "a single problem": random_tree(branches=(5,)),
    "completions of one token": random_tree(longest=1),
    "one prompt begins another": [
        Example(prompt_ids=(5, 6, 7), completion_ids=(8, 9, END)),
        Example(prompt_ids=(5, 6, 7, 8), completion_ids=(9, 10, 11, END)),
        Example(prompt_ids=(5, 6, 7, 8, 9, 9), completion_ids=(END,)),
    ],
}


def row_loss(model: Any, examples: Sequence[Example], objective: str = "sum") -> torch.Tensor:
    """transformers' own loss, one sequence a row, the prompt's labels masked by -100."""
    total = torch.zeros(())
    for example, weight in zip(examples, token_weights(examples, objective), strict=True):
        ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])
        labels = ids.clone()
        labels[0, : len(example.prompt_ids)] = -100
        total = total + model(input_ids=ids, labels=labels).loss * len(example.completion_ids) * weight
    return total


def row_gradients(model: Any, examples: Sequence[Example], objective: str = "sum") -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = row_loss(model, examples, objective)
    loss.backward()
    return loss.item(), flat_gradients(model)


def tree_gradients(
    model: Any,
    examples: Sequence[Example],
    objective: str = "sum",
    *,
    budget: int = 64,
    is_apart: bool = True,
    dtype: torch.dtype = torch.float32,
) -> tuple[float, torch.Tensor]:
    """As `Session.step` does it: the beginning of all prompts by itself, or in each pack."""
    model.zero_grad()
    total, pack_loss = 0.0, PackLoss(model, dtype)
    with tree_attention(model):
        shared = SharedPrompt(pack_loss, shared_prompt(examples) if is_apart else ())
        for pack in make_packs(examples, objective, budget, is_apart=is_apart):
            loss = pack_loss(pack, shared.before).weighted
            loss.backward()
            total += loss.item()
        shared.backward()
    return total, flat_gradients(model)


def flat_gradients(model: Any) -> torch.Tensor:
    return torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in model.parameters()])


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


# --- promise 4: tree training is row training -------------------------------------------------------------------------------


apart = pytest.mark.parametrize("is_apart", [True, False], ids=["shared part once", "shared part in each pack"])


@apart
@pytest.mark.parametrize("name", SERVED)
def test_loss_and_gradients_equal_row_training(name: str, is_apart: bool) -> None:
    model = tiny(name)
    expected, found = row_gradients(model, TREES["uneven"]), tree_gradients(model, TREES["uneven"], is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("name", SERVED)
def test_every_single_gradient_equals_row_training(name: str) -> None:
    """Parameter by parameter, so that none hides behind a larger one."""
    model = tiny(name)
    row_gradients(model, TREES["uneven"])
    expected = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    size = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    tree_gradients(model, TREES["uneven"])
    for key, parameter in model.named_parameters():
        # Some are zero but for rounding (the bias of a key shifts all scores alike): hence the second term.
        assert (parameter.grad - expected[key]).norm() <= 2e-5 * expected[key].norm() + 1e-7 * size, key


@apart
@pytest.mark.parametrize("objective", ["sum", "token-mean", "problem"])
@pytest.mark.parametrize("shape", TREES)
def test_trees_of_every_shape_equal_row_training(shape: str, objective: str, is_apart: bool) -> None:
    model = tiny()
    expected = row_gradients(model, TREES[shape], objective)
    found = tree_gradients(model, TREES[shape], objective, is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@apart
@pytest.mark.parametrize("budget", [1, 64, 100, 100_000])
def test_the_token_budget_changes_nothing(budget: int, is_apart: bool) -> None:
    examples, model = random_tree(branches=(4, 2, 5, 1), seed=3), tiny()
    expected, found = row_gradients(model, examples), tree_gradients(model, examples, budget=budget, is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


def test_a_smaller_budget_makes_more_packs_and_a_larger_one_computes_less() -> None:
    examples = random_tree(branches=(4, 2, 5, 1), seed=3)
    counts = [len(make_packs(examples, "sum", budget)) for budget in (1, 64, 100_000)]
    assert counts[0] == len(examples) > counts[1] > counts[2] == 1
    (pack,) = make_packs(examples, "sum", 100_000)
    (behind,) = make_packs(examples, "sum", 100_000, is_apart=True)
    assert len(pack.tree.tokens) - len(behind.tree.tokens) == len(shared_prompt(examples)) >= 20
    prompts = {example.prompt_ids for example in examples}
    once = 20 + sum(len(prompt) - 20 for prompt in prompts) + sum(len(example.completion_ids) - 1 for example in examples)
    assert len(pack.tree.tokens) <= once  # prompts may by chance share more than their prefix of 20


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_order_of_the_examples_changes_nothing(seed: int) -> None:
    model, shuffled = tiny(), list(TREES["uneven"])
    random.Random(seed).shuffle(shuffled)
    expected, found = tree_gradients(model, TREES["uneven"]), tree_gradients(model, shuffled)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert distance(found[1], expected[1]) < 1e-5


@apart
def test_long_nodes_equal_row_training(is_apart: bool) -> None:
    """Nodes longer than one block of the attention kernels, and more targets than one chunk of the loss."""
    examples = random_tree(prefix=150, branches=(4, 3, 4), longest=200, seed=5)
    assert sum(len(example.completion_ids) for example in examples) > 1024
    model = tiny()
    expected, found = row_gradients(model, examples), tree_gradients(model, examples, budget=1024, is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@apart
def test_bfloat16_arithmetic_stays_near_the_float32_gradient(is_apart: bool) -> None:
    """As near as row training in bfloat16 does, which is all that can be asked."""
    model, examples = tiny(), TREES["uneven"]
    _, exact = row_gradients(model, examples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rows = row_gradients(model, examples)
    _, found = tree_gradients(model, examples, is_apart=is_apart, dtype=torch.bfloat16)
    assert distance(found, exact) < 1.5 * distance(rows, exact)


@apart
@pytest.mark.parametrize("name", SERVED)
def test_training_in_bfloat16_does_not_depend_on_a_devices_autocast_rules(name: str, is_apart: bool) -> None:
    """On CUDA, autocast gives float32 for a softmax and much else, which a CPU computes in bfloat16: as near to float32."""
    model, examples = tiny(name), TREES["uneven"]
    _, exact = tree_gradients(model, examples, is_apart=is_apart)
    _, here = tree_gradients(model, examples, is_apart=is_apart, dtype=torch.bfloat16)
    with CudaRules():
        _, there = tree_gradients(model, examples, is_apart=is_apart, dtype=torch.bfloat16)
    assert distance(there, exact) < 1.2 * distance(here, exact)


@pytest.mark.parametrize("name", ["llama", "cohere"])
def test_an_output_layer_with_a_bias_is_trained_as_rows_are(name: str) -> None:
    """The bias itself, and all below it; as it is, and with logits that are scaled."""
    model = tiny(name)
    biased = torch.nn.Linear(48, VOCABULARY)
    biased.weight = model.lm_head.weight
    with torch.no_grad():
        biased.bias.copy_(torch.linspace(-1, 1, VOCABULARY))
    model.lm_head = biased
    expected, found = row_gradients(model, TREES["uneven"]), tree_gradients(model, TREES["uneven"])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5
    assert biased.bias.grad.norm() > 0


def test_an_output_layer_with_an_adapter_is_trained_as_rows_are() -> None:
    """A layer that is no plain product: its parameters, and what lies below it, get their gradients."""
    model = tiny()
    before = torch.nn.Linear(48, 48, bias=False)
    before.weight = torch.nn.Parameter(torch.eye(48) + 0.1 * torch.eye(48).roll(1, 0))
    model.lm_head = torch.nn.Sequential(before, model.lm_head)
    model.get_output_embeddings = lambda: model.lm_head
    expected, found = row_gradients(model, TREES["uneven"]), tree_gradients(model, TREES["uneven"])
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5
    with CudaRules(), torch.autocast("cpu", dtype=torch.bfloat16):
        _, rows = row_gradients(model, TREES["uneven"])
    with CudaRules():
        _, lower = tree_gradients(model, TREES["uneven"], dtype=torch.bfloat16)
    assert distance(lower, expected[1]) < 1.5 * distance(rows, expected[1])


@pytest.mark.parametrize("sure", [1.0, 8.0, 12.0])
def test_bfloat16_keeps_the_gradient_of_what_the_model_is_sure_of(sure: float) -> None:
    """Most targets of self-training are near certain. A model that gives the next token `sure` more logits than each other one:
    the gradient of its output layer is within rounding of the float32 one, however small both are."""
    model = bigram(sure * torch.eye(512).roll(1, 0))
    examples = [Example(prompt_ids=(1,), completion_ids=tuple(range(2, 200)))]
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with tree_attention(model):
            for pack in make_packs(examples, "token-mean", 4096):
                PackLoss(model, dtype)(pack).weighted.backward()
        gradients.append(model.lm_head.weight.grad.clone())
    assert distance(gradients[1], gradients[0]) < 0.02


# --- promise 3: the loss is on the targets, and they are what was sampled ----------------------------------------------------


def positions(pack: Pack) -> list[tuple[int, int]]:
    """(text position of the token that predicts, target) for every term of the loss."""
    return [(pack.tree.positions[source], target) for source, target in zip(pack.sources, pack.targets, strict=True)]


def test_row_18_every_target_is_a_completion_token_predicted_from_the_token_before_it() -> None:
    """Row 18: the mask, read back as tokens: prompt tokens are never targets, completion tokens always, once."""
    for examples in TREES.values():
        for budget in (1, 64, 4096):
            packs = make_packs(examples, "sum", budget)
            found = sorted(pair for pack in packs for pair in positions(pack))
            assert found == sorted(
                (len(example.prompt_ids) + place - 1, token)
                for example in examples
                for place, token in enumerate(example.completion_ids)
            )


def test_row_18_what_would_be_prompt_labels_cannot_matter() -> None:
    """Row 18: with every label of the prompt altered but masked, row training has the gradient of the tree; unmasked, not."""
    model, example = tiny(), TREES["a single example"][0]
    _, found = tree_gradients(model, [example])
    size = len(example.prompt_ids)
    ids = torch.tensor([[*example.prompt_ids, *example.completion_ids]])

    def gradient(prompt_labels: list[int]) -> torch.Tensor:
        labels = torch.tensor([[*prompt_labels, *example.completion_ids]])
        model.zero_grad()
        counted = int((labels[0, 1:] != -100).sum())
        (model(input_ids=ids, labels=labels).loss * counted * example.weight).backward()
        return flat_gradients(model)

    assert distance(found, gradient([-100] * size)) < 1e-5
    assert distance(found, gradient(list(example.prompt_ids))) > 0.1


def test_row_19_and_22_the_trainer_scores_a_sample_as_the_sampler_did() -> None:
    """Rows 19 and 22: minus the loss of an example is the log-probability under which its sample was drawn. That holds only
    if the prompt, the tokens and the end token are the same in both."""
    model, renderer, stage = tiny(), few_shot(), problems(6)
    with torch.no_grad():
        model.lm_head.weight[END] *= 2  # ends now and then
    sampler = TreeSampler(model, renderer)
    owed = [Owed(problem.id, index) for problem in stage for index in range(12)]
    drawn = list(sampler.sample(stage, owed, Decoding(temperature=1.0, max_tokens=24), stream="s"))
    graded = [replace(sample, reward=1.0, reason="correct") for sample in drawn]
    selection = select(stage, graded, renderer, SelectConfig(max_per_problem=12), stream="s")
    finished = {(sample.problem_id, sample.index): sample for sample in drawn if sample.finish == "stop"}
    assert 0 < len(finished) < len(drawn)
    assert {(example.problem_id, example.index) for example in selection.examples} == set(finished)  # row 22
    prompts = {problem.id: renderer.encode(problem) for problem in stage}
    for example in selection.examples:
        sample = finished[example.problem_id, example.index]
        assert example.prompt_ids == prompts[example.problem_id]
        assert example.completion_ids == (*sample.token_ids, END)
        (pack,) = make_packs([example], "sum", 4096)
        assert pack.targets == [*sample.token_ids, END]
        loss, _ = tree_gradients(model, [example])
        assert -loss == pytest.approx(sample.logprob, abs=1e-4 * max(1, len(sample.token_ids)))


# --- the objective ----------------------------------------------------------------------------------------------------------


def example_of(prompt: int, length: int, weight: float = 1.0) -> Example:
    return Example(prompt_ids=(2, 3, prompt), completion_ids=tuple(range(10, 10 + length)), weight=weight)


def test_row_21_lengths_2_and_4_weigh_as_2_to_4_under_the_sum() -> None:
    """Row 21: the weight of a completion is the sum over its tokens. By hand, for completions of 2, 4 and 4 tokens of
    problems 5, 6 and 6: the mean over examples of sums; the mean over tokens; one unit a problem, halved within the second."""
    examples = [example_of(5, 2), example_of(6, 4), example_of(6, 4)]
    assert token_weights(examples[:2], "sum") == [1 / 2, 1 / 2]
    packs = make_packs(examples[:2], "sum", 4096)
    assert sum(packs[0].weights[:2]) / sum(packs[0].weights[2:]) == 2 / 4
    assert token_weights(examples, "sum") == [1 / 3, 1 / 3, 1 / 3]
    assert token_weights(examples, "token-mean") == [1 / 10, 1 / 10, 1 / 10]
    assert token_weights(examples, "problem") == [1 / 2, 1 / 4, 1 / 4]


def test_rewards_share_a_problem_by_their_size() -> None:
    """Rewards 1 and 3 of one problem: a quarter and three quarters of it. The other problem weighs as much as both."""
    examples = [example_of(5, 2, 1.0), example_of(5, 4, 3.0), example_of(6, 4, 0.5)]
    assert token_weights(examples, "problem") == [1 / 8, 3 / 8, 1 / 2]
    assert token_weights(examples, "sum") == [1 / 3, 3 / 3, 0.5 / 3]


@pytest.mark.parametrize("objective", ["sum", "token-mean", "problem"])
def test_row_15_weight_0_is_the_same_as_left_out(objective: str) -> None:
    """Row 15: rewards 0 and 1 as weights give the loss and gradient of the filtered set."""
    mixed = [replace(example, weight=float(number % 3 != 0)) for number, example in enumerate(TREES["uneven"])]
    filtered = [example for example in mixed if example.weight]
    assert 0 < len(filtered) < len(mixed)
    model = tiny()
    expected, found = tree_gradients(model, filtered, objective), tree_gradients(model, mixed, objective)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize("objective", ["sum", "token-mean"])
def test_row_17_half_the_reward_halves_the_gradient(objective: str) -> None:
    """Row 17: exactly, since a half is exact in binary."""
    model = tiny()
    whole = tree_gradients(model, TREES["uneven"], objective)
    half = tree_gradients(model, [replace(e, weight=e.weight / 2) for e in TREES["uneven"]], objective)
    assert half[0] == pytest.approx(whole[0] / 2, rel=1e-6)
    assert distance(half[1], whole[1] / 2) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"weight": -0.5}, "weight -0.5.*non-negative"),
        ({"weight": math.nan}, "weight nan.*non-negative"),
        ({"completion_ids": ()}, "no target token"),
        ({"prompt_ids": ()}, "empty prompt"),
    ],
)
def test_row_17_an_example_that_cannot_be_trained_on_is_an_error(tmp_path: Path, wrong: dict[str, Any], message: str) -> None:
    """Row 17: a negative reward, and what else would be trained on silently; named by problem and index."""
    good = Example(prompt_ids=(2, 3), completion_ids=(4, END), problem_id="p7", index=2)
    with pytest.raises(RestemError, match=f"example 2 of problem p7.*{message}"):
        list(TreeTrainer(ImproveConfig()).train("nowhere", [replace(good, **wrong)], tmp_path, stream="s"))


def test_a_loss_and_its_gradient_worked_out_by_hand() -> None:
    """After token 1 the model says 1/2, 1/4, 1/8, 1/8, after token 2 it says 0.1, 0.2, 0.3, 0.4. The completion 2, 3 after
    the prompt 1 has the loss -log(1/8 * 0.4). The hidden state is 2 along the axis of the token read, so that the gradient of
    the output layer is 2 (p - 1[target]) in that column."""
    after_1, after_2 = [1 / 2, 1 / 4, 1 / 8, 1 / 8], [0.1, 0.2, 0.3, 0.4]
    table = torch.zeros(4, 4)
    table[:, 1], table[:, 2] = torch.tensor(after_1).log(), torch.tensor(after_2).log()
    model = bigram(table)
    loss, _ = tree_gradients(model, [Example(prompt_ids=(1,), completion_ids=(2, 3))])
    assert loss == pytest.approx(-math.log(0.05), rel=1e-6)
    by_hand = torch.tensor(
        [
            [0.0, 2 * 1 / 2, 2 * 0.1, 0.0],
            [0.0, 2 * 1 / 4, 2 * 0.2, 0.0],
            [0.0, 2 * (1 / 8 - 1), 2 * 0.3, 0.0],
            [0.0, 2 * 1 / 8, 2 * (0.4 - 1), 0.0],
        ]
    )
    assert torch.allclose(model.lm_head.weight.grad, by_hand, atol=1e-6)


# --- steps, intervals, learning rate -----------------------------------------------------------------------------------------


def settings(**changes: Any) -> ImproveConfig:
    return ImproveConfig(**{"epochs": 2.0, "batch_size": 4, "learning_rate": 1e-3, "warmup": 0.0, **changes})


def identities(step_or_steps: Any) -> list[tuple[str, int]]:
    steps = step_or_steps if isinstance(step_or_steps, list) else [step_or_steps]
    return [(example.problem_id, example.index) for step in steps for example in step.examples]


def test_every_epoch_holds_every_example_once_and_steps_hold_whole_problems() -> None:
    examples = random_tree(branches=(3, 1, 4, 2, 2, 5, 1), seed=4)
    steps = plan_steps(examples, settings(epochs=3), stream="s")
    whole = sorted((example.problem_id, example.index) for example in examples)
    ends = [number for number, step in enumerate(steps) if step.interval is not None]
    assert [steps[end].interval for end in ends] == [1, 2, 3]
    orders = []
    for first, last in zip([0, *(end + 1 for end in ends)], ends, strict=False):
        epoch = steps[first : last + 1]
        assert sorted(identities(epoch)) == whole
        orders.append(identities(epoch))
        for step in epoch[:-1]:
            assert len(step.examples) >= 4
        homes = [{example.problem_id for example in step.examples} for step in epoch]
        assert sum(len(home) for home in homes) == 7  # no problem in two steps
    assert len({tuple(order) for order in orders}) == 3  # a new order in every epoch


def test_the_order_depends_on_the_stream_alone() -> None:
    examples = random_tree(branches=(2,) * 8, seed=6)
    one, again, other = (plan_steps(examples, settings(), stream=name) for name in ("1", "1", "2"))
    assert one == again
    assert identities(one) != identities(other)


@pytest.mark.parametrize(
    ("epochs", "interval", "ends"),
    [
        (2.0, 1.0, [10, 20]),
        (2.0, 0.5, [5, 10, 15, 20]),
        (1.0, 0.1, list(range(1, 11))),
        (1.5, 1.0, [10, 15]),
        (0.3, 1.0, [3]),
        (1.1, 1.1, [11]),
        (0.75, 0.25, [3, 5, 8]),
        (3.0, 2.0, [20, 30]),
    ],
)
def test_fractional_epochs_and_intervals_end_where_they_say(epochs: float, interval: float, ends: list[int]) -> None:
    """Ten problems of one example, one a step; an interval ends with the first step that reaches it, the last with the run."""
    examples = random_tree(branches=(1,) * 10)
    steps = plan_steps(examples, settings(epochs=epochs, interval=interval, batch_size=1), stream="s")
    assert [number + 1 for number, step in enumerate(steps) if step.interval is not None] == ends
    assert [step.interval for step in steps if step.interval is not None] == list(range(1, len(ends) + 1))
    assert len(steps) == ends[-1]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ("cosine", [0.5, 1, 1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602]),
    ],
)
def test_learning_rates_worked_out_by_hand(schedule: str, expected: list[float]) -> None:
    """Ten steps, two of them warm-up. The cosine: (1 + cos(pi k/8)) / 2 for k = 0 to 7."""
    trainer = TreeTrainer(settings(schedule=schedule, warmup=0.2, learning_rate=3e-4))
    assert [trainer.learning_rate(step, 10) / 3e-4 for step in range(10)] == pytest.approx(expected, rel=1e-6)


def test_without_warm_up_the_first_step_has_the_peak() -> None:
    assert TreeTrainer(settings(warmup=0)).learning_rate(0, 7) == 1e-3


# --- a whole training run ----------------------------------------------------------------------------------------------------

SOME = random_tree(branches=(3, 2, 2, 3), longest=8, seed=8)


def train(start: str, directory: Path, *, stop_after: int = 99, examples: Any = SOME, **changes: Any) -> list[Interval]:
    """The intervals of a run that is dropped after so many."""
    running = TreeTrainer(settings(**changes)).train(start, examples, directory, stream="s")
    reached = []
    for interval in running:
        reached.append(interval)
        if len(reached) == stop_after:
            break
    running.close()
    return reached


def timeless(interval: Interval) -> dict[str, Any]:
    def clean(metrics: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in metrics.items() if "second" not in key and key != "parts"}

    return clean(interval.metrics) | {"history": [clean(step) for step in interval.metrics["history"]]}


def weights_of(directory: str | Path) -> dict[str, torch.Tensor]:
    return dict(models.load_model(str(directory), dtype=torch.float32).state_dict())


@pytest.mark.parametrize("objective", ["sum", "token-mean", "problem"])
def test_training_reaches_the_weights_that_adamw_on_rows_reaches(tmp_path: Path, objective: str) -> None:
    """The same steps with transformers' loss, torch's AdamW, clipping and a warm-up, one sequence a row."""
    start = save(tiny(), tmp_path / "base")
    changes = {"objective": objective, "weight_decay": 0.1, "warmup": 0.3, "clip": 0.5}
    trained = weights_of(train(start, tmp_path / "out", **changes)[-1].model)

    model = tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    steps = plan_steps(SOME, settings(**changes), stream="s")
    for number, step in enumerate(steps):
        optimiser.param_groups[0]["lr"] = 1e-3 * min(1, (number + 1) / math.ceil(0.3 * len(steps)))
        optimiser.zero_grad()
        row_loss(model, step.examples, objective).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimiser.step()
    expected = model.state_dict()
    moved = torch.cat([(expected[name] - before[name]).flatten() for name in expected]).norm()
    apart = torch.cat([(expected[name] - trained[name]).flatten() for name in expected]).norm()
    assert apart < 0.01 * moved


def test_the_loss_falls_and_the_base_stays(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    before = models.fingerprint(start)
    reached = train(start, tmp_path / "out", epochs=6.0)
    losses = [interval.metrics["loss"] for interval in reached]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert models.fingerprint(start) == before
    assert len({before, *(models.fingerprint(interval.model) for interval in reached)}) == 7


def test_row_5_a_second_run_starts_afresh(tmp_path: Path) -> None:
    """Row 5: nothing of a first run's optimiser or schedule reaches a second one of the same trainer."""
    start = save(tiny(), tmp_path / "base")
    trainer = TreeTrainer(settings(warmup=0.4))
    first, second = ([*trainer.train(start, SOME, tmp_path / name, stream="s")] for name in ("one", "two"))
    assert [models.fingerprint(i.model) for i in first] == [models.fingerprint(i.model) for i in second]
    assert [timeless(i) for i in first] == [timeless(i) for i in second]


@pytest.fixture(scope="module")
def straight(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Interval]]:  # noqa: F811
    """A base, and four intervals trained from it without interruption."""
    directory = tmp_path_factory.mktemp("straight")
    start = save(tiny(), directory / "base")
    return start, train(start, directory / "out", epochs=4.0, warmup=0.3, schedule="cosine")


def resumed(start: str, directory: Path) -> list[Interval]:
    return train(start, directory, epochs=4.0, warmup=0.3, schedule="cosine")


@pytest.mark.parametrize("interrupted_after", [1, 2, 3, 4])
def test_a_run_that_was_interrupted_goes_on_to_the_same_weights(
    tmp_path: Path, straight: tuple[str, list[Interval]], interrupted_after: int
) -> None:
    start, expected = straight
    train(start, tmp_path, stop_after=interrupted_after, epochs=4.0, warmup=0.3, schedule="cosine")
    found = resumed(start, tmp_path)
    assert [interval.number for interval in found] == [1, 2, 3, 4]
    assert [models.fingerprint(i.model) for i in found] == [models.fingerprint(i.model) for i in expected]
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]


def test_a_kill_between_checkpoint_and_interval_costs_no_step(tmp_path: Path, straight: tuple[str, list[Interval]]) -> None:
    """Killed while it wrote interval 3: behind the state of it, and before the interval took its name."""
    start, expected = straight
    train(start, tmp_path, stop_after=3, epochs=4.0, warmup=0.3, schedule="cosine")
    (tmp_path / "interval-3").rename(tmp_path / ".tmp-interval-3")
    seen: list[int] = []
    trainer = TreeTrainer(settings(epochs=4.0, warmup=0.3, schedule="cosine"), report=lambda done, *_: seen.append(done))
    found = list(trainer.train(start, SOME, tmp_path, stream="s"))
    assert seen[0] == expected[2].metrics["step"] + 1
    assert [models.fingerprint(i.model) for i in found] == [models.fingerprint(i.model) for i in expected]
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".tmp-")]


def test_a_kill_within_an_interval_costs_only_its_steps(tmp_path: Path, straight: tuple[str, list[Interval]]) -> None:
    start, expected = straight
    changes = settings(epochs=4.0, warmup=0.3, schedule="cosine")

    def killed(done: int, total: int, metrics: dict[str, float]) -> None:
        if done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(TreeTrainer(changes, report=killed).train(start, SOME, tmp_path, stream="s"))
    seen: list[int] = []
    trainer = TreeTrainer(changes, report=lambda done, total, metrics: seen.append(done))
    found = list(trainer.train(start, SOME, tmp_path, stream="s"))
    assert seen[0] > 1
    assert [models.fingerprint(i.model) for i in found] == [models.fingerprint(i.model) for i in expected]


def test_a_finished_run_is_not_trained_again(tmp_path: Path, straight: tuple[str, list[Interval]]) -> None:
    start, expected = straight
    shutil.copytree(Path(expected[0].model).parents[1], tmp_path / "copy")
    trainer = TreeTrainer(settings(epochs=4.0), report=lambda *_: pytest.fail("a step was taken"))
    assert [i.metrics for i in trainer.train(start, SOME, tmp_path / "copy", stream="s")] == [i.metrics for i in expected]


def test_a_learning_rate_that_is_far_too_high_is_a_clear_error(tmp_path: Path) -> None:
    start = save(tiny(), tmp_path / "base")
    with pytest.raises(RestemError, match=r"training diverged at step \d+: loss .*Lower improve.learning_rate"):
        train(start, tmp_path / "out", learning_rate=1e30)


def test_no_interval_of_a_diverged_run_is_kept(tmp_path: Path) -> None:
    """One step an epoch: what the first one broke is seen before its interval is written."""
    start = save(tiny(), tmp_path / "base")
    with pytest.raises(RestemError, match="diverged"):
        train(start, tmp_path / "out", learning_rate=1e39, batch_size=100)
    assert not (tmp_path / "out" / "interval-1").exists()


@pytest.mark.parametrize("name", ["mamba", "bloom"])
def test_a_model_that_the_tree_would_compute_wrongly_is_not_trained(tmp_path: Path, name: str) -> None:
    start = save(tiny(name, table=REFUSED), tmp_path / "base")
    with pytest.raises(RestemError, match=f"cannot serve this {name} model"):
        train(start, tmp_path / "out")


# --- what is handed over -----------------------------------------------------------------------------------------------------


def stored(directory: str | Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for file in Path(directory).glob("*.safetensors"):
        with safe_open(file, framework="pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_interval_is_an_ordinary_model_directory_like_its_start(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """It loads with AutoModelForCausalLM and AutoTokenizer, and holds the tensors of the start, in their number format."""
    start = save(tiny(name), tmp_path / "base", dtype=dtype)
    interval = train(start, tmp_path / "out", epochs=1.0, learning_rate=1e-2)[-1]
    before, after = stored(start), stored(interval.model)
    assert {key: (value.shape, value.dtype) for key, value in after.items()} == {
        key: (value.shape, value.dtype) for key, value in before.items()
    }
    assert {value.dtype for value in after.values()} == {dtype}
    assert json.loads((Path(interval.model) / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    model = transformers.AutoModelForCausalLM.from_pretrained(interval.model)
    assert model.dtype == dtype
    assert model.config.to_dict() | {"_name_or_path": ""} == models.load_model(start, dtype=dtype).config.to_dict() | {
        "_name_or_path": ""
    }
    assert (
        transformers.AutoTokenizer.from_pretrained(interval.model)("the abc")["input_ids"]
        == tiny_models.tokenizer()("the abc")["input_ids"]
    )
    assert any(not torch.equal(before[key], after[key]) for key in before)


def test_tied_embeddings_stay_tied_and_are_trained(tmp_path: Path) -> None:
    start = save(tiny("llama-tied"), tmp_path / "base")
    interval = train(start, tmp_path / "out")[-1]
    model = transformers.AutoModelForCausalLM.from_pretrained(interval.model)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, tiny("llama-tied").get_input_embeddings().weight)


def test_a_resumed_run_of_a_bfloat16_model_goes_on_in_float32(tmp_path: Path) -> None:
    """The handed-over model is rounded; the run is not, so that small steps are not lost."""
    start = save(tiny(), tmp_path / "base", dtype=torch.bfloat16)
    straight = train(start, tmp_path / "straight", epochs=3.0, learning_rate=1e-5)
    train(start, tmp_path / "stopped", stop_after=1, epochs=3.0, learning_rate=1e-5)
    again = train(start, tmp_path / "stopped", epochs=3.0, learning_rate=1e-5)
    assert [models.fingerprint(i.model) for i in again] == [models.fingerprint(i.model) for i in straight]
    assert [timeless(i) for i in again] == [timeless(i) for i in straight]


def test_a_trained_model_writes_what_it_was_trained_on(tmp_path: Path) -> None:
    """The whole way: prompts of the renderer, trained by the tree, sampled by the tree."""
    renderer, stage = few_shot(), problems(3)
    answers = {problem.id: (*renderer.tokenizer(f" {number}th abc")["input_ids"], END) for number, problem in enumerate(stage)}
    examples = [
        Example(prompt_ids=renderer.encode(problem), completion_ids=answers[problem.id], problem_id=problem.id)
        for problem in stage
    ]
    start = save(tiny(), tmp_path / "base")
    interval = train(start, tmp_path / "out", examples=examples, epochs=40.0, interval=40.0, learning_rate=5e-3)[-1]
    model = models.load_model(interval.model, dtype=torch.float32)
    owed = [Owed(problem.id, 0) for problem in stage]
    samples = TreeSampler(model, renderer).sample(stage, owed, Decoding(temperature=0, max_tokens=20), stream="s")
    assert {s.problem_id: (s.text, s.finish) for s in samples} == {
        "p0": (" 0th abc", "stop"),
        "p1": (" 1th abc", "stop"),
        "p2": (" 2th abc", "stop"),
    }
