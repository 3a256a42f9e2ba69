"""restem show-mask tells the truth about the pack that training computes, and nothing in a completion can lie to the reader."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from commands import Command, in_process
from restem.attention import AttentionPlan
from restem.config import load_recipe
from restem.files import read_rows, write_json
from restem.mask import MaskView, open_mask, view_pack
from restem.selection import Selection, write_selection
from restem.show_mask import print_mask, ranges, visible
from restem.training.batches import make_packs
from restem.types import Example
from tiny_models import END, tokenizer

TOKENIZER = tokenizer()


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text)["input_ids"])


def decode(tokens: Sequence[int]) -> str:
    return str(TOKENIZER.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def example(problem: str, prompt: str, index: int, completion: str, weight: float = 1.0) -> Example:
    return Example(
        prompt_ids=ids(prompt), completion_ids=(*ids(completion), END), problem_id=problem, index=index, weight=weight
    )


SUMS = [
    example("p1", "Q: 1+1=", 0, " 2"),
    example("p1", "Q: 1+1=", 3, "2"),
    example("p2", "Q: 2+3=", 0, " 5"),
    example("p2", "Q: 2+3=", 1, ""),
]
"""Every character is a token. The last completion is the end token alone."""


def view_of(examples: Sequence[Example], objective: str = "token-mean") -> MaskView:
    pack = make_packs(examples, objective, 4096)[0]
    return MaskView(title="sums", origin="by hand", objective=objective, nodes=view_pack(pack, examples), decode=decode)


def printed(view: MaskView, *, full: bool = False, width: int = 100, colours: bool = False) -> str:
    file = io.StringIO()
    system = "truecolor" if colours else None
    print_mask(view, Console(file=file, width=width, force_terminal=colours, color_system=system), full=full)
    return file.getvalue()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model directory with a tokenizer and no weights."""
    TOKENIZER.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "config.json").write_text('{"model_type": "llama"}')
    return tmp_path / "base"


@pytest.fixture
def recipe(base: Path, tmp_path: Path) -> Path:
    """A recipe with a task of its own."""
    data = tmp_path / "sums"
    data.mkdir()
    for split, first in (("train", 1), ("val", 4), ("test", 7)):
        rows = [{"question": f"{n} + {n}?", "answer": str(2 * n), "id": f"{split}{n}"} for n in range(first, first + 3)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "sums.toml"
    path.write_text(f'[model]\nbase = "{base}"\n[task]\nname = "{data}"\nid = "id"\n')
    return path


@pytest.fixture
def show_mask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return in_process("show-mask", monkeypatch, capsys, columns=120)


def write_run(folder: Path, recipe: Path, iterations: Sequence[Sequence[Example]]) -> Path:
    write_json(folder / "run.json", {"recipe": json.loads(load_recipe(recipe).model_dump_json())})
    for number, examples in enumerate(iterations, start=1):
        selection = Selection(examples=tuple(examples), counts={}, problems=2, covered=2, at_limit=0)
        write_selection(folder / f"iter-{number:02d}", selection)
    return folder


# --- it tells the truth ------------------------------------------------------------------------------------------------------


def test_a_pack_is_shown_node_by_node() -> None:
    text = printed(view_of(SUMS))
    nodes = text[text.index("[0]") : text.index("rows attend")]
    assert [line.rstrip() for line in nodes.splitlines() if line] == [
        "[0] shared prefix",
        "    packed 0-2, position in the text 0-2",
        "    attends to itself, causally",
        "    | Q:",
        "    [1] problem p1",
        "        packed 3-6, position in the text 3-6",
        "        attends to [0] 0-2 and itself, causally",
        "        | 1+1=",
        "        [2] completion 0",
        "            packed 7-8, position in the text 7-8",
        "            attends to [0] 0-2, [1] 3-6 and itself, causally",
        "            3 targets, predicted at packed 6-8, trained with weight 0.1111 each",
        "            >  2",
        "            + </s>",
        "        [3] completion 3",
        "            packed 9, position in the text 7 (restarts here)",
        "            attends to [0] 0-2, [1] 3-6 and itself, causally",
        "            2 targets, predicted at packed 6, 9, trained with weight 0.1111 each",
        "            > 2",
        "            + </s>",
        "    [4] problem p2",
        "        packed 10-13, position in the text 3-6 (restarts here)",
        "        attends to [0] 0-2 and itself, causally",
        "        | 2+3=",
        "        [5] completion 0",
        "            packed 14-15, position in the text 7-8 (restarts here)",
        "            attends to [0] 0-2, [4] 10-13 and itself, causally",
        "            3 targets, predicted at packed 13-15, trained with weight 0.1111 each",
        "            >  5",
        "            + </s>",
        "        [6] completion 1",
        "            no packed tokens",
        "            1 target, predicted at packed 13, trained with weight 0.1111 each",
        "            + </s>",
    ]
    assert text[text.index("rows attend") :].splitlines()[1:9] == [
        "     0 1 2 3 4 5 6",
        "   0 ◣ · · · · · ·",
        "   1 ■ ◣ · · · · ·",
        "   2 ■ ■ ◣ · · · ·",
        "   3 ■ ■ · ◣ · · ·",
        "   4 ■ · · · ◣ · ·",
        "   5 ■ · · · ■ ◣ ·",
        "   6 · · · · · · ·",
    ]


def test_totals_are_those_worked_out_by_hand() -> None:
    # 3 + (4 + 2 + 1) + (4 + 2 + 0) packed; as rows, four prompts of 7 and targets of 3 + 2 + 3 + 1.
    assert view_of(SUMS).totals == {
        "packed_tokens": 16,
        "rows": 4,
        "row_tokens": 37,
        "targets": 9,
        "weight": pytest.approx(1.0),
    }
    text = printed(view_of(SUMS))
    assert "37, one sequence a row and 4 rows without padding: 2.3 times as many" in text
    assert "targets        9, of which 4 are never read" in text


@pytest.mark.parametrize("examples", [SUMS, SUMS[:1], SUMS[2:], [*SUMS, example("p3", "Other: ", 0, "nothing shared")]])
def test_what_is_said_of_attention_and_targets_is_what_training_computes(examples: list[Example]) -> None:
    pack = make_packs(examples, "sum", 4096)[0]
    seen_TT = AttentionPlan.of(pack.tree).visible(None)
    nodes = view_pack(pack, examples)
    for node in nodes:
        for index in range(node.start, node.end):
            said = {*range(node.start, index + 1)}
            said.update(i for number in node.ancestors for i in range(nodes[number].start, nodes[number].end))
            assert said == set(seen_TT[index].nonzero().flatten().tolist())
            assert pack.tree.positions[index] == node.position + index - node.start
    told = [(source, target, n.weight) for n in nodes for source, target in zip(n.sources, n.targets, strict=True)]
    assert told == list(zip(pack.sources, pack.targets, pack.weights, strict=True))
    for node in nodes:
        if node.kind == "completion":
            above = [token for number in node.ancestors for token in nodes[number].tokens]
            assert (tuple(above), node.targets) == (node.example.prompt_ids, node.example.completion_ids)


def test_a_completion_of_weight_0_is_shown_as_read_only() -> None:
    text = printed(view_of([SUMS[0], example("p1", "Q: 1+1=", 1, "3", weight=0.0)]))
    assert "| 3\n" in text and "not trained: weight 0" in text and "> 3" not in text


# --- where the batch comes from ----------------------------------------------------------------------------------------------


def test_a_recipe_shows_reference_answers_and_says_so(recipe: Path, show_mask: Command) -> None:
    code, out, err = show_mask(recipe)
    assert code == 0
    assert "reference answers stand in for them" in err and "stand in for" not in out
    assert "problem train1" in out and "problem train2" in out and "train3" not in out
    for line in (">  The answer is 2.", ">  2", ">  The answer is 4.", ">  4", "+ </s>"):
        assert re.search(rf"^ +{re.escape(line)}$", out, re.MULTILINE)
    assert "\x1b" not in out, "a pipe gets no colours"


def test_the_end_token_follows_every_stand_in(recipe: Path) -> None:
    view = open_mask(str(recipe), problems=3, completions=1, say=lambda text: None)
    targets = [node.targets for node in view.nodes if node.kind == "completion"]
    assert targets == [(*ids(f" The answer is {2 * n}."), END) for n in (1, 2, 3)]


def test_a_run_shows_the_solutions_that_it_kept_last(recipe: Path, tmp_path: Path, show_mask: Command) -> None:
    old, new = [example("p9", "Q: 9=", 0, "old")], [*SUMS, example("p3", "Q: 3=", 0, "too far down")]
    run = write_run(tmp_path / "run", recipe, [old, new, []])
    code, out, err = show_mask(run)
    assert (code, err) == (0, "")
    assert f"solutions of {run}/iter-02/examples.parquet" in out
    assert "completion 3" in out and "old" not in out and "too far down" not in out
    rows = {(row["problem_id"], row["index"]): row for row in read_rows(run / "iter-02" / "examples.parquet")}
    for node in open_mask(str(run), say=pytest.fail).nodes:
        if node.kind == "completion":
            assert list(node.targets) == rows[node.example.problem_id, node.example.index]["completion_ids"]


def test_a_run_without_solutions_falls_back_to_its_recipe(recipe: Path, tmp_path: Path, show_mask: Command) -> None:
    run = write_run(tmp_path / "run", recipe, [])
    code, out, err = show_mask(run)
    assert code == 0 and f"{run} has kept no solutions yet" in err and "The answer is 2." in out


def test_set_changes_what_is_packed(recipe: Path, show_mask: Command) -> None:
    code, out, err = show_mask(recipe, "--set", "improve.objective=problem", "--set", "improve.pack_tokens=64")
    assert code == 0 and 'improve.objective = "problem"' in out
    assert "improve.pack_tokens = 64 makes" in err and "the first one is shown" in err


def test_json_is_one_line_with_the_same_numbers(recipe: Path, show_mask: Command) -> None:
    code, out, _ = show_mask(recipe, "--json")
    view = open_mask(str(recipe), say=lambda text: None)
    assert code == 0 and out.count("\n") == 1
    assert json.loads(out) == json.loads(json.dumps(view.as_dict()))
    assert json.loads(out)["totals"]["packed_tokens"] == sum(len(node["token_ids"]) for node in json.loads(out)["nodes"])


@pytest.mark.parametrize("toy", ["toy", "toy:table"])
def test_the_toy_has_nothing_to_show(recipe: Path, show_mask: Command, toy: str) -> None:
    code, out, err = show_mask(recipe, "--set", f"model.base={toy}")
    assert (code, out) == (1, "")
    assert "there is nothing to show" in err and "--set model.base=embedded" in err


def test_a_task_whose_references_cannot_be_written_down_is_named(recipe: Path, tmp_path: Path, show_mask: Command) -> None:
    for file in (tmp_path / "sums").glob("*.jsonl"):
        rows = [json.loads(line) | {"answer": ["a", "list"]} for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, _, err = show_mask(recipe, "--set", "task.verifier=exact")
    assert code == 1 and "nothing to show" in err and "run directory" in err


# --- nothing in a text can lie to the reader ---------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;owned\x07[red]x[/red] :smile: a\rb\tc\x7f\x9b31m\u202eabc\u2028\n+ </s>\n[9] problem p9"


@pytest.mark.parametrize("colours", [False, True])
def test_a_completion_cannot_steer_the_terminal_or_forge_a_line(colours: bool) -> None:
    text = printed(view_of([example("p\n\x1b[1m1", "Q: ", 0, HOSTILE), *SUMS]), colours=colours, width=200)
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", plain)
    assert "\x1b[1m1" not in text.replace("\x1b[1m1 ", "") and "problem p⏎␛[1m1" in plain
    lines = plain.splitlines()
    assert "> ␛[2J␛]0;owned␇[red]x[/red] :smile: a␍b␉c␡<U+009B>31m<U+202E>abc<U+2028>⏎" in [line.strip() for line in lines]
    assert next(line.strip() for line in lines if "</s>" in line) == "> + </s>⏎"
    assert "> [9] problem p9" in [line.strip() for line in lines]


def test_every_character_of_a_text_is_shown_or_spelled_out() -> None:
    assert visible("a\x00\u200b\ue000\ud800é中👍") == "a␀<U+200B><U+E000><U+D800>é中👍"
    assert visible("a\n\nb") == "a⏎\n⏎\nb"


def test_colours_are_a_help_and_signs_are_enough() -> None:
    coloured, plain = printed(view_of(SUMS), colours=True), printed(view_of(SUMS))
    assert "\x1b[" in coloured and "\x1b" not in plain
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain


# --- layout ------------------------------------------------------------------------------------------------------------------


def test_a_long_prompt_is_shortened_by_a_count_and_full_shows_it() -> None:
    prompt = "Begin." + "x" * 200 + ".End"
    view = view_of([example("p", f"{prompt} {n}=", 0, "y" * 300) for n in range(2)])
    short, full = printed(view), printed(view, full=True)
    # 211 tokens are shared, the last blank included; 24 are shown at either end.
    assert "~ 163 of 211 tokens left out; --full shows them" in short
    assert "| Begin." in short and ".End" in short and short.count("x") < 100
    assert "left out" not in full and full.count("x") >= 200
    assert short.count("y") == full.count("y") >= 600, "completions are never shortened"


def test_long_lines_are_folded_within_the_width_and_nothing_is_lost() -> None:
    text = "the words of a long line and one" + "wordthatnevereverends" * 5 + "中" * 50
    out = printed(view_of([example("p", "Q: ", 0, text)]), width=60)
    shown = re.findall(r"^ {12}> (.*)$", out, re.MULTILINE)
    assert "".join(shown) == text
    assert len(shown) > 4 and all(len(line) <= 60 for line in shown)


def test_ranges_name_the_last_index() -> None:
    assert ranges([4, 5, 6, 9, 11, 12]) == "4-6, 9, 11-12"
    assert ranges([]) == ""


def test_a_terminal_without_unicode_gets_a_readable_page() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    print_mask(view_of([example("p", "Q: ", 0, "é\n")]), Console(file=file, width=100))
    file.flush()
    assert b"> \\xe9\\u23ce" in raw.getvalue() and b"# # \\" in raw.getvalue()
