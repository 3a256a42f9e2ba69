"""AdamW in bfloat16 with stochastic rounding: right on average, by hand, over many steps, and after a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from restem.config import ImproveConfig
from restem.training import TreeTrainer, checkpoints
from restem.training.optimiser import StochasticAdamW, make, round_stochastically
from test_training_session import MANY, fingerprints, trainer_process
from test_tree_trainer import settings, timeless, train
from tiny_models import one_thread, save, tiny  # noqa: F401

pytestmark = pytest.mark.usefixtures("one_thread")

LIGHT = {"weights": "bfloat16", "optimiser": "adamw-bfloat16"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def optimiser_of(*weights: torch.Tensor, **changes: Any) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    return parameters, make(parameters, ImproveConfig(**{"optimiser": "adamw-bfloat16", **changes}))


# --- rounding ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "below", "above", "odds"),
    [
        (1 + 2**-9, 1.0, 1 + 2**-7, 0.25),  # bfloat16 has steps of 2^-7 from 1 to 2
        (-(4 + 3 * 2**-7), -4.0, -(4 + 2**-5), 0.75),  # and of 2^-5 from 4 to 8; signs do not matter
    ],
)
def test_two_numbers_round_to_their_neighbours_with_odds_worked_out_by_hand(
    value: float, below: float, above: float, odds: float
) -> None:
    rounded = round_stochastically(torch.full((40_000,), value), random()).float()
    assert set(rounded.tolist()) == {below, above}
    assert float((rounded == above).float().mean()) == pytest.approx(odds, abs=0.01)  # five standard deviations


def test_rounding_is_right_on_average_and_keeps_what_bfloat16_holds() -> None:
    values = torch.randn(200, generator=random(1)) * 10.0 ** torch.arange(-20, 20).repeat(5)
    source = random(2)
    mean = torch.stack([round_stochastically(values, source).double() for _ in range(4_000)]).mean(0)
    assert float(((mean - values) / values).abs().max()) < 5 * 2**-8 / 2 / 4_000**0.5
    exact = torch.tensor([0.0, -0.0, 1.0, -3.5, float("inf"), -float("inf")])
    assert torch.equal(round_stochastically(exact, source).float(), exact)
    assert round_stochastically(torch.tensor([float("nan")]), source).isnan().all()


# --- steps -------------------------------------------------------------------------------------------------------------------


def test_a_step_of_1e_5_moves_bfloat16_weights_on_average_as_it_moves_float32_ones() -> None:
    """Twenty steps move each weight by 2e-4. To the nearest, a bfloat16 weight of 0.5 does not move at all."""
    start, moved = torch.full((50_000,), 0.5), {}
    for name, weights, kind in (("float32", "float32", "adamw"), ("nearest", "bfloat16", "adamw"), ("chance", *LIGHT.values())):
        (weight,), optimiser = optimiser_of(start.to(getattr(torch, weights)), weights=weights, optimiser=kind)
        for _ in range(20):
            weight.grad = torch.full_like(weight, 0.25)
            optimiser.step()
        moved[name] = float((weight.detach().double() - 0.5).mean())
    assert moved["float32"] == pytest.approx(-2e-4, rel=0.01)
    assert moved["nearest"] == 0.0
    assert moved["chance"] == pytest.approx(moved["float32"], rel=0.05)


def test_float32_weights_follow_adamw_up_to_the_noise_of_the_moments() -> None:
    """Same weights after a hundred noisy steps, but for a few percent of how far they have gone, and their decay."""
    start, gradients = torch.randn(30, 40, generator=random(3)), torch.randn(100, 30, 40, generator=random(4)) + 1
    ends = []
    for kind in ("adamw", "adamw-bfloat16"):
        (weight,), optimiser = optimiser_of(start, optimiser=kind, weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.99))
        for gradient in gradients:
            weight.grad = gradient.clone()
            optimiser.step()
        ends.append(weight.detach())
    assert ends[1].dtype == torch.float32
    assert float((ends[1] - ends[0]).norm() / (ends[0] - start).norm()) < 0.03


def test_the_mean_of_squares_falls_when_gradients_do() -> None:
    """To the nearest it never would: a decay of 0.999 is less than the rounding of bfloat16."""
    (weight,), optimiser = optimiser_of(torch.zeros(2_000))
    for step in range(700):
        weight.grad = torch.full_like(weight, 1.0 if step < 100 else 0.0)
        optimiser.step()
    found = float(optimiser.state[weight]["exp_avg_sq"].float().mean())
    assert found == pytest.approx((1 - 0.999**100) * 0.999**600, rel=0.02)


def test_a_tensor_is_updated_part_by_part_as_it_is_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the chance, which these numbers leave nothing to: with one step they are exact in bfloat16."""
    import restem.training.optimiser as module

    (weight,), optimiser = optimiser_of(torch.arange(60.0).view(10, 6), betas=(0.5, 0.5), learning_rate=1.0)
    monkeypatch.setattr(module, "_CHUNK", 13)
    weight.grad = torch.full_like(weight, 2.0)
    optimiser.step()
    assert torch.allclose(weight, torch.arange(60.0).view(10, 6) - 1)
    assert torch.equal(optimiser.state[weight]["exp_avg"], torch.ones(10, 6, dtype=torch.bfloat16))
    assert torch.equal(optimiser.state[weight]["exp_avg_sq"], torch.full((10, 6), 2.0, dtype=torch.bfloat16))


def test_it_takes_8_bytes_a_weight_and_adamw_16() -> None:
    for changes, expected in ((LIGHT, 8), ({"optimiser": "adamw"}, 16), ({"optimiser": "adamw-bfloat16"}, 12)):
        weights = getattr(torch, changes.get("weights", "float32"))
        (weight,), optimiser = optimiser_of(torch.zeros(100, 100, dtype=weights), **changes)
        weight.grad = torch.ones_like(weight)
        optimiser.step()
        moments = sum(value.nbytes for name, value in optimiser.state[weight].items() if name != "step")
        assert weight.nbytes + weight.grad.nbytes + moments == expected * weight.numel()


# --- a training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["bfloat16", "float32"])
@pytest.mark.parametrize("kills", [(4, 11), (8,)])
def test_a_training_that_is_killed_and_resumed_makes_the_same_random_choices(
    tmp_path: Path, kills: tuple[int, ...], weights: str
) -> None:
    start = save(tiny(), tmp_path / "base", dtype=torch.bfloat16)
    changes = {"epochs": 1.0, "interval": 0.5, "batch_size": 2, "learning_rate": 1e-3, **LIGHT, "weights": weights}
    expected = train(start, tmp_path / "straight", examples=MANY, **changes)
    for kill in (*kills, 999):

        def report(done: int, total: int, metrics: dict[str, Any], kill: int = kill) -> None:
            torch.rand(done)  # the global generator is elsewhere
            if done == kill:
                raise KeyboardInterrupt

        trainer = TreeTrainer(settings(**changes, checkpoint_minutes=0), report=report)
        try:
            found = list(trainer.train(start, MANY, tmp_path / "killed", stream="s"))
        except KeyboardInterrupt:
            continue
    assert fingerprints(found) == fingerprints(expected)
    assert [timeless(i) for i in found] == [timeless(i) for i in expected]
    assert found[-1].metrics["loss"] < found[0].metrics["loss"] and found[-1].metrics["steps"] == 15


def test_a_checkpoint_restores_the_moments_bit_for_bit_in_their_own_number_format(tmp_path: Path) -> None:
    model = nn.Linear(8, 4)

    def stepped(optimiser: torch.optim.Optimizer) -> None:
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random(int(parameter.numel())))
        optimiser.step()

    optimiser = make(model.parameters(), ImproveConfig(optimiser="adamw-bfloat16"))
    stepped(optimiser)
    checkpoints.write(tmp_path, 1, model, optimiser, [])
    again = make(model.parameters(), ImproveConfig(optimiser="adamw-bfloat16"))
    checkpoints.restore(tmp_path, 1, model, again)
    for parameter in model.parameters():
        for name, value in optimiser.state[parameter].items():
            assert torch.equal(again.state[parameter][name], value) and again.state[parameter][name].dtype == value.dtype
    assert isinstance(again, StochasticAdamW)


def test_two_processes_that_hold_the_same_weights_round_them_alike(tmp_path: Path) -> None:
    """If they did not, they would train two models, and the losses would soon be others than those of one process."""
    start, changes = save(tiny(), tmp_path / "base", dtype=torch.bfloat16), {**LIGHT, "epochs": 2.0, "batch_size": 4}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    shared = {**changes, "learning_rate": 1e-3, "pack_tokens": 64}
    assert trainer_process(start, tmp_path / "two", *launcher, **shared, examples="SOME").wait() == 0
    alone, together = (train(start, tmp_path / name, **shared)[-1].metrics["history"] for name in ("one", "two"))
    assert [step["loss"] for step in together] == pytest.approx([step["loss"] for step in alone], rel=1e-5)
