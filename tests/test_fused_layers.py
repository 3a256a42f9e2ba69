"""Parts of layers that are compiled: the same gradients, kept only where a trial on the device says that it pays."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from restem.training import fused
from restem.training.fused import Trial, fuse
from test_tree_trainer import TREES, apart, distance, tree_gradients
from tiny_models import one_thread, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")


def compiled_parts(model: Any) -> int:
    return sum(module._compiled_call_impl is not None for module in model.modules())


def pretend(monkeypatch: pytest.MonkeyPatch, **changes: float) -> None:
    """As if a trial had measured this."""
    own = fused._trial

    def trial(*args: Any) -> Trial:
        return own(*args)._replace(**changes)

    monkeypatch.setattr(fused, "_trial", trial)


@apart
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_compiled_parts_have_the_gradients_of_plain_ones(name: str, is_apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And leave no gradient of their trial behind."""
    pretend(monkeypatch, plain_seconds=2.0, compiled_seconds=1.0)
    expected = tree_gradients(tiny(name), TREES["uneven"], is_apart=is_apart)
    model = tiny(name)
    said = fuse(model, nullcontext, backend="aot_eager")
    assert said.endswith("compiled from here on: 2.00 times as fast on one layer, and equal")
    assert compiled_parts(model) >= 3 * model.config.num_hidden_layers
    assert all(parameter.grad is None for parameter in model.parameters())
    found = tree_gradients(model, TREES["uneven"], is_apart=is_apart)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert distance(found[1], expected[1]) < 1e-5


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        ({"plain_seconds": 1.0, "compiled_seconds": 1.0}, "compiled, one layer is 1.00 times as fast"),
        ({"compiled_error": 0.5, "compiled_seconds": 1e-9}, "5.0e-01 from exact"),
    ],
)
def test_what_does_not_pay_or_is_not_equal_is_left_as_it_was(
    measured: dict[str, float], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **measured)
    model = tiny()
    said = fuse(model, nullcontext, backend="aot_eager")
    assert "stay as they are" in said and why in said
    assert not compiled_parts(model)


def test_a_compiler_that_fails_is_done_without() -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no compiler here")

    model = tiny()
    assert "stay as they are: compiling fails" in fuse(model, nullcontext, backend=broken)
    assert not compiled_parts(model)
    assert distance(tree_gradients(model, TREES["uneven"])[1], tree_gradients(tiny(), TREES["uneven"])[1]) == 0


def test_bfloat16_is_measured_against_float32() -> None:
    """What the trial calls equal is as near to exact as the plain parts are, not equal to the last bit."""
    layer = fused._parts(tiny().model.layers[0])
    lower = fused._trial(layer, lambda: torch.autocast("cpu", dtype=torch.bfloat16), "aot_eager")
    assert 1e-4 < lower.plain_error < 0.1 and lower.is_equal
