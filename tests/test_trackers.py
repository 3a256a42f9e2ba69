"""Trackers get each number once, however often a run is resumed, and never stop a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from restem import Recipe
from restem.errors import MissingExtra, RestemError
from restem.trackers import check_trackers, grouped, open_tracker

RECIPE = Recipe()


class FakeRun:
    """What wandb.init and trackio.init return. Keeps what it is told; refuses everything while `is_down`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.metrics: list[tuple[str, dict[str, Any]]] = []
        self.finished: dict[str, Any] | None = None
        self.is_down = False

    def log(self, values: dict[str, float], step: int | None = None) -> None:
        if self.is_down:
            raise ConnectionError("no route to host\nand more")
        print("a library that prints")
        self.logged.append((step, dict(values)))

    def define_metric(self, name: str, **settings: Any) -> None:
        self.metrics.append((name, settings))

    def finish(self, **settings: Any) -> None:
        self.finished = settings


class FakeLibrary:
    """A module with `init`. Its runs are in `runs`."""

    def __init__(self) -> None:
        self.runs: list[FakeRun] = []
        self.refuses: Exception | None = None

    def init(self, **settings: Any) -> FakeRun:
        if self.refuses:
            raise self.refuses
        print("a library that prints")
        self.runs.append(FakeRun(settings))
        return self.runs[-1]

    def finish(self) -> None:
        self.runs[-1].finish()


class FakeWriter:
    """torch's SummaryWriter."""

    made: list[FakeWriter] = []  # noqa: RUF012

    def __init__(self, folder: str, purge_step: int | None = None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0
        self.is_closed = False
        FakeWriter.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.scalars)

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setitem(sys.modules, "wandb", library)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return library


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    library = FakeLibrary()
    monkeypatch.setitem(sys.modules, "trackio", library)
    return library


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeWriter]]:
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=FakeWriter))
    yield FakeWriter.made
    FakeWriter.made.clear()


# --- which there are ---------------------------------------------------------------------------------------------------------


def test_no_tracker_does_nothing_and_writes_nothing(tmp_path: Path) -> None:
    tracker = open_tracker([], tmp_path, RECIPE)
    tracker.log(1, {"improve/loss": 0.5})
    tracker.close()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused_with_those_that_there_are(tmp_path: Path, wandb: FakeLibrary) -> None:
    with pytest.raises(RestemError, match=r'no tracker "mlflow".*tensorboard, trackio, wandb'):
        open_tracker(["wandb", "mlflow"], tmp_path, RECIPE)
    assert wandb.runs == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["tensorboard", "trackio", "wandb"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr("restem.trackers.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf'"{name}", which is not installed.\n.*pip install "restem\[trackers\]"'):
        open_tracker([name], tmp_path, RECIPE)


def test_a_folder_that_is_called_like_a_package_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(MissingExtra):
        check_trackers(["wandb"])


# --- what each is told -------------------------------------------------------------------------------------------------------


def test_wandb_gets_the_recipe_and_the_run_s_own_step_as_x_axis(tmp_path: Path, wandb: FakeLibrary) -> None:
    tracker = open_tracker(["wandb"], tmp_path / "first", RECIPE)
    tracker.log(7, {"improve/loss": 0.5})
    tracker.log(7, {"val/reward": 0.25})
    tracker.close()
    run = wandb.runs[0]
    assert run.settings["project"] == "restem" and run.settings["name"] == "first" and run.settings["resume"] == "allow"
    assert run.settings["dir"] == str(tmp_path / "first")
    assert run.settings["config"]["select.max_per_problem"] == 10 and run.settings["config"]["run"] == str(tmp_path / "first")
    assert ("*", {"step_metric": "step"}) in run.metrics
    # Without wandb's own step, which would drop whatever comes late.
    assert run.logged == [(None, {"improve/loss": 0.5, "step": 7}), (None, {"val/reward": 0.25, "step": 7})]
    assert run.finished == {"exit_code": 0}


def test_wandb_hears_of_a_run_that_failed_and_of_the_user_s_project(
    tmp_path: Path, wandb: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_tracker(["wandb"], tmp_path, RECIPE).close(failed=True)
    assert wandb.runs[0].settings["project"] == "mine" and wandb.runs[0].finished == {"exit_code": 1}


def test_trackio_gets_steps_and_finite_numbers(tmp_path: Path, trackio: FakeLibrary) -> None:
    tracker = open_tracker(["trackio"], tmp_path / "first", RECIPE)
    tracker.log(1, {"improve/loss": 0.5, "improve/gradient_norm": float("inf")})
    tracker.log(2, {"improve/loss": float("nan")})
    tracker.close()
    run = trackio.runs[0]
    assert run.settings["project"] == "restem" and run.settings["resume"] == "allow"
    assert run.settings["name"].startswith("first-") and run.settings["config"]["generate.temperature"] == 0.7
    assert run.logged == [(1, {"improve/loss": 0.5})] and run.finished == {}


def test_tensorboard_writes_into_the_run_and_flushes_every_step(tmp_path: Path, tensorboard: list[FakeWriter]) -> None:
    tracker = open_tracker(["tensorboard"], tmp_path, RECIPE)
    tracker.log(3, {"test/pass@1": 0.5, "test/pass@8": 0.75})
    (writer,) = tensorboard
    assert writer.folder == str(tmp_path / "tensorboard") and writer.purge_step is None
    assert writer.scalars == [("test/pass@1", 0.5, 3), ("test/pass@8", 0.75, 3)] and writer.flushed == 2
    tracker.close()
    assert writer.is_closed


def test_several_at_once_hear_the_same_and_a_name_given_twice_counts_once(
    tmp_path: Path, wandb: FakeLibrary, trackio: FakeLibrary, tensorboard: list[FakeWriter]
) -> None:
    open_tracker(["wandb", "trackio", "tensorboard", "wandb"], tmp_path, RECIPE).log(1, {"val/reward": 0.5})
    assert [run.logged for run in wandb.runs] == [[(None, {"val/reward": 0.5, "step": 1})]]
    assert [run.logged for run in trackio.runs] == [[(1, {"val/reward": 0.5})]]
    assert [writer.scalars for writer in tensorboard] == [[("val/reward", 0.5, 1)]]


def test_stdout_stays_free_for_results(tmp_path: Path, trackio: FakeLibrary, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = open_tracker(["trackio"], tmp_path, RECIPE)
    tracker.log(1, {"val/reward": 0.5})
    tracker.close()
    out, err = capsys.readouterr()
    assert out == "" and "a library that prints" in err


# --- resume ------------------------------------------------------------------------------------------------------------------


def test_a_resumed_run_tells_everything_again_and_each_step_is_written_once(
    tmp_path: Path, wandb: FakeLibrary, trackio: FakeLibrary, tensorboard: list[FakeWriter]
) -> None:
    def work(upto: int) -> None:
        tracker = open_tracker(["wandb", "trackio", "tensorboard"], tmp_path, RECIPE)
        tracker.log(0, {"val/reward": 0.1})
        for step in range(1, upto + 1):
            tracker.log(step, {"improve/loss": 1 / step})
            if step % 2 == 0:
                tracker.log(step, {"val/reward": step / 10})
        # killed: nothing is closed

    work(3)
    work(5)
    work(5)
    losses = [(1 / step, step) for step in (1, 2, 3, 4, 5)]
    rewards = [(0.1, 0), (0.2, 2), (0.4, 4)]
    scalars = [scalar for writer in tensorboard for scalar in writer.scalars]
    assert [(value, step) for name, value, step in scalars if name == "improve/loss"] == losses
    assert [(value, step) for name, value, step in scalars if name == "val/reward"] == rewards
    for library in (wandb, trackio):
        logged = [values | {"step": values.get("step", step)} for run in library.runs for step, values in run.logged]
        assert [(v["improve/loss"], v["step"]) for v in logged if "improve/loss" in v] == losses
        assert [(v["val/reward"], v["step"]) for v in logged if "val/reward" in v] == rewards
    assert [writer.purge_step for writer in tensorboard] == [None, 4, 6], "what was written and not noted down is hidden"
    assert len({run.settings["id"] for run in wandb.runs}) == 1 and len({run.settings["name"] for run in trackio.runs}) == 1


def test_two_runs_are_two_even_with_folders_of_one_name(tmp_path: Path, trackio: FakeLibrary, wandb: FakeLibrary) -> None:
    for parent in ("a", "b"):
        open_tracker(["trackio", "wandb"], tmp_path / parent / "run", RECIPE)
    assert len({run.settings["name"] for run in trackio.runs}) == 2
    assert len({run.settings["id"] for run in wandb.runs}) == 2


# --- failures ----------------------------------------------------------------------------------------------------------------


def test_a_tracker_that_fails_is_named_once_and_the_others_go_on(
    tmp_path: Path, wandb: FakeLibrary, trackio: FakeLibrary
) -> None:
    said: list[str] = []
    tracker = open_tracker(["wandb", "trackio"], tmp_path, RECIPE, say=said.append)
    wandb.runs[0].is_down = True
    tracker.log(1, {"improve/loss": 0.5})
    tracker.log(2, {"improve/loss": 0.4})
    wandb.runs[0].is_down = False
    tracker.log(3, {"improve/loss": 0.3})
    tracker.close()
    assert len(said) == 1 and "wandb failed (ConnectionError: no route to host)" in said[0] and "The run goes on" in said[0]
    assert [step for step, _ in trackio.runs[0].logged] == [1, 2, 3]
    assert [values["step"] for _, values in wandb.runs[0].logged] == [3], "it is tried again, and may be back"
    assert wandb.runs[0].finished is not None


def test_a_tracker_that_cannot_be_opened_is_an_error_before_anything_is_spent(
    tmp_path: Path, wandb: FakeLibrary, trackio: FakeLibrary
) -> None:
    wandb.refuses = ValueError("No API key configured. Use `wandb login`")
    with pytest.raises(RestemError, match=r'"wandb" cannot be opened: ValueError: No API key .* leave it out'):
        open_tracker(["trackio", "wandb"], tmp_path, RECIPE)
    assert trackio.runs[0].finished is not None, "those that were opened are closed"


def test_ctrl_c_is_not_swallowed(tmp_path: Path, wandb: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    tracker = open_tracker(["wandb"], tmp_path, RECIPE)
    monkeypatch.setattr(wandb.runs[0], "log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tracker.log(1, {"val/reward": 0.5})


# --- names -------------------------------------------------------------------------------------------------------------------


def test_numbers_are_named_by_their_group_and_the_rest_is_left_out() -> None:
    metrics = {"loss": 0.5, "step": 3, "history": [{}], "note": "text", "none": None, "is_good": True}
    assert grouped("improve", metrics) == {"improve/loss": 0.5, "improve/step": 3.0}


# --- the real thing ----------------------------------------------------------------------------------------------------------


def test_tensorboard_itself_shows_each_step_once_after_a_kill(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = open_tracker(["tensorboard"], tmp_path, RECIPE)
    for step in (1, 2, 3):
        tracker.log(step, {"improve/loss": 1 / step})
    state = json.loads((tmp_path / "trackers.json").read_text())
    state["steps"]["improve/loss"] = 2  # killed between writing step 3 and noting it down
    (tmp_path / "trackers.json").write_text(json.dumps(state))
    again = open_tracker(["tensorboard"], tmp_path, RECIPE)
    for step in (1, 2, 3, 4):
        again.log(step, {"improve/loss": 1 / step})
    again.close()
    shown = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("improve/loss")
    assert [event.step for event in shown] == [1, 2, 3, 4]
    assert [event.value for event in shown] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
