"""The report of a run: one HTML file that needs nothing else, made of the run directory alone.

Nothing here measures anything; a fact that the report needs is written by the run first. The one thing a newcomer would get
wrong: questions and completions are hostile input, so every value passes `text.clean` and the template's autoescape.
"""

from __future__ import annotations

from pathlib import Path

from restem.files import finish_file


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path; an unfinished run gets a report of what its files hold so far.

    Raises RestemError if `run` is no run directory, or if scores lack a pass@K to stand beside pass@1.
    """
    html = render(run)
    target = run / "report.html"
    with finish_file(target) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return target


def render(run: Path) -> str:
    """The report as a string: a function of the run directory, the same whenever it is called."""
    import jinja2

    from restem.report import breakdown, choices, curves, text
    from restem.report.facts import Facts

    facts = Facts.read(run)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=text.clean,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=text.percent, number=text.number, p_value=text.p_value)
    return environment.get_template("template.html.j2").render(
        facts=facts,
        recipe=facts.recipe,
        curves=curves.of_iterations(facts),
        gap=curves.gap(facts),
        forms=breakdown.form_and_substance(facts),
        harvest=breakdown.harvest(facts),
        difficulty=breakdown.by_difficulty(facts),
        training=curves.of_training(facts),
        choices=choices.of_run(facts),
        settings=choices.settings(facts),
        machine=choices.machine(facts),
        gallery=breakdown.gallery(facts),
    )
