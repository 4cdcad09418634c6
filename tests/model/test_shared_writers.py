"""The protocol of shared writers, in a model: every interleaving, kill and power cut of a few short histories."""

from __future__ import annotations

import os

import pytest
from tests.model.shared_writers import MUTATIONS, Violation, explore

PLANS = {
    "appends and rotations, no kill": (((1, 2, "R"), (11, "R", 12)), 0),
    "one rotates, one kill": (((1, "R", 2), (11, 12)), 1),
    "both rotate, one kill": (((1, "R"), (11, "R")), 1),
}
MORE_PLANS = {
    "one rotates, two kills": (((1, "R", 2), (11, 12)), 2),
    "both rotate, two kills": (((1, "R"), (11, "R")), 2),
    "three writers, one kill": (((1,), (11, "R"), (21,)), 1),
}
if os.environ.get("EVENTFOLD_SHARED_MODEL") == "all":
    PLANS |= MORE_PLANS


@pytest.mark.parametrize("name", PLANS)
def test_no_interleaving_kill_or_power_cut_loses_or_duplicates_an_acknowledged_line(name: str) -> None:
    plans, kills = PLANS[name]
    explored = explore(plans, kills)
    assert explored.states > 4000
    assert explored.ends > 20


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_step_of_the_protocol_is_needed(mutation: str) -> None:
    plans = ((1, "R", 2), (11, "R", 12)) if "claim" in mutation else ((1, "R", 2), (11, 12))
    with pytest.raises(Violation):
        explore(plans, 1, mutation)
