"""The results as tables in Markdown, and kept as JSON."""

import json
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from bench import machine, picture
from bench.measure import Outcome, Result

LEGEND = (
    "Medians; in brackets the CPU time of the server, all its processes and threads together, in us for each request "
    "(nbdcopy: for each MiB of the export). `x NAME`: how many times that server's value ours is."
)


def figure(value: float) -> str:
    """Three digits that say something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are numbers."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def short(result: Result) -> str:
    """One line of one row, while the others are still measured."""
    values = ", ".join(f"{name} {figure(outcome.value)}" for name, outcome in result.outcomes.items())
    ratio = result.baseline_ratio
    if not ratio:
        return f"{result.name}: {values}"
    return f"{result.name}: {values}; x {result.baseline or 'the best other'} {ratio:.2f} {_verdict(result)}".rstrip()


def _verdict(result: Result) -> str:
    return {True: "reached", False: "**not reached**", None: ""}[result.reached]


def _cell(result: Result, server: str) -> str:
    outcome = result.outcomes.get(server)
    if outcome is None:
        return "failed" if result.notes.get(server, "").startswith("failed") else "-"
    cost = f" ({figure(outcome.cpu_us)})" if outcome.cpu_us is not None else ""
    return figure(outcome.value) + cost


def _speed_table(transport: str, servers: Sequence[str], results: Sequence[Result]) -> str:
    subject = results[0].subject
    others = [name for name in servers if name != subject]
    head = [f"over {transport}", "", subject, *others, *(f"x {name}" for name in others), "at least", ""]
    rows = []
    for result in results:
        ratios = [result.ratio(name) for name in others]
        rows.append([
            result.text, result.unit, *(_cell(result, name) for name in (subject, *others)),
            *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            "" if result.at_least is None else f"{result.at_least:g}", _verdict(result),
        ])  # fmt: skip
    return markdown_table(head, rows)


def _details(outcome: Outcome) -> str:
    return ", ".join(f"{key.replace('_', ' ')} {figure(value)}" for key, value in outcome.extra.items())


def _figure_table(servers: Sequence[str], results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        for name in result.servers:
            outcome = result.outcomes.get(name)
            ours = name == result.subject
            rows.append([
                result.text if ours else "", name, _cell(result, name), result.unit if outcome else "",
                "" if result.at_most is None or not ours else f"{result.at_most:g}", _verdict(result) if ours else "",
                _details(outcome) if outcome else "",
            ])  # fmt: skip
    return markdown_table(["", "", "", "", "at most", "", ""], rows)


def tables(results: Sequence[Result]) -> str:
    """A table for each transport and set of servers, then the figures that are no speeds, then who did not take part."""
    parts = []
    speeds = [result for result in results if result.speed]
    for (transport, servers), group in groupby(speeds, lambda result: (result.transport, tuple(result.servers))):
        parts.append(_speed_table(transport, servers, list(group)))
    figures = [result for result in results if not result.speed]
    if figures:
        parts.append(_figure_table((), figures))
    notes = list(dict.fromkeys(_notes(results)))
    if notes:
        parts.append("\n".join(notes))
    return "\n\n".join(parts)


def _notes(results: Sequence[Result]) -> Iterable[str]:
    for result in results:
        for name, note in result.notes.items():
            where = result.name if note.startswith("failed") else f"over {result.transport}"
            yield f"- {name}, {where}: {note.splitlines()[0]}"


def full(facts: dict[str, Any], options: dict[str, Any], results: Sequence[Result]) -> str:
    """The whole report."""
    method = f"{options['rounds']} rounds of {options['seconds']:g} s, interleaved."
    return f"{machine.line(facts)}\n{method} {LEGEND}\n\n{tables(results)}\n"


def save(path: Path, facts: dict[str, Any], options: dict[str, Any], results: Sequence[Result]) -> None:
    """Writes PATH, and the picture beside it."""
    data = {"machine": facts, "options": options, "rows": [result.to_json() for result in results]}
    path.write_text(json.dumps(data, indent=1) + "\n")
    path.with_suffix(".svg").write_text(picture.svg(results))


def load(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[Result]]:
    """What `save` wrote: the machine, the options, the results."""
    data = json.loads(path.read_text())
    return data["machine"], data["options"], [Result.from_json(row) for row in data["rows"]]
