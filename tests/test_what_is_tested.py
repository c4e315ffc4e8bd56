"""What the README says is tested, counted."""

import re

from test_bad_runs import CASES as BAD_INPUTS
from test_distributed import ROOT
from test_equality import OF_ROWS, RUNS, STEPS
from test_fuzz import CASES as FUZZED

from hf_kd.results import read_results
from hf_kd.signals.problem import PROBLEM_TYPES


def test_readme_counts_what_is_tested():
    """Figures in a text outlive what they count."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- tested: begin -->")[2].partition("<!-- tested: end -->")[0]
    killed, divided, bad, fuzzed = (line.split(" | ")[-1] for line in table.strip().splitlines()[2:])
    kills = read_results(ROOT / "recipes" / "results" / "soak.json")["kills"]
    total, saving = (sum(row[name] for row in kills) for name in ("kills", "while_saving"))
    resumed = sum(step > 0 for row in kills for step in row["resumed_at"])
    differ = sum(bool(row["differences"]) for row in kills)
    assert numbers(killed) == [total, saving, resumed, len(kills), differ]
    assert numbers(divided) == [STEPS, len(OF_ROWS), len(PROBLEM_TYPES)] and set(RUNS) > set(PROBLEM_TYPES[1:])
    assert numbers(bad) == [len(BAD_INPUTS)]
    assert numbers(fuzzed) == [sum(FUZZED.values())]


def numbers(text):
    return [int(number) for number in re.findall(r"\d+", text.partition("([")[0])]
