"""The report: its numbers are those of the files, it loads and runs nothing, and it is honest where there is little."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import toy_runs
from restem.errors import RestemError
from restem.files import read_json, read_metadata, read_rows, write_json, write_rows
from restem.report import render, write_report
from restem.report.text import clean, cut
from restem.statistics import interval, pass_at_k

EVIL = (
    "<script>alert(1)</script></style>\"'><img src=http://evil.example onerror=alert(2)> \u202eright\u2066 \x1b[31m\0{{7*7}} "
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_runs.run(tmp_path_factory.mktemp("report") / "run", "improve.learning_rate=0.9", "improve.val_samples=16")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run to change."""
    return Path(shutil.copytree(run, tmp_path / "copy"))


class Page(HTMLParser):
    """The tags of a page, the text of its tables' cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self._table = self.tables.setdefault(dict(attrs).get("id") or f"table {len(self.tables)}", [])
        elif tag == "tr" and self._table is not None:
            self._table.append([])
        elif tag in ("th", "td") and self._table:
            self._table[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "table":
            self._table = None
        elif tag in ("th", "td") and self._table:
            self._table[-1][-1] = " ".join(self._table[-1][-1].split())
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell and self._table:
            self._table[-1][-1] += data


def graded(folder: Path) -> dict[str, list[float]]:
    """Rewards by problem, read without restem's own readers of stages."""
    rewards: dict[str, list[float]] = {}
    for row in toy_runs.part_rows(folder / "grades"):
        if row["reward"] is not None:
            rewards.setdefault(row["problem_id"], []).append(row["reward"])
    return rewards


def mean(folder: Path) -> list[float]:
    return [sum(rewards) / len(rewards) for rewards in graded(folder).values()]


def passes(folder: Path, k: int) -> list[float]:
    return [pass_at_k(len(rewards), int(sum(rewards)), k) for rewards in graded(folder).values()]


def cell(values: list[float]) -> str:
    found = interval(values)
    return f"{found.value:.1%} [{100 * found.low:.1f}, {100 * found.high:.1f}] n {found.n}"


def expected_row(run: Path, number: int) -> list[str]:
    folder = run / f"iter-{number:02d}"
    kept = coverage = "-"
    if number:
        samples, solved = graded(folder), [float(sum(rewards) > 0) for rewards in graded(folder).values()]
        kept = f"{len(read_rows(folder / 'examples.parquet'))} of {sum(map(len, samples.values()))} samples"
        coverage = cell(solved)
    winner = read_json(folder / "iteration.json")["interval"] if number else 0
    val = folder / "improve" / f"interval-{winner}" / "val" if winner else run / "iter-00" / "val"
    after = run / f"iter-{number + 1:02d}"
    train = after if after.is_dir() else folder / "train"
    test = folder / "eval" / "arithmetic"
    tests = [mean(test / "greedy"), passes(test / "sampled", 1), passes(test / "sampled", 4)]
    return [kept, coverage, cell(mean(train)), cell(mean(val)), *map(cell, tests)]


def test_every_number_of_the_table_can_be_recomputed_from_the_run_directory(run: Path):
    header, *rows = Page(render(run)).tables["scores"]
    assert header[4:] == ["D_val reward", "test pass@1 (greedy)", "test pass@1 (sampled)", "test pass@4"]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        assert row[1:] == expected_row(run, number)


def test_the_fates_and_the_histogram_add_up_to_what_was_drawn(run: Path):
    page = Page(render(run))
    header, *rows = page.tables["harvest"]
    fates = header[2 : header.index("different texts among correct")]
    for number, row in enumerate(rows, start=1):
        assert int(row[1]) == 48 == sum(map(int, row[2 : 2 + len(fates)]))
        kept: dict[str, int] = {}
        for example in read_rows(run / f"iter-{number:02d}" / "examples.parquet"):
            kept[example["problem_id"]] = kept.get(example["problem_id"], 0) + 1
        wanted = [[str(n), str(sum(count == n for count in kept.values()))] for n in range(1, 11)]
        tables = [table for table in page.tables.values() if table[0] == ["solutions kept", "problems"]]
        assert tables[number - 1][1:] == [["0", str(12 - len(kept))], *wanted]


def test_the_report_is_a_function_of_the_run_directory(run: Path):
    assert render(run) == render(run)
    assert write_report(run) == run / "report.html"
    assert (run / "report.html").read_text(encoding="utf-8") == render(run)


def test_the_page_loads_and_runs_nothing(run: Path):
    html = render(run)
    page = Page(html)
    assert {"script", "link", "img", "iframe", "object", "embed", "base", "form"}.isdisjoint(tag for tag, _ in page.tags)
    for _, attributes in page.tags:
        assert not {"src", "href", "xlink:href", "action", "srcset"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html


def poison(part: Path, **columns: Any) -> None:
    """Rewrite columns of a Parquet file."""
    import pyarrow.parquet as pq

    write_rows(part, [{**row, **columns} for row in read_rows(part)], pq.read_schema(part), read_metadata(part))


def test_hostile_questions_and_completions_are_shown_harmlessly(copy: Path):
    poison(copy / "problems" / "test-arithmetic.parquet", question=EVIL, reference='"' + "\\ud800<b>" + '"', meta='{"kind": 1}')
    for iteration in ("iter-00", "iter-01", "iter-02"):
        for part in (copy / iteration / "eval" / "arithmetic" / "greedy" / "samples").glob("*.parquet"):
            poison(part, text=EVIL + "y" * 50_000)
        for part in (copy / iteration / "eval" / "arithmetic" / "greedy" / "grades").glob("*.parquet"):
            poison(part, answer="</bdi><script>", note="<i>")
    html = write_report(copy).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img", "b>", "i"} & {tag for tag, _ in page.tags}
    assert html.count("</style>") == 1 and "<script" not in html
    assert "&lt;script&gt;alert(1)" in html and "&lt;U+202E&gt;right" in html and "&lt;U+0000&gt;" in html and "{{7*7}}" in html
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", html)
    assert "y" * 2000 not in html and "more characters)" in html


def test_hostile_names_in_the_recipe_and_the_meta_are_shown_harmlessly(copy: Path):
    problems = copy / "problems" / "test-arithmetic.parquet"
    import pyarrow.parquet as pq

    rows = [
        {**row, "meta": '{"<img src=x>": "%s"}' % ("</text><script>" if i % 2 else "b")}
        for i, row in enumerate(read_rows(problems))
    ]
    write_rows(problems, rows, pq.read_schema(problems))
    facts = read_json(copy / "run.json")
    facts["recipe"]["model"]["base"] = facts["argv"][0] = "</title><script>alert(1)</script>"
    write_json(copy / "run.json", facts)
    page = Page(render(copy))
    assert not {"script", "img"} & {tag for tag, _ in page.tags}


def test_pass_at_1_is_refused_without_pass_at_k(copy: Path):
    file = copy / "iter-01" / "eval" / "arithmetic" / "scores.json"
    scores = read_json(file)
    del scores["metrics"]["pass@4"]
    write_json(file, scores)
    with pytest.raises(RestemError, match=r"pass@1 but no pass@K.*evaluate\.k"):
        write_report(copy)


def test_a_gain_within_noise_is_not_called_a_gain(copy: Path):
    shutil.copytree(copy / "iter-00" / "eval", copy / "iter-01" / "eval", dirs_exist_ok=True)
    shutil.copytree(copy / "iter-00" / "eval", copy / "iter-02" / "eval", dirs_exist_ok=True)
    html = render(copy)
    assert "did not show that it helped" in html and "within noise" in html and "<p>It helped.</p>" not in html


def test_the_choices_that_the_paper_leaves_open_are_all_listed(run: Path):
    rows = next(table for table in Page(render(run)).tables.values() if table[0][1:] == ["open point", "here"])
    assert [row[0] for row in rows[1:]] == [f"U{number}" for number in range(1, 18)]
    assert 'select.choose = "random"' in rows[4][2] and "improve.learning_rate = 0.9" in rows[1][2]


def test_an_unfinished_run_is_called_so(copy: Path):
    (copy / "result.json").unlink()
    for name in ("iteration.json", "eval", "train", "model"):
        path = copy / "iter-02" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    html = render(copy)
    assert "not finished: 1 of 2 iterations are done" in html and "<p>It helped.</p>" not in html


def test_a_run_that_has_only_begun_still_has_a_report(copy: Path):
    for path in copy.glob("iter-*"):
        shutil.rmtree(path)
    (copy / "result.json").unlink()
    html = render(copy)
    assert "0 of 2 iterations are done" in html and "Nothing has been measured yet" in html and "U17" in html


def test_a_run_without_iterations_shows_the_base(copy: Path):
    facts, result = read_json(copy / "run.json"), read_json(copy / "result.json")
    facts["recipe"]["iterations"] = 0
    result["accepted"] |= {"iteration": 0, "interval": 0}
    write_json(copy / "run.json", facts)
    write_json(copy / "result.json", result)
    page = Page(render(copy))
    assert len(page.tables["scores"]) == 2 and "nothing was trained" in render(copy)


def charts(page: Page) -> set[str | None]:
    return {attributes["aria-label"] for tag, attributes in page.tags if tag == "svg" and "aria-label" in attributes}


def headed(page: Page, name: str) -> list[list[list[str]]]:
    """The tables whose first column has this name."""
    return [table for table in page.tables.values() if table[0][0] == name]


def test_many_kinds_are_a_table_without_a_chart_and_what_only_tells_problems_apart_is_left_out(copy: Path):
    import pyarrow.parquet as pq

    problems = copy / "problems" / "test-arithmetic.parquet"
    metas = [{"subtask": f"kind {i:02d}", "row": i, "level": i % 3 or None, "tags": ["a", i]} for i in range(20)]
    rows = [{**row, "meta": json.dumps(meta)} for row, meta in zip(read_rows(problems), metas, strict=True)]
    write_rows(problems, rows, pq.read_schema(problems))
    page = Page(render(copy))

    [subtasks] = headed(page, "subtask")
    assert [row[0] for row in subtasks[1:]] == [f"kind {i:02d}" for i in range(20)]
    assert all(cell.endswith(", n = 1") for row in subtasks[1:] for cell in row[1:])
    [levels] = headed(page, "level")
    assert [[row[0], row[1].split(", ")[-1]] for row in levels[1:]] == [["1", "n = 7"], ["2", "n = 6"]]
    assert not headed(page, "row") and not headed(page, "tags")
    assert {name for name in charts(page) if name and name.startswith("Solved by")} == {
        "Solved by the base's success rate",
        "Solved by level",
    }


def test_every_test_task_has_a_breakdown_of_its_own(tmp_path: Path):
    folder = tmp_path / "doubles"
    folder.mkdir()
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n), "level": 1 + n % 2} for n in range(9)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = Page(render(toy_runs.run(tmp_path / "run", f'evaluate.tasks=["{folder}"]', "iterations=1")))
    assert {"Solved by steps (arithmetic)", "Solved by level (doubles)"} <= charts(page)
    assert {f"Solved by the base's success rate ({task})" for task in ("arithmetic", "doubles")} <= charts(page)
    [levels] = headed(page, "level")
    assert [[row[0], row[1].split(", ")[-1]] for row in levels[1:]] == [["1", "n = 5"], ["2", "n = 4"]]


def test_cleaning_keeps_ordinary_text_of_every_script():
    for text in (
        "plain",
        "two\nlines\tand a tab",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u4f60\u597d",
        "e\u0301",
        "x\u00b2 \u2264 3",
        "",
    ):
        assert clean(text) == text
    assert clean("a\u202eb\u200bc\r\x07") == "a<U+202E>b<U+200B>c<U+000D><U+0007>"
    assert len(clean("a" + "\u0301" * 500)) < 10
    assert cut("abcdef", 4) == "abcd ... (2 more characters)" and cut("abcd", 4) == "abcd"
