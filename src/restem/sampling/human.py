"""The data's own worked solutions in the place of a model's: the paper's baseline, supervised fine-tuning on human data.

There is one a problem, whatever N is.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator, Sequence

from restem.errors import RestemError
from restem.sampling import Decoding, Owed
from restem.selection import Renders
from restem.tasks.task import Task
from restem.types import Problem, Sample


class HumanSolutions:
    """A sampler that writes down the human solution of each problem, or of those named in `only`. Raises RestemError if the
    task has none.

    A problem without one gets an empty completion, which its verifier refuses and the counts of D_i show.
    """

    name, samples = "human solutions", 1

    def __init__(self, task: Task, renderer: Renders, only: Container[str] | None = None) -> None:
        self.task, self.renderer, self.only = task, renderer, only
        if not any(human_solution(task, problem) for problem in task.train):
            raise RestemError(
                f'generate.source = "human", but no training problem of {task.name} comes with a worked solution.\n'
                'Give your data a column "solution", or train on the model\'s own (generate.source = "model").'
            )

    def covers(self, problem: Problem) -> bool:
        return self.only is None or problem.id in self.only

    def sample(self, problems: Sequence[Problem], owed: Iterable[Owed], decoding: Decoding, *, stream: str) -> Iterator[Sample]:
        known = {problem.id: problem for problem in problems}
        for item in owed:
            text = human_solution(self.task, known[item.problem_id]) or ""
            ids = self.renderer.encode_completion(text)
            yield Sample(problem_id=item.problem_id, index=item.index, token_ids=ids, text=text, finish="stop")


def human_solution(task: Task, problem: Problem) -> str | None:
    """A problem's worked solution, written as the prompt's exemplars are; None if it has none.

    What the exemplars teach, the solution must show too, or the model would learn to be unreadable: the sentence with the final
    answer, the fence of a program, and no blank line where a blank line ends a completion.
    """
    solution = problem.meta.get("solution")
    if not isinstance(solution, str) or not solution.strip():
        return None
    prompt = task.prompt.of(problem)
    if prompt.style == "plain":
        return solution
    solution = solution.strip()
    if "\n\n" in prompt.stop:
        solution = re.sub(r"\n\s*\n", "\n", solution)
    if any("```" in exemplar.solution for exemplar in prompt.exemplars) and "```" not in solution:
        solution = f"```python\n{solution}\n```"
    if task.answer_style == "answer-is" and "he answer is" not in solution:
        solution = f"{solution} The answer is {problem.reference}."
    if task.answer_style == "minerva" and "he final answer is" not in solution:
        solution = f"{solution}\nFinal Answer: The final answer is ${problem.reference}$. I hope it is correct."
    return solution if prompt.style == "chat" else f" {solution}"
