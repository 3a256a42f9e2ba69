"""FlexAttention over a tree is row training too: in plain operations, since a CPU has no backward kernel of it.

What a GPU compiles is the same call with the same mask. Whether its kernels are right is asked where there is one (tests marked
`gpu`).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from restem import attention, attention_flex
from restem.attention import AttentionPlan, PackAttention, Rule
from restem.attention_flex import BLOCK, blocks_of, whole_blocks
from restem.tree import Tree
from test_tree_sampler import GREEDY, draw, owe, tokens
from test_tree_trainer import TREES, apart, distance, random_tree, row_gradients, tree_gradients
from tiny_models import SERVED, few_shot, one_thread, problems, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread", "flex")


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """FlexAttention in its plain operations, for every device; counts its calls."""
    import torch.nn.attention.flex_attention as module

    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return module.flex_attention(*args, **kwargs)

    monkeypatch.setattr(module, "_validate_device", lambda *tensors: None)  # refuses gradients on a CPU
    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention_flex, "serves", lambda device: True)
    monkeypatch.setattr(attention_flex, "_kernel", lambda: counted)
    yield calls


@apart
@pytest.mark.parametrize("name", SERVED)
def test_gradients_of_every_architecture_equal_row_training(name: str, is_apart: bool, flex: list[int]) -> None:
    """Windows, capped scores, grouped heads, heads of fewer than 16 numbers; the shared prompt apart, and in each pack."""
    model, examples = tiny(name), random_tree(prefix=70, branches=(3, 1, 4), longest=60)
    expected = row_gradients(model, examples)
    found = tree_gradients(model, examples, budget=200, is_apart=is_apart)
    assert flex[0] >= 2 * len(model.base_model.layers if hasattr(model.base_model, "layers") else model.base_model.h)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@apart
@pytest.mark.parametrize("shape", TREES)
def test_trees_of_every_shape_equal_row_training(shape: str, is_apart: bool) -> None:
    model = tiny("qwen2-window")
    expected, found = row_gradients(model, TREES[shape]), tree_gradients(model, TREES[shape], is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@apart
def test_packs_of_many_blocks_equal_row_training(is_apart: bool) -> None:
    examples, model = random_tree(prefix=150, branches=(4, 3, 4), longest=200, seed=5), tiny("gemma2")
    expected, found = row_gradients(model, examples), tree_gradients(model, examples, budget=1024, is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


def test_greedy_completions_behind_prompts_computed_so_are_the_same(flex: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    stage = problems(5)
    monkeypatch.setattr(attention, "_DENSE_TOKENS", 0)  # as if they were long
    for name in ("llama", "gemma2"):
        found = tokens(draw(tiny(name), few_shot(), stage, owe(stage, 1), GREEDY))
        assert flex[0]
        with monkeypatch.context() as patch:
            patch.setattr(attention_flex, "serves", lambda device: False)
            assert found == tokens(draw(tiny(name), few_shot(), stage, owe(stage, 1), GREEDY))


# --- the mask itself ----------------------------------------------------------------------------------------------------------


def random_trie(chance: random.Random, nodes: int, longest: int, offset: int) -> Tree:
    """A tree of any depth, in depth-first order; some nodes are empty."""
    tree, path = Tree(offset), []
    for _ in range(nodes):
        del path[chance.randrange(len(path) + 1) :]
        path.append(tree.add([0] * chance.randrange(longest), path[-1] if path else None))
    return tree


def seen_by_ancestry(tree: Tree, before: int, window: int | None) -> np.ndarray[Any, Any]:
    """[T, P + T]: by definition. A token sees what precedes the roots, its ancestors, and its own node up to itself."""
    size = len(tree.tokens)
    seen = np.zeros((size, before + size), dtype=bool)
    seen[:, :before] = True
    for number, node in enumerate(tree.nodes):
        for query in range(node.start, node.end):
            for ancestor in (tree.nodes[above] for above in tree.ancestors(number)):
                seen[query, before + ancestor.start : before + ancestor.end] = True
            seen[query, before + node.start : before + query + 1] = True
    if window is not None:
        positions = np.array([*range(before), *tree.positions])
        seen &= np.array(tree.positions)[:, None] - positions[None] < window
    return seen


CASES = [
    (seed, nodes, longest, before) for seed in range(6) for nodes, longest, before in ((9, 60, 0), (25, 40, 70), (6, 300, 130))
]


@pytest.mark.parametrize("window", [None, 24, 200])
@pytest.mark.parametrize(("seed", "nodes", "longest", "before"), CASES)
def test_one_integer_per_token_is_the_mask_of_any_trie(
    seed: int, nodes: int, longest: int, before: int, window: int | None
) -> None:
    """And the blocks that are computed hold everything that is seen; those without a mask, nothing that is not."""
    tree = random_trie(random.Random(seed), nodes, longest, before)
    plan = AttentionPlan.of(tree)
    expected = seen_by_ancestry(tree, before, window)
    assert np.array_equal(plan.visible(window, before).numpy(), expected)

    length, at = len(tree.tokens), whole_blocks(before)
    size = max(2 * BLOCK, whole_blocks(length))
    whole = np.zeros((size, at + size), dtype=bool)  # as it is computed: filled up to blocks
    whole[:length, :before], whole[:length, at : at + length] = expected[:, :before], expected[:, before:]
    pairs = whole.reshape(size // BLOCK, BLOCK, -1, BLOCK)
    some, full = blocks_of(plan.keys(before, at, size), window)
    assert not (pairs.any((1, 3)) & ~some).any()
    rows = range(length // BLOCK)  # the last block of queries may hold fillers
    assert not (full & ~some).any()
    assert not (full[: len(rows)] & ~pairs.all((1, 3))[: len(rows)]).any()
    causal = np.tril(np.ones_like(some), at // BLOCK)
    assert some.sum() <= causal.sum()


@pytest.mark.parametrize("rule", [Rule(0.3), Rule(0.3, window=24), Rule(0.3, softcap=2.0), Rule(0.3, window=24, softcap=2.0)])
def test_attention_and_its_gradients_over_a_trie_equal_a_dense_softmax(rule: Rule) -> None:
    """A trie of many levels behind 70 keys, two query heads to a key; in float64, softmax and autograd over all pairs."""
    before, chance = 70, torch.Generator().manual_seed(1)
    tree = random_trie(random.Random(3), 20, 30, before)
    size = len(tree.tokens)
    shapes = ((1, 4, size, 8), (1, 2, size, 8), (1, 2, size, 8), (1, 2, before, 8), (1, 2, before, 8))
    found_of = [torch.randn(shape, generator=chance).requires_grad_() for shape in shapes]
    q, k, v, *front = found_of
    found = PackAttention(AttentionPlan.of(tree), {0: (front[0], front[1])}).attend(0, q, k, v, rule)

    expected_of = [x.detach().double().requires_grad_() for x in found_of]
    q, k, v, *front = expected_of
    keys, values = (torch.cat([x, y], 2).repeat_interleave(2, 1) for x, y in zip(front, (k, v), strict=True))
    scores = q @ keys.transpose(-1, -2) * rule.scale
    if rule.softcap is not None:
        scores = (scores / rule.softcap).tanh() * rule.softcap
    seen = torch.from_numpy(seen_by_ancestry(tree, before, rule.window))
    expected = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ values

    assert distance(found, expected) < 1e-6
    slope = torch.randn(expected.shape, generator=chance)
    found.backward(slope)
    expected.backward(slope.double())
    for one, other in zip(found_of, expected_of, strict=True):
        assert distance(one.grad, other.grad) < 1e-5


def test_sizes_that_differ_compile_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated as on a GPU, for a plain layer and one with window and cap; then other trees, other lengths."""
    import torch.nn.attention.flex_attention as module
    from torch._dynamo.testing import CompileCounterWithBackend

    monkeypatch.setattr(module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", False)
    counter = CompileCounterWithBackend("aot_eager")
    kernel = attention_flex.compiled(counter)
    monkeypatch.setattr(attention_flex, "_kernel", lambda: kernel)
    rules = (Rule(0.25), Rule(0.25, window=24, softcap=2.0))
    chance, counts = torch.Generator().manual_seed(1), []
    for seed, nodes, longest, before in ((1, 20, 30, 70), (2, 40, 60, 200), (3, 3, 20, 130), (4, 9, 300, 10)):
        tree = random_trie(random.Random(seed), nodes, longest, before)
        for rule in rules:
            q, k, v = (torch.randn(1, heads, len(tree.tokens), 16, generator=chance).requires_grad_() for heads in (4, 2, 2))
            front = (torch.randn(1, 2, before, 16), torch.randn(1, 2, before, 16))
            pack, gradients = PackAttention(AttentionPlan.of(tree), {0: front}), []
            for found in (pack.attend(0, q, k, v, rule), pack._dense(q, k, v, front, rule)):
                gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(found.sin().sum(), (q, k, v))]))
            assert distance(gradients[0], gradients[1]) < 1e-5
        counts.append(counter.frame_count)
    # Sizes that happen to be equal are taken for one, once: so the second tree may compile again, and no later one.
    assert counts[1:] == [counts[1]] * 3


def test_a_device_where_it_fails_is_served_by_a_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without Triton, or with one that does not work: right all the same."""
    monkeypatch.undo()
    device = torch.device("cuda", 7)
    monkeypatch.setattr(attention_flex, "find_spec", lambda name: object())
    assert attention_flex.serves(device)
    attention_flex.refuse(device, "because")
    assert not attention_flex.serves(device)
    monkeypatch.setattr(attention_flex, "_refused", {})
    monkeypatch.setattr(attention_flex, "find_spec", lambda name: None)
    assert not attention_flex.serves(device)
