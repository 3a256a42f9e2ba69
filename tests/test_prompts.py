"""Prompts: rendered once, from the question alone, for sampling and tuning alike."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from restem.errors import RestemError
from restem.prompts import Exemplar, Prompt, Renderer, load_exemplars
from restem.types import Problem

PROBLEM = Problem(id="p", question="What is 2 + 2?", reference="GOLD-7f3", meta={"solution": "META-91c"})
SHOT = Exemplar(question="What is 1 + 2?", solution="1 + 2 = 3. The answer is 3.")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(*, adds_bos: bool = False, template: str | None = None, eos: str | None = "</s>") -> Any:
    """Every byte a token, made in this process."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    if adds_bos:
        inner.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    made.chat_template = template
    return made


def test_a_few_shot_prompt_is_instruction_exemplars_question_and_ends_without_a_blank() -> None:
    prompt = Prompt(instruction="Solve.", exemplars=(SHOT,))
    assert (
        prompt.text(PROBLEM)
        == "Solve.\n\nQuestion: What is 1 + 2?\nAnswer: 1 + 2 = 3. The answer is 3.\n\nQuestion: What is 2 +"
        " 2?\nAnswer:"
    )


def test_without_instruction_and_exemplars_only_the_question_is_left() -> None:
    prompt = Prompt(question_label="Problem:", answer_label="Solution:")
    assert prompt.text(PROBLEM) == "Problem: What is 2 + 2?\nSolution:"


@pytest.mark.parametrize("style", ["few-shot", "chat"])
def test_neither_the_reference_nor_the_meta_reaches_a_prompt(style: Any) -> None:
    prompt = Prompt(style=style, instruction="Solve.", exemplars=(SHOT,))
    text = prompt.text(PROBLEM, tokenizer(template=TEMPLATE))
    assert "2 + 2" in text
    assert "GOLD-7f3" not in text
    assert "META-91c" not in text
    other = replace(PROBLEM, reference="else", meta={})
    assert prompt.text(other, tokenizer(template=TEMPLATE)) == text


def test_a_blank_line_stops_only_when_the_exemplars_teach_it() -> None:
    long = Exemplar(question="q", solution="First.\n\nThe answer is 3.")
    assert Prompt(exemplars=(SHOT,)).stop == ("\n\n", "\nQuestion:")
    assert Prompt(exemplars=(SHOT, long)).stop == ("\nQuestion:",)
    assert Prompt(question_label="Problem:").stop == ("\nProblem:",)
    assert Prompt(style="chat", exemplars=(SHOT,)).stop == ()


def test_no_stop_string_cuts_an_exemplar_solution() -> None:
    from restem.tasks import gsm8k, math

    for exemplars, prompt in ((gsm8k.EXEMPLARS, Prompt(exemplars=gsm8k.EXEMPLARS)), (math.EXEMPLARS, math.PROMPT)):
        assert "\n\n" in prompt.stop
        assert not any(stop in exemplar.solution for exemplar in exemplars for stop in prompt.stop)


def test_bos_is_there_once_exactly_when_the_tokenizer_adds_it() -> None:
    for adds_bos in (False, True):
        known = tokenizer(adds_bos=adds_bos)
        ids = Prompt().encode(PROBLEM, known)
        assert ids.count(known.bos_token_id) == int(adds_bos)
        assert (ids[0] == known.bos_token_id) is adds_bos
        assert ids == tuple(known(Prompt().text(PROBLEM))["input_ids"])


def test_a_chat_takes_its_special_tokens_from_the_template_alone() -> None:
    for template, count in ((TEMPLATE, 0), ("{{ bos_token }}" + TEMPLATE, 1)):
        known = tokenizer(adds_bos=True, template=template)
        assert Prompt(style="chat").encode(PROBLEM, known).count(known.bos_token_id) == count


def test_in_a_chat_exemplars_are_earlier_turns_and_the_instruction_opens_the_first() -> None:
    prompt = Prompt(style="chat", instruction="Solve.", exemplars=(SHOT,))
    assert (
        prompt.text(PROBLEM, tokenizer(template=TEMPLATE))
        == "<|user|>Solve.\n\nWhat is 1 + 2?</s><|assistant|>1 + 2 = 3. The answer is 3.</s>"
        "<|user|>What is 2 + 2?</s><|assistant|>"
    )


def test_a_tokenizer_without_a_chat_template_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(RestemError, match=r'prompt.style = "few-shot"'):
        Prompt(style="chat").encode(PROBLEM, tokenizer())


def test_sampling_and_tuning_get_the_same_object() -> None:
    renderer = Renderer(Prompt(exemplars=(SHOT,)), tokenizer())
    ids = renderer.encode(PROBLEM)
    assert renderer.encode(replace(PROBLEM, meta={"seen": "again"})) is ids
    assert renderer.decode(ids) == Prompt(exemplars=(SHOT,)).text(PROBLEM)


def test_two_problems_with_one_id_do_not_share_a_prompt() -> None:
    renderer = Renderer(Prompt(), tokenizer())
    assert renderer.encode(PROBLEM) != renderer.encode(replace(PROBLEM, question="What is 3 + 3?"))


def test_decoding_keeps_blanks_and_drops_special_tokens() -> None:
    known = tokenizer()
    renderer = Renderer(Prompt(), known)
    ids = known(" 2 , 3 .  do n't\n", add_special_tokens=False)["input_ids"]
    assert renderer.decode((*ids, renderer.end_id)) == " 2 , 3 .  do n't\n"


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    with pytest.raises(RestemError, match="eos_token"):
        Renderer(Prompt(), tokenizer(eos=None))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("shots.jsonl", '{"question": "q", "solution": "s"}\n'),
        ("shots.json", '[{"question": "q", "solution": "s"}]'),
        ("shots.toml", '[[exemplars]]\nquestion = "q"\nsolution = "s"\n'),
    ],
)
def test_exemplars_are_read_from_three_kinds_of_files(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_exemplars(tmp_path / name) == (Exemplar(question="q", solution="s"),)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "shots.jsonl",
            '{"question": "q", "answer": "s"}\n',
            r'exemplar 1 has no text under "solution"; it has: question',
        ),
        ("shots.jsonl", "", "holds no exemplars"),
        ("shots.jsonl", '{"question": "q",\n', "line 1 is not valid JSON"),
        ("shots.toml", "[[exemplars]\n", "cannot read"),
        ("shots.txt", "q", "what kind of file"),
    ],
)
def test_a_broken_exemplar_file_is_one_clear_error(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RestemError, match=message):
        load_exemplars(tmp_path / name)


def test_importing_prompts_tasks_and_preflight_loads_no_torch() -> None:
    code = (
        "import sys, restem.prompts, restem.tasks, restem.preflight; print({'torch', 'transformers', 'datasets',"
        " 'pyarrow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
