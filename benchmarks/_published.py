"""The published ratios, and how new results compare with them.

`docs/benchmarks/published.json` has the ratio of each case of each table on the page, with the label of its reference.
Figures differ from machine to machine, but ratios hardly do, so a quick run anywhere can show that something has become
much slower.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._harness import Result, quotient, show

FILE = "published.json"
# By how much a ratio must get worse to be reported. Quick runs vary by less.
A_THIRD = 1 / 3


def write(path: Path, results: list[Result]) -> None:
    """Replaces the file's entries for the tables of these results."""
    tables = read(path) if path.exists() else {}
    tables |= {result.table.name: table(result.as_json()) for result in results}
    path.write_text(json.dumps(tables, indent=1, sort_keys=True) + "\n")


def read(path: Path) -> dict[str, Any]:
    """The tables by name. Raises `OSError`, and `ValueError` if the file is not such a JSON object."""
    tables = json.loads(path.read_text())
    if not isinstance(tables, dict):
        raise ValueError(f"{path} does not have the tables of a report; create it with --report")
    return tables


def table(result: dict[str, Any]) -> dict[str, Any]:
    """The published part of a table; `result` is what `Result.as_json` returns."""
    cases = {
        f"{case['work']}, {case['contender']}": {"ratio": case["ratio"], "to": case["reference"]}
        for case in result["cases"]
        if case["reference"] is not None
    }
    return {"more_is_better": result["more_is_better"], "cases": cases}


def compare(published: dict[str, Any], results: list[Result], ours: str = "eventfold") -> tuple[int, list[str]]:
    """The number of our ratios that are in both, and messages about those that are worse by a third or more.

    A case that is not in both, or has another reference now, is skipped: a quick run has shorter logs.
    """
    compared, worse = 0, []
    for result in results:
        before = published.get(result.table.name)
        now = table(result.as_json())
        if before is None or before["more_is_better"] is not now["more_is_better"]:
            continue
        mine = {row.case.label for row in result.rows if row.case.contender.startswith(ours)}
        for label, case in now["cases"].items():
            old = before["cases"].get(label)
            if old is None or old["to"] != case["to"] or label not in mine:
                continue
            compared += 1
            kept = quotient(
                *((case["ratio"], old["ratio"]) if now["more_is_better"] else (old["ratio"], case["ratio"]))
            )
            if kept <= 1 - A_THIRD:
                worse.append(
                    f"{result.table.name}: {label}: {show(case['ratio'])} times {case['to']}; "
                    f"published: {show(old['ratio'])}"
                )
    return compared, worse
