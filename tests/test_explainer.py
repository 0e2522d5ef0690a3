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


CLAIMS = [
    *(f"S{i}" for i in range(1, 8)),
    *(f"G{i}" for i in range(1, 9)),
    *(f"A{i}" for i in range(1, 10)),
    *(f"D{i}" for i in range(1, 5)),
]


def test_every_claim_has_a_committed_row():
    saved = json.loads((ROOT / "results" / "claims.json").read_text())
    assert [row["id"] for row in saved] == CLAIMS
    for row in saved:
        assert set(row) == {"id", "claim", "setting", "seeds", "measured", "verdict"}
        assert row["verdict"] in ("agrees", "disagrees", "not decidable on toy data")
        assert row["seeds"] >= 5 or row["verdict"] == "not decidable on toy data"


def test_the_committed_claims_follow_from_the_committed_runs():
    """Rows that rest on sweeps are computed again; a hand-edited number would not survive."""
    runs = json.loads((ROOT / "results" / "runs.json").read_text())
    saved = {row["id"]: row for row in json.loads((ROOT / "results" / "claims.json").read_text())}
    ratios = explainer.l0_ratios(runs, "Standard", "Gated")
    assert saved["D4"]["measured"]["L0 Standard / Gated, plain"] == explainer.spread(ratios)
    gammas = explainer.gammas(runs, "Gated")
    assert saved["D4"]["measured"]["γ, Gated"] == explainer.spread(gammas)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # what is hardly trained has undefined ratios
def test_the_evidence_is_collected_in_small():
    """A few steps, two seeds: every kind of run goes through, and the claims are all there."""
    rows = []
    for variant, run in (explainer.EVIDENCE | explainer.ABLATIONS).items():
        rows += explainer.measured_runs(variant, *run, seeds=2, steps=20, n_l1=2)
    for name in ("Zipf, correlated", "hierarchical"):
        rows += explainer.measured_runs(
            "Gated", *explainer.EVIDENCE["Gated"], seeds=2, steps=20, n_l1=2, world_name=name
        )
    numbers = explainer.exact_numbers(2, 50) | {"A8": explainer.dead_latents(2, 20)}
    table = explainer.claims(rows, numbers)
    assert [row["id"] for row in table] == CLAIMS
    exact = {row["id"]: row["verdict"] for row in table}
    for claim in ("S1", "S2", "S3", "S4", "S5", "G1", "G3", "G4", "G7", "G8", "D3"):
        assert exact[claim] == "agrees", claim


def test_a_claim_that_does_not_hold_is_said_to_disagree():
    """Swap the names of Standard and Gated in the runs: the headline's verdict turns."""
    runs = json.loads((ROOT / "results" / "runs.json").read_text())
    numbers = explainer.exact_numbers(2, 50) | {"A8": {"a": [0.5, 0.5], "b": [0.5, 0.5]}}
    swap = {"Standard": "Gated", "Gated": "Standard"}
    swapped = [row | {"variant": swap.get(row["variant"], row["variant"])} for row in runs]
    verdicts = {row["id"]: row["verdict"] for row in explainer.claims(swapped, numbers)}
    assert verdicts["D4"] == verdicts["A8"] == "disagrees"


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


@pytest.mark.parametrize(
    "arguments", [["--steps", "many"], ["--stops", "3"], ["rebuilt"], ["print", "language"]]
)
def test_bad_usage_is_told_and_exits_with_2(arguments):
    finished = run(*arguments)
    assert finished.returncode == 2
    assert "usage: explainer.py" in finished.stderr


def test_failure_exits_nonzero():
    finished = run("--steps", "0")
    assert finished.returncode not in (0, 2)
    assert "steps is 0, expected a positive integer" in finished.stderr
