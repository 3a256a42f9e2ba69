"""Algorithm 1, row by row of the method's check-list, with the toy model through `Run` and `rest_em`.

Stop rules are scripted with a stand-in for what `improve` uses of a run; nothing of ours is patched.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restem import evaluation, load_recipe, load_task, sampling, toy
from restem.algorithm import improve
from restem.candidate import Candidate
from restem.estep import read_stage
from restem.files import read_json, read_metadata, read_rows
from restem.prompts import Exemplar, Prompt
from restem.run import task_of
from restem.rundir import read_problems
from restem.show import result_table
from restem.summary import warnings
from restem.tasks import Task, content_hash
from restem.training import Interval
from restem.types import Example
from toy_runs import cli, content, part_rows, recipe, result, run, task_that_likes, write_recipe, write_verifiers


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One finished run of two iterations, only read by the tests."""
    return run(tmp_path_factory.mktemp("algorithm") / "run")


def base_of(run: Path) -> str:
    return str(read_json(run / "run.json")["base_fingerprint"])


def sampled_model(stage: Path) -> set[str]:
    """The weights that a stage was drawn from, as its parts say."""
    return {read_metadata(part)["model"] for part in (stage / "samples").glob("part-*.parquet")}


# --- rows 1 to 8: which weights sample, start and are returned -------------------------------------------------------------


def test_without_iterations_no_weight_changes_and_the_base_is_scored_row_1(tmp_path: Path) -> None:
    out = run(tmp_path / "run", "iterations=0")
    toy.save_policy(toy.ToyPolicy(rows=4, table={}), tmp_path / "fresh")
    fresh = toy.fingerprint(str(tmp_path / "fresh"))
    assert base_of(out) == fresh == toy.fingerprint(str(out / "toy-base")) == result(out)["accepted"]["fingerprint"]
    assert [row["iteration"] for row in result(out)["iterations"]] == [0]
    assert read_json(out / "iter-00" / "eval" / "arithmetic" / "scores.json")["fingerprint"] == fresh
    assert not list(out.glob("iter-01*")) and not list(out.rglob("model"))


def test_the_e_step_samples_the_winner_before_and_leaves_it_unchanged_row_2(done: Path) -> None:
    for number in (1, 2):
        before = result(done)["iterations"][number - 1]["iteration"]
        model = done / ("toy-base" if before == 0 else f"iter-{before:02d}/model")
        assert sampled_model(done / f"iter-{number:02d}") == {toy.fingerprint(str(model))}  # recomputed after the run
    assert sampled_model(done / "iter-02") == {read_json(done / "iter-01" / "iteration.json")["fingerprint"]}
    assert len({base_of(done), *sampled_model(done / "iter-02"), result(done)["accepted"]["fingerprint"]}) == 3


def test_iteration_1_samples_from_the_base_row_3(done: Path) -> None:
    assert sampled_model(done / "iter-01") == {base_of(done)}
    task = task_of(recipe())
    owed = [sampling.Owed(problem.id, index) for problem in task.train for index in range(4)]
    decoding = sampling.Decoding(temperature=0.7, max_tokens=task.max_tokens)
    drawn = toy.ToySampler(toy.ToyPolicy(rows=4, table={})).sample(task.train, owed, decoding, stream="0/iteration 1")
    kept = [(row["problem_id"], row["index"], row["text"]) for row in part_rows(done / "iter-01" / "samples")]
    assert kept == [(sample.problem_id, sample.index, sample.text) for sample in drawn]


def test_every_improve_starts_from_the_base_row_4(done: Path) -> None:
    starts = [read_json(done / f"iter-{number:02d}" / "improve" / "start.json") for number in (1, 2)]
    assert starts == [{"model": "toy-base", "fingerprint": base_of(done)}] * 2
    assert_trained_from(toy.ToyPolicy(rows=4, table={}), done / "iter-02")


def test_continuing_from_the_last_iterate_is_a_choice_that_is_off_by_default_row_6(tmp_path: Path) -> None:
    assert load_recipe({}).improve.start_from == "base"
    out = run(tmp_path / "run", "improve.start_from=last")
    first = read_json(out / "iter-01" / "iteration.json")["fingerprint"]
    starts = [read_json(out / f"iter-{number:02d}" / "improve" / "start.json")["fingerprint"] for number in (1, 2)]
    assert starts == [base_of(out), first]
    assert_trained_from(toy.load_policy(str(out / "iter-01" / "model")), out / "iter-02")


def assert_trained_from(start: toy.ToyPolicy, iteration: Path) -> None:
    """The kept model is the start moved towards the best table, by the closed form: a half, then a half of the rest."""
    examples = [
        Example(**{**row, **{name: tuple(row[name]) for name in ("prompt_ids", "completion_ids")}})
        for row in read_rows(iteration / "examples.parquet")
    ]
    mix = 1 - 0.5 ** read_json(iteration / "iteration.json")["interval"]
    best = toy.best_rows(examples, "token-mean")
    rows = {k: tuple((1 - mix) * a + mix * b for a, b in zip(start.of(k), row, strict=True)) for k, row in best.items()}
    assert toy.load_policy(str(iteration / "model")).table == {**start.table, **rows}


def test_iteration_2_trains_on_its_own_samples_alone_row_8(done: Path) -> None:
    for number in (1, 2):
        samples = {(s.problem_id, s.index): s for s in read_stage(done / f"iter-{number:02d}")}
        rows = read_rows(done / f"iter-{number:02d}" / "examples.parquet")
        kept = {(row["problem_id"], row["index"]): tuple(row["completion_ids"]) for row in rows}
        correct = {key: (*s.token_ids, toy.END) for key, s in samples.items() if s.reward == 1}
        assert kept == correct and len(rows) == len(correct)
    assert {r["index"] for r in rows} <= {0, 1, 2, 3}


def test_promise_2_every_improve_starts_from_the_base_and_every_sampler_is_the_last_winner(tmp_path: Path) -> None:
    out = run(tmp_path / "run", "iterations=3", "improve.stop=best", "seed=5")
    winner = base_of(out)
    for number in (1, 2, 3):
        folder = out / f"iter-{number:02d}"
        assert sampled_model(folder) == {winner}
        assert read_json(folder / "improve" / "start.json")["fingerprint"] == base_of(out)
        winner = read_json(folder / "iteration.json")["fingerprint"]
        assert sampled_model(folder / "eval" / "arithmetic" / "greedy") == {winner}


# --- rows 24 to 26: the stop rules -----------------------------------------------------------------------------------------


class Scripted:
    """What `improve` uses of a run, with a script of the rewards on D_val; the base's is 0."""

    base = "base"

    def __init__(self, *rewards: float, **settings: Any) -> None:
        self.recipe, self.rewards, self.trained = load_recipe({"improve": settings}), rewards, [0]

    def start(self, model: str) -> Candidate:
        return self.candidate(model, 0.0, 0)

    def train(self, start: Candidate, examples: Sequence[Example], iteration: int) -> Iterator[Interval]:
        for number, _ in enumerate(self.rewards if examples else (), start=1):
            self.trained.append(number)
            yield Interval(number=number, model=f"from {start.model}")

    def validate(self, interval: Interval, iteration: int) -> Candidate:
        return self.candidate(interval.model, self.rewards[interval.number - 1], interval.number)

    def keep(self, best: Candidate, iteration: int) -> Candidate:
        return best

    def candidate(self, model: str, reward: float, interval: int) -> Candidate:
        return Candidate(model=model, fingerprint="", reward=reward, low=reward, high=reward, n=1, interval=interval)


EXAMPLES = (Example(prompt_ids=(0,), completion_ids=(1,)),)


def winner(scripted: Scripted) -> tuple[float, int]:
    """The reward of what is kept, and the last interval that was trained."""
    policy = scripted.candidate("last", 0.0, 0)
    return improve(scripted, policy, EXAMPLES, 1).reward, scripted.trained[-1]  # type: ignore[arg-type]


def test_training_stops_when_the_reward_stops_rising_row_24() -> None:
    assert winner(Scripted(1, 2, 3, 2, 5)) == (3, 4)


def test_the_best_of_all_checkpoints_can_be_kept_instead_row_25() -> None:
    assert winner(Scripted(1, 2, 3, 2, 5, stop="best")) == (5, 5)
    assert winner(Scripted(1, 5, 3, 2, 4, stop="best")) == (5, 5)


def test_patience_goes_on_through_a_dip() -> None:
    assert winner(Scripted(1, 2, 3, 2, 5, patience=1)) == (5, 5)
    assert winner(Scripted(1, 2, 3, 2, 2, 5, patience=1)) == (3, 5)
    assert winner(Scripted(1, 0, 2, 0, 3, 0, patience=1)) == (3, 6)  # a gain renews it


@pytest.mark.parametrize("stop", ["first", "best"])
def test_a_tie_is_no_improvement(stop: str) -> None:
    assert winner(Scripted(0, 0, stop=stop)) == (0, 1 if stop == "first" else 2)
    kept = improve(Scripted(2, 2, 2, stop=stop), Scripted().start("last"), EXAMPLES, 1)  # type: ignore[arg-type]
    assert (kept.reward, kept.interval) == (2, 1)


@pytest.mark.parametrize("stop", ["first", "best"])
def test_the_untrained_base_is_candidate_0_row_26(stop: str) -> None:
    kept = improve(Scripted(-1, -2, -1, stop=stop), Scripted().start("last"), EXAMPLES, 1)  # type: ignore[arg-type]
    assert (kept.model, kept.interval) == ("base", 0)


def test_if_all_checkpoints_are_worse_the_base_is_returned_and_this_is_logged_row_26(tmp_path: Path) -> None:
    task = task_that_likes(tmp_path, train=3, val=0)  # what is learnt in training is a loss on D_val
    out = run(tmp_path / "run", "improve.stop=best", task=task)
    assert [row["trained"] for row in result(out)["iterations"]] == [False] * 3
    assert min(row["kept"] for row in result(out)["iterations"][1:]) > 0
    rewards = [read_json(out / "iter-01" / "improve" / f"interval-{k}" / "val" / "candidate.json")["reward"] for k in (1, 2)]
    assert max(rewards) < result(out)["iterations"][0]["val"]["value"]
    accepted = result(out)["accepted"]
    assert (accepted["iteration"], accepted["interval"], accepted["fingerprint"]) == (0, 0, base_of(out))
    assert sampled_model(out / "iter-02") == {base_of(out)}
    assert "iteration 1: no interval beat the start on D_val; it is carried forward unchanged" in (out / "log.txt").read_text()


def test_a_last_iterate_that_is_not_beaten_keeps_its_model_where_it_is(tmp_path: Path) -> None:
    # A rate of 1 learns the liked habit in one step, so iteration 2 can only tie.
    task = task_that_likes(tmp_path, train=3, val=3)
    settings = ("improve.start_from=last", "improve.learning_rate=1", "generate.samples=8")
    out = run(tmp_path / "run", *settings, task=task)
    kept = read_json(out / "iter-02" / "iteration.json")
    assert (kept["reward"], kept["model"], kept["iteration"], kept["interval"]) == (1.0, "iter-01/model", 1, 0)
    assert result(out)["model"] == "iter-01/model"
    assert toy.fingerprint(str(out / result(out)["model"])) == result(out)["accepted"]["fingerprint"] == kept["fingerprint"]
    before = content(out)
    assert content(run(out, *settings, task=task, resume=True)) == before


# --- rows 23, 45, 51, 57, 58: splits, series, empty D_i, alarms, the result -------------------------------------------------


def test_d_val_meets_neither_training_nor_test_row_23(done: Path) -> None:
    files = {file.stem: read_problems(file) for file in (done / "problems").glob("*.parquet")}
    assert {name: len(problems) for name, problems in files.items()} == {"train": 12, "val": 8, "test-arithmetic": 20}
    for identity in (lambda problem: problem.id, lambda problem: content_hash(problem.question)):
        assert len({identity(problem) for problems in files.values() for problem in problems}) == 40


def test_train_and_test_series_exist_for_every_iteration_from_0_row_45(done: Path) -> None:
    rows = result(done)["iterations"]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert row["train"]["n"] == 12 and row["test"]["arithmetic"]["metrics"]["pass@1"]["n"] == 20
    for number, stage in enumerate(("iter-01", "iter-02", "iter-02/train")):  # the policy before each E-step, and the last
        rewards = [row["reward"] for row in part_rows(done / stage / "grades")]
        assert rows[number]["train"]["value"] == pytest.approx(sum(rewards) / len(rewards))


def test_an_empty_d_i_carries_the_base_forward_with_a_warning_and_exit_0_row_51(tmp_path: Path) -> None:
    never = f"task.verifier={write_verifiers(tmp_path)}:never"
    found = cli("run", write_recipe(tmp_path), "--out", tmp_path / "run", "--set", never, "--json")
    assert found.returncode == 0
    for number in (1, 2):
        assert f"warning: iteration {number} kept 0 of 48 samples" in found.stderr
    assert "restem check" in found.stderr
    answer = json.loads(found.stdout)
    assert (answer["accepted"]["fingerprint"], answer["best_iteration"]) == (base_of(tmp_path / "run"), 0)
    assert [row["kept"] for row in answer["iterations"]] == [None, 0, 0]


def test_if_nothing_on_d_val_can_be_graded_the_run_says_so_and_no_reward_is_made_up(tmp_path: Path) -> None:
    fails = f"task.verifier={write_verifiers(tmp_path)}:fails"
    found = cli("run", write_recipe(tmp_path), "--out", tmp_path / "run", "--set", fails)
    assert found.returncode == 1
    assert "nothing on the 8 D_val problems could be graded" in found.stderr and "Traceback" not in found.stderr
    grades = part_rows(tmp_path / "run" / "iter-00" / "val" / "grades")
    assert {(row["reward"], row["reason"]) for row in grades} == {(None, "verifier_error"), (0.0, "truncated")}


def test_the_result_names_the_accepted_iteration_its_reward_and_its_model_row_58(done: Path) -> None:
    accepted = result(done)["accepted"]
    assert accepted["iteration"] == result(done)["best_iteration"] == 2
    assert toy.fingerprint(str(done / result(done)["model"])) == accepted["fingerprint"]
    samples = read_stage(done / "iter-02" / "improve" / f"interval-{accepted['interval']}" / "val")
    reward = evaluation.mean_reward(samples)
    assert (accepted["reward"], accepted["n"]) == (reward.value, reward.n) == (result(done)["iterations"][2]["val"]["value"], 8)


def scripted_row(number: int, coverage: float | None, pass_8: float) -> dict[str, Any]:
    metrics = {name: {"value": value} for name, value in (("pass@1", 0.5), ("pass@1 sampled", 0.4), ("pass@8", pass_8))}
    return {"iteration": number, "coverage": coverage, "test": {"t": {"metrics": metrics}}, "paired": None, "val": None}


def test_falling_coverage_and_falling_pass_at_k_raise_the_alarm_row_57() -> None:
    rising = [scripted_row(0, None, 0.5), scripted_row(1, 0.5, 0.6), scripted_row(2, 0.6, 0.6)]
    assert warnings(rising) == []
    (one,) = warnings([*rising[:2], scripted_row(2, 0.4, 0.6)])
    assert one.startswith("coverage fell from 50.0% to 40.0% in iteration 2")
    (other,) = warnings([*rising[:2], scripted_row(2, 0.6, 0.55)])
    assert other.startswith("pass@8 on t fell from 60.0% to 55.0% in iteration 2")


# --- promises 7 and 8 over a whole run folder ------------------------------------------------------------------------------


def test_promise_7_test_problems_meet_no_training_selection_stopping_or_prompt_row_56(done: Path) -> None:
    task = task_of(recipe())
    allowed = {"train": {p.id for p in task.train}, "val": {p.id for p in task.val}, "test": {p.id for p in task.test}}
    seen: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for file in done.rglob("*.parquet"):
        where = file.relative_to(done).parts
        if where[0] != "problems":
            use = "test" if "eval" in where else "val" if "val" in where else "train"
            seen[use] |= {row["problem_id"] for row in read_rows(file)}
    assert seen == allowed  # every file of the run, and every problem in its place
    prompts = {tuple(row["prompt_ids"]) for file in done.glob("iter-*/examples.parquet") for row in read_rows(file)}
    renderer = toy.ToyRenderer(toy.ToyPolicy(rows=4, table={}))
    assert prompts <= {renderer.encode(p) for p in task.train}
    assert not prompts & {renderer.encode(p) for p in (*task.val, *task.test)}
    contents = [content_hash(p.question) for p in (*task.train, *task.val, *task.test)]
    assert len(set(contents)) == len(contents)
    assert not {content_hash(exemplar.question) for exemplar in task.prompt.exemplars} & set(contents)


def test_promise_8_pass_at_1_never_stands_without_pass_at_k_n_and_an_interval(done: Path) -> None:
    files = list(done.rglob("scores.json"))
    assert len(files) == 3
    for metrics in (read_json(file)["metrics"] for file in files):
        assert list(metrics) == ["pass@1", "pass@1 sampled", "pass@4"]
        for metric in metrics.values():
            assert metric["n"] == 20 and metric["low"] <= metric["value"] <= metric["high"]
    header, *rows = result_table(result(done), done).splitlines()[:4]
    assert "test pass@1 (greedy)" in header and "test pass@4" in header
    assert all(row.count(" n 20") == 2 and row.count("[") == 4 for row in rows)


# --- rows 2, 5 and 7 with a real, tiny, random model ------------------------------------------------------------------------

SOLUTION = "zzmarkedzz"
"""What stands in every human solution of the task below, and nowhere else."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as a model directory."""
    import tiny_models  # imports torch

    return Path(tiny_models.save(tiny_models.tiny(), tmp_path_factory.mktemp("tiny")))


def test_an_optimiser_is_fresh_in_every_training_row_5(tiny: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from restem.config import ImproveConfig
    from restem.training import TreeTrainer

    rate = 1e-3
    settings = ImproveConfig(learning_rate=rate, warmup=0, epochs=1, interval=1, batch_size=8, dtype="float32")
    trainer = TreeTrainer(settings)
    examples = [Example(prompt_ids=(5, 6, i), completion_ids=(7 + i, 9, 1), problem_id=str(i)) for i in range(4)]
    others = [Example(prompt_ids=(8, i), completion_ids=(11, 12 + i, 1), problem_id=str(i)) for i in range(4)]

    def train(trainer: TreeTrainer, name: str, examples: list[Example]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        (interval,) = trainer.train(str(tiny), examples, tmp_path / name, stream="s")
        (step,) = interval.metrics["history"]
        return load_file(Path(interval.model) / "model.safetensors"), {
            k: v for k, v in step.items() if k not in ("seconds", "parts")
        }

    first, metrics = train(trainer, "first", examples)
    train(trainer, "between", others)
    again, metrics_again = train(trainer, "again", examples)
    assert metrics == metrics_again
    assert all(torch.equal(first[name], again[name]) for name in first)
    # With an empty state, Adam's first step moves every weight by the learning rate times the sign of its gradient.
    before = load_file(tiny / "model.safetensors")
    moved = torch.cat([(first[name] - before[name]).abs().flatten() for name in before])
    assert moved.max() <= rate * 1.001
    assert moved[moved > 0].median() == pytest.approx(rate, rel=1e-3)


def test_sampling_changes_no_weight_of_a_real_model_row_2(tiny: Path) -> None:
    import torch

    from restem import models
    from restem.prompts import Renderer
    from restem.sampling import Decoding, Owed, TreeSampler

    model = models.load_model(str(tiny), dtype=torch.float32)
    task = task_of(recipe())
    sampler = TreeSampler(model, Renderer(Prompt(), models.load_tokenizer(str(tiny))))
    owed = [Owed(problem.id, index) for problem in task.train for index in range(2)]
    assert len(list(sampler.sample(task.train, owed, Decoding(max_tokens=8), stream="s"))) == len(owed)
    assert models.fingerprint_tensors(sorted(model.state_dict().items())) == models.fingerprint(str(tiny))


def test_human_solutions_never_reach_what_is_trained_on_row_7(tiny: Path, tmp_path: Path) -> None:
    from restem.models import fingerprint, load_tokenizer

    data = tmp_path / "mine.jsonl"
    rows = [{"question": f"what is {i} plus 1?", "answer": str(i + 1), "solution": f"{SOLUTION} {i}"} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task_with_exemplar(data, f"{write_verifiers(tmp_path)}:always")
    assert all(SOLUTION in problem.meta["solution"] for problem in task.train)
    letters = json.dumps(list("abcdefghijklmnopqrstuvwxyz"))  # a random model seldom writes the end token
    settings = (f'model.base="{tiny}"', "model.device=cpu", "generate.max_tokens=16", f"generate.stop={letters}")
    small = ("generate.samples=2", "improve.learning_rate=1e-3", "improve.epochs=1", "improve.val_samples=1")
    out = run(tmp_path / "run", *settings, *small, task=task)
    assert SOLUTION in str(read_rows(out / "problems" / "train.parquet"))  # kept with the problem, and nowhere else
    tokenizer = load_tokenizer(str(tiny))
    for number in (1, 2):
        examples = read_rows(out / f"iter-{number:02d}" / "examples.parquet")
        samples = {(s.problem_id, s.index): s for s in read_stage(out / f"iter-{number:02d}")}
        assert examples
        for row in examples:
            sample = samples[row["problem_id"], row["index"]]
            assert tuple(row["completion_ids"]) == (*sample.token_ids, tokenizer.eos_token_id)
            prompt = tokenizer.decode(row["prompt_ids"])
            assert "one plus one is 2" in prompt and SOLUTION not in prompt + sample.text
        assert read_json(out / f"iter-{number:02d}" / "improve" / "start.json")["fingerprint"] == fingerprint(str(tiny))


def load_task_with_exemplar(data: Path, verifier: str) -> Task:
    exemplar = Exemplar(question="what is one plus one?", solution="one plus one is 2.")
    return replace(load_task(data, verifier=verifier), prompt=Prompt(exemplars=(exemplar,)))
