"""The benchmarks: each of them runs and gives figures, and the figures are processed correctly.

Running them needs the extra named `benchmark`. The measured values are not checked.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from time import process_time, sleep
from typing import Any
from xml.etree import ElementTree

import pytest
from benchmarks import _published, _scaling
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks._child import Contender, ContenderError
from benchmarks._events import batch_lines, sample_fields, sample_lines, tagged_fields, tagged_lines
from benchmarks._harness import Case, Figures, Goal, Result, Table, measure
from benchmarks._plot import plots_of, svg
from benchmarks._probe import watch_loop
from benchmarks._report import all_losses, replaced

from eventfold import Event, EventWriter

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
MISSING = [
    name
    for name in ("aiofiles", "aiosqlite", "eventsourcing", "umadb", "uvloop")
    if importlib.util.find_spec(name) is None
]
needs_extra = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (the extra benchmark)")

# A contender that does one thing, in no time, and can't do anything else.
ELSEWHERE = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    able = request["do"] == "refresh" and not request["new"]
    print(json.dumps({"seconds": 0.001, "written": 0} if able else {"unsupported": True}), flush=True)
"""


def run(tmp_path: Path, *arguments: str) -> list[dict[str, Any]]:
    """The tables of a very small run of `python -m benchmarks`."""
    file = tmp_path / "figures.json"
    sizes = ["--quick", "--events", "400", "--rounds", "1"]
    main([*arguments, *sizes, "--dir", str(tmp_path), "--json", str(file)])
    results: list[dict[str, Any]] = json.loads(file.read_text())["results"]
    return results


def figures_of(results: list[dict[str, Any]]) -> Iterator[float]:
    for result in results:
        for case in result["cases"]:
            yield from (figure for figures in case["rounds"] for figure in figures.values())


@needs_extra
@pytest.mark.timeout(600)
def test_each_benchmark_gives_finite_figures_and_has_its_place_on_the_page(tmp_path: Path) -> None:
    """The figures of all contenders are in the table, in the JSON file and in a plot."""
    shutil.copy(PAGE, tmp_path)
    shutil.copy(PAGE.with_name(_scaling.PAGE), tmp_path)
    results = run(tmp_path, "--report", str(tmp_path))

    assert {result["name"].partition("-")[0] for result in results} == set(BENCHMARKS)
    assert all(result["cases"] for result in results)
    assert all(math.isfinite(figure) and figure >= 0 for figure in figures_of(results))
    for result in results:
        ElementTree.parse(tmp_path / "benchmarks" / f"{result['name']}.svg")


@needs_extra
def test_the_benchmarks_run_on_uvloop(tmp_path: Path) -> None:
    results = run(tmp_path, "refresh", "--loop", "uvloop")

    assert all(math.isfinite(figure) for figure in figures_of(results))


@needs_extra
def test_another_program_is_measured_beside_the_built_in_contenders(tmp_path: Path) -> None:
    program = tmp_path / "elsewhere.py"
    program.write_text(ELSEWHERE)
    nothing_new, ten_new = run(tmp_path, "refresh", "--contender", f"elsewhere={sys.executable} {program}")

    times = [case["median"] for case in nothing_new["cases"] if case["contender"] == "elsewhere"]
    assert times == [1000, 1000]
    assert "elsewhere" not in {case["contender"] for case in ten_new["cases"]}
    assert any(remark.startswith("elsewhere can't do:") for remark in ten_new["remarks"])


@pytest.mark.parametrize(
    ("program", "complaint"),
    [
        ("print('hello')", "something other than JSON"),
        ("print('[]')", "something other than a JSON object"),
        ('print(\'{"error": "out of ink"}\')', "out of ink"),
        ("raise SystemExit(3)", "ended without an answer, with 3"),
    ],
)
def test_a_contender_that_fails_is_named_with_the_reason(program: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(f"import sys\nsys.stdin.readline()\n{program}\n")
    with Contender("theirs", [sys.executable, str(path)]) as contender, pytest.raises(ContenderError) as raised:
        contender.ask("append")

    assert "theirs" in str(raised.value)
    assert complaint in str(raised.value)


def test_a_contender_that_cannot_be_started_is_named(tmp_path: Path) -> None:
    with Contender("theirs", [str(tmp_path / "nothing")]) as contender, pytest.raises(ContenderError, match="theirs"):
        contender.ask("append")


@pytest.mark.parametrize("option", ["", "name", "=command", "name=", "name= ", "sqlite=command"])
def test_a_contender_needs_a_name_of_its_own_and_a_command(option: str) -> None:
    with pytest.raises(ValueError, match="NAME=COMMAND"):
        Contender.from_option(option)


async def test_a_blocked_loop_is_measured_and_limited_to_the_processor_time_of_this_process() -> None:
    """First 30 ms of computing, then 30 ms of sleeping in a call that blocks."""
    async with watch_loop() as computing:
        await asyncio.sleep(0)
        until = process_time() + 0.03
        while process_time() < until:
            pass
    async with watch_loop() as sleeping:
        await asyncio.sleep(0)
        sleep(0.03)

    assert max(computing.ours) >= 0.029
    assert computing.callback >= 0.02
    assert max(sleeping.late) >= 0.029
    assert max(sleeping.ours) < max(sleeping.late)


@pytest.mark.parametrize("number", [0, 9_977, 10**11])
async def test_the_generated_lines_are_those_of_the_writer(number: int, tmp_path: Path) -> None:
    written = tmp_path / "app.jsonl"
    async with EventWriter.open(tmp_path) as log:
        for n in range(number, number + 4):
            await log.append(Event(**sample_fields(n)))
            await log.append(Event(**tagged_fields(n, 3)))
        await log.append_many(Event(**sample_fields(n)) for n in range(number, number + 4))

    singles = zip(sample_lines(4, number), tagged_lines(4, number, 3), strict=True)
    assert written.read_bytes().splitlines(keepends=True) == [*chain(*singles), *batch_lines(4, number)]


def case_of(work: str, contender: str, rates: list[float], calls: list[str], *goals: Goal) -> Case:
    """A case whose rounds give these figures, the first of which is the warm-up's."""
    left = iter(rates)

    def once() -> Figures:
        calls.append(contender)
        return {"rate": next(left)}

    return Case(work, contender, once, goals)


def table_of(*cases: Case, more_is_better: bool = True) -> Table:
    return Table("name", "title", {"rate": "events/s"}, list(cases), more_is_better)


def test_rounds_interleave_and_the_first_does_not_count() -> None:
    calls: list[str] = []
    one, other = case_of("w", "a", [9, 1, 2, 3], calls), case_of("w", "b", [9, 2, 2, 12], calls)
    result = measure(table_of(one, other), 3)

    assert calls == ["a", "b"] * 4
    assert [row.figures for row in result.rows] == [[1, 2, 3], [2, 2, 12]]
    assert [row.ratio for row in result.rows] == [1, 2]


def test_a_goal_is_judged_by_the_ratios_within_the_rounds() -> None:
    """The ratio of the medians would be 1, while the median of the rounds' ratios is 2."""
    calls: list[str] = []
    raw = case_of("w", "raw", [1, 10, 20, 40], calls)
    goals = Goal(2, to="w, raw"), Goal(2.1, to="w, raw"), Goal(30, at_least=False)
    ours = case_of("w", "eventfold", [1, 20, 40, 20], calls, *goals)
    result = measure(table_of(raw, ours), 3)

    assert [verdict.reached for verdict in result.verdicts()] == [True, False, True]
    assert any(loss.startswith("MISSED: w, eventfold: 2 times w, raw") for loss in result.losses())


@pytest.mark.parametrize(("more_is_better", "losses"), [(True, ["w, eventfold: b is 2 times as fast"]), (False, [])])
def test_a_loss_is_reported_if_another_contender_does_the_same_work_better(
    more_is_better: bool, losses: list[str]
) -> None:
    calls: list[str] = []
    cases = [
        case_of("w", "eventfold", [1, 1], calls),
        case_of("w", "b", [2, 2], calls),
        case_of("other", "b", [9, 9], calls),
    ]
    result = measure(table_of(*cases, more_is_better=more_is_better), 1)

    assert result.losses() == losses


def test_a_contender_that_cannot_do_the_work_is_left_out_and_named() -> None:
    calls: list[str] = []
    result = measure(table_of(case_of("w", "a", [1, 1], calls), Case("w", "b", lambda: None)), 1)

    assert [row.case.contender for row in result.rows] == ["a"]
    assert "b can't do: w." in result.remarks()


def test_the_losses_of_all_tables_on_the_page_are_listed_together() -> None:
    tables = "".join(f"<!-- {name} -->\n- a note\n\nWhere we lose:\n\n- of {name}\n<!-- /{name} -->\n" for name in "ab")
    page = f"<!-- losses -->\n- old\n<!-- /losses -->\n{tables}<!-- c -->\nNo losses.\n<!-- /c -->\n"

    assert all_losses(page).splitlines() == ["- **a**: of a", "- **b**: of b"]


def test_a_report_replaces_only_what_is_between_its_marks() -> None:
    page = "before\n<!-- a -->\nold\n<!-- /a -->\nafter\n<!-- b -->\nkept\n<!-- /b -->\n"

    assert replaced(page, "a", "new") == page.replace("old", "\nnew")
    with pytest.raises(ValueError, match="no place for c"):
        replaced(page, "c", "new")


def test_the_costs_of_larger_logs_are_calculated_from_the_longest_measured_log() -> None:
    """In this test, an event takes 3 ms in a log of 1,000 events, and 2 ms in a log of 10,000."""
    columns = {"growth": "times", "1,000": "ms", "10,000": "ms"}
    figures = {"growth": 1.0, "1,000": 3_000.0, "10,000": 20_000.0}
    cases = [Case(work, "eventfold", lambda: figures) for work in (_scaling.BARE, *_scaling.WORKS)]
    places = _scaling.tables(measure(Table(_scaling.TABLE, "title", columns, cases), 1))

    assert all(line.endswith("| 1 | 2,000 |") for line in places[_scaling.GROWS].splitlines()[2:])
    durations = [line.split(" | ")[2] for line in places[_scaling.CALCULATED].splitlines()[2:]]
    assert durations == ["33.3 minutes", "5.56 hours", "55.6 hours", "556 hours"]


def measured(ratio: float, *, more_is_better: bool = True, work: str = "w", name: str = "eventfold") -> Result:
    """One round of "raw" and of a contender that has the given ratio to it."""
    calls: list[str] = []
    raw, ours = case_of(work, "raw", [1, 1], calls), case_of(work, name, [ratio, ratio], calls)
    return measure(table_of(raw, ours, more_is_better=more_is_better), 1)


@pytest.mark.parametrize(
    ("more_is_better", "before", "now", "reported"),
    [(True, 3, 2, True), (True, 3, 2.1, False), (False, 2, 3, True), (False, 2, 2.9, False), (False, 3, 2, False)],
)
def test_a_ratio_that_has_become_worse_by_a_third_is_reported_with_both_figures(
    more_is_better: bool, before: float, now: float, reported: bool, tmp_path: Path
) -> None:
    file = tmp_path / "published.json"
    _published.write(file, [measured(before, more_is_better=more_is_better)])
    compared, worse = _published.compare(_published.read(file), [measured(now, more_is_better=more_is_better)])

    assert compared == 1
    assert worse == ([f"name: w, eventfold: {now} times w, raw; published: {before}"] if reported else [])


def test_only_cases_that_were_published_are_compared(tmp_path: Path) -> None:
    file = tmp_path / "published.json"
    _published.write(file, [measured(3, work="with 1,000 events")])

    assert _published.compare(_published.read(file), [measured(1, work="with 10 events")]) == (0, [])
    assert _published.compare({}, [measured(1)]) == (0, [])


@pytest.mark.parametrize(("name", "compared"), [("eventfold, index", 1), ("sqlite", 0)])
def test_only_variants_of_eventfold_are_compared(name: str, compared: int, tmp_path: Path) -> None:
    file = tmp_path / "published.json"
    _published.write(file, [measured(3, name=name)])

    assert _published.compare(_published.read(file), [measured(3, name=name)]) == (compared, [])


@needs_extra
def test_a_run_warns_of_ratios_much_worse_than_in_the_last_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A report also keeps the ratios of other tables."""
    shutil.copy(PAGE, tmp_path)
    (tmp_path / "benchmarks").mkdir()
    file = tmp_path / "benchmarks" / _published.FILE
    _published.write(file, [measured(1)])
    run(tmp_path, "import", "--report", str(tmp_path))
    tables = _published.read(file)
    tables["import"]["cases"]["import, eventfold"]["ratio"] /= 100
    file.write_text(json.dumps(tables))
    run(tmp_path, "import", "--compare", str(file))

    assert set(tables) == {"import", "name"}
    assert "warning: import: import, eventfold:" in capsys.readouterr().err


def test_the_plots_of_the_documentation_show_what_its_tables_say(tmp_path: Path) -> None:
    """`python -m benchmarks --redraw docs` would change no plot, and there are no others."""
    shutil.copy(PAGE, tmp_path)
    main(["--redraw", str(tmp_path)])

    drawn, committed = (
        {path.name: path.read_text() for path in (directory / "benchmarks").glob("*.svg")}
        for directory in (tmp_path, PAGE.parent)
    )
    assert drawn == committed


@pytest.mark.parametrize(
    ("better", "leader", "behind"), [("more", "sqlite", "500 · 2× behind"), ("less", "eventfold", "1,000 · 2× behind")]
)
def test_a_plot_begins_with_the_leader_and_says_how_far_the_others_are_behind(
    better: str, leader: str, behind: str
) -> None:
    """The limit is shown, but not compared, since it is no contender."""
    table = (
        "| work | contender | rate, events/s | lowest | highest | ratio |\n| --- | --- | ---: | ---: | ---: | ---: |\n"
    )
    for contender, median in (("raw", "4,000"), ("eventfold", "500"), ("sqlite", "1,000")):
        table += f"| one task | {contender} | {median} | {median} | {median} | 1 |\n"
    [plot] = plots_of(f"<!-- name -->\n\n**Title** ({better} is better)\n\n{table}\n<!-- /name -->\n")

    texts = [element.text for element in ElementTree.fromstring(svg(plot)).iter("{http://www.w3.org/2000/svg}text")]
    contenders = [text for text in texts if text in ("eventfold", "sqlite")]
    assert contenders[0] == leader
    assert behind in texts
    assert "4,000" in texts
