"""The notebook: its experiment, the sentence computed from it, and its command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import explainer

ROOT = Path(__file__).parent.parent
KEYS = {"variant", "d_sae", "l1", "l0", "fvu", "gamma", "norm_ratio", "dead_fraction"}


def made_up_table():
    """Three exact power laws, L0 = c / FVU, so that every interpolation has a known answer."""
    factors = {"Standard": 2.0, "Standard 1.5x": 1.5, "Gated": 1.0}
    gammas = {"Standard": 0.8, "Standard 1.5x": 0.9, "Gated": 1.0}
    return [
        {"variant": v, "d_sae": 1, "l1": fvu, "l0": c / fvu, "fvu": fvu, "gamma": gammas[v]}
        for v, c in factors.items()
        for fvu in (0.1, 0.22, 0.5)
    ]


def run(*arguments, cwd=ROOT):
    command = [sys.executable, str(ROOT / "explainer.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_experiment_fills_its_table_the_same_way_twice():
    done = []
    options = dict(n_l1=2, batch=32)
    table = explainer.sweep(5, **options, progress=lambda variant, steps: done.append(steps))
    assert sum(done) == 5 * len(explainer.COMPARED)
    assert [row["variant"] for row in table] == [v for v in explainer.COMPARED for _ in range(2)]
    assert all(set(row) == KEYS for row in table)
    assert table == explainer.sweep(5, **options)
    assert table != explainer.sweep(5, seed=1, **options)


def test_interpolation_is_exact_on_power_laws():
    table = made_up_table()
    assert explainer.at_fvu(table, "Standard", 0.15) == pytest.approx((2 / 0.15, 0.8))
    assert explainer.at_fvu(table, "Standard", 0.22) == pytest.approx((2 / 0.22, 0.8))
    assert explainer.at_fvu(table, "Standard", 0.05) is None
    assert explainer.at_fvu(table, "Standard", 0.6) is None


def test_the_frontier_leaves_out_what_is_beaten():
    beaten = {"variant": "Gated", "d_sae": 1, "l1": 1, "l0": 8.0, "fvu": 0.3, "gamma": 1}
    table = [*made_up_table(), beaten]
    assert beaten not in explainer.frontier(table, "Gated")
    assert len(explainer.frontier(table, "Gated")) == 3


def test_the_sentence_quotes_the_table():
    table = made_up_table()
    ratios = {row["Standard / Gated"] for row in explainer.comparison(table)}
    assert ratios == {2.0}
    sentence = explainer.verdict(table)
    assert "2.0 to 2.0 times fewer active latents than Standard" in sentence
    assert "1.5 to 1.5 times fewer than a Standard SAE 1.5 times as wide" in sentence
    assert "γ is 1.00 to 1.00 for Gated and 0.80 to 0.80 for Standard" in sentence


def test_kinds_that_share_no_level_are_not_compared():
    table = [row for row in made_up_table() if row["variant"] != "Gated"]
    assert explainer.comparison(table) == []
    assert "cannot be compared" in explainer.verdict(table)


def test_the_committed_results_are_of_this_experiment():
    saved = json.loads((ROOT / "results" / "pareto.json").read_text())
    assert {row["variant"] for row in saved["table"]} == set(explainer.COMPARED)
    assert all(set(row) == KEYS for row in saved["table"])
    assert len(explainer.comparison(saved["table"])) >= 3
    assert (ROOT / "results" / "pareto.svg").read_text().startswith("<svg")


def test_every_cell_runs():
    outputs, definitions = explainer.app.run(defs={"arguments": None})
    assert definitions["table"] == definitions["saved"]["table"]
    shown = "".join(output.text for output in outputs if hasattr(output, "text"))
    assert explainer.verdict(definitions["table"])[:40] in shown


def test_the_script_prints_its_table():
    finished = run("--steps", "3")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n|") >= 30
    assert "Gated" in finished.stdout


@pytest.mark.parametrize("arguments", [["--steps", "many"], ["--stops", "3"], ["rebuilt"]])
def test_bad_usage_is_told_and_exits_with_2(arguments):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert "usage: explainer.py" in finished.stderr


def test_failure_exits_nonzero():
    finished = run("--steps", "0")
    assert finished.returncode not in (0, 2)
    assert "steps is 0, expected a positive integer" in finished.stderr
