"""The experiments in results/: their tables, verdicts, sentences, and what is committed."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import bench
import numpy as np
import pytest
import torch

from results import claims, measure, pareto, rebuild, starts

ROOT = Path(__file__).parent.parent
KEYS = {"variant", "d_sae", "l1", "l0", "fvu", "gamma", "norm_ratio", "dead_fraction"}
PAGE, RUNS = (measure.RESULTS / "README.md").read_text(), measure.read("runs")
CLAIMS = [
    f"{part}{i}" for part, n in zip("SGAD", (7, 8, 9, 4), strict=True) for i in range(1, n + 1)
]


def made_up_table():
    """Three exact power laws, L0 = c / FVU, so that every interpolation has a known answer."""
    factors = {"Standard": 2.0, "Standard 1.5x": 1.5, "Gated": 1.0}
    gammas = {"Standard": 0.8, "Standard 1.5x": 0.9, "Gated": 1.0}
    return [
        {"variant": v, "d_sae": 1, "l1": fvu, "l0": c / fvu, "fvu": fvu, "gamma": gammas[v]}
        for v, c in factors.items()
        for fvu in (0.1, 0.22, 0.5)
    ]


def test_the_experiment_fills_its_table_the_same_way_twice():
    options = dict(n_l1=2, batch=32)
    table = pareto.sweep(5, **options)
    assert [row["variant"] for row in table] == [v for v in pareto.COMPARED for _ in range(2)]
    assert all(set(row) == KEYS for row in table)
    assert table == pareto.sweep(5, **options)
    assert table != pareto.sweep(5, seed=1, **options)


def test_interpolation_is_exact_on_power_laws_and_leaves_out_what_is_beaten():
    table = made_up_table()
    assert measure.at_fvu(table, "Standard", 0.15) == pytest.approx((2 / 0.15, 0.8))
    assert measure.at_fvu(table, "Standard", 0.22) == pytest.approx((2 / 0.22, 0.8))
    assert measure.at_fvu(table, "Standard", 0.05) is None
    assert measure.at_fvu(table, "Standard", 0.6) is None
    beaten = {"variant": "Gated", "d_sae": 1, "l1": 1, "l0": 8.0, "fvu": 0.3, "gamma": 1}
    assert beaten not in measure.frontier([*table, beaten], "Gated")
    assert len(measure.frontier([*table, beaten], "Gated")) == 3


def test_the_sentence_quotes_the_table():
    table = made_up_table()
    assert {row["Standard / Gated"] for row in pareto.comparison(table)} == {2.0}
    sentence = pareto.verdict(table)
    assert "2.0 to 2.0 times fewer active latents than Standard" in sentence
    assert "1.5 to 1.5 times fewer than a Standard SAE 1.5 times as wide" in sentence
    assert "γ is 1.00 to 1.00 for Gated and 0.80 to 0.80 for Standard" in sentence
    table = [row for row in table if row["variant"] != "Gated"]  # which then share no level
    assert pareto.comparison(table) == []
    assert "cannot be compared" in pareto.verdict(table)


# -- What is committed -----------------------------------------------------------------------------


def test_the_committed_results_are_of_this_experiment():
    table = measure.read("pareto")["table"]
    assert {row["variant"] for row in table} == set(pareto.COMPARED)
    assert all(set(row) == KEYS for row in table)
    assert len(pareto.comparison(table)) >= 3
    assert {(row["world"], row["variant"]) for row in RUNS} == set(claims.RUNS)


@pytest.mark.parametrize("name", ["pareto", "claims", "language"])
def test_the_page_and_its_pictures_are_of_the_committed_numbers(name):
    """As `rebuild.py --shown` would draw them."""
    _, places = rebuild.PARTS[name].shown(measure.read)
    assert len(places) > 1
    assert rebuild.filled(PAGE, places) == PAGE
    assert all(PAGE.count(f"<!-- {place} -->") == 1 for place in places)
    assert (measure.RESULTS / f"{name}.svg").read_text().startswith("<svg")


def committed(name):
    return list(map(json.loads, (measure.RESULTS / f"{name}.jsonl").read_text().splitlines()))


def test_the_tables_of_starts_and_peers_are_of_the_committed_numbers():
    places = starts.tables(committed("starts")) | {
        "quality": bench.quality_table(committed("peers"))
    }
    assert rebuild.filled(PAGE, places) == PAGE
    assert all(PAGE.count(f"<!-- {place} -->") == 1 for place in places)


@pytest.mark.parametrize("tried", starts.TRIED)
def test_every_start_runs(tried):
    x = torch.randn(1200, 16, generator=torch.Generator().manual_seed(0))
    row = starts.run(x, x[:100], tried, 32, 3, 1.0)
    assert all(math.isfinite(value) for value in row.values())
    assert row["fvu"] < (1.1 if starts.TRIED[tried][0] < 1 else 3)


def test_activations_are_scaled_and_what_was_measured_is_remembered(tmp_path):
    raw = np.random.default_rng(0).standard_normal((500, 8)).astype("f4") * 3 + 7
    np.save(tmp_path / "a.npy", raw)
    x, held_out = measure.activations(tmp_path / "a.npy", aside=100)
    assert (len(x), len(held_out)) == (400, 100)
    assert x.mean(0).abs().max() < 1e-5
    assert x.square().sum(-1).mean() == pytest.approx(8)
    scale = (x[1] - x[0]).norm() / np.linalg.norm(raw[101] - raw[100])
    torch.testing.assert_close(held_out[1] - held_out[0], scale * torch.from_numpy(raw[1] - raw[0]))
    batches = list(measure.epochs(x, 64, 13))  # six in an epoch, and one
    seen = [set(map(tuple, torch.cat(part).tolist())) for part in (batches[:6], batches[6:12])]
    assert [len(s) for s in seen] == [384, 384]
    assert seen[0] != seen[1]
    file, made = tmp_path / "a.jsonl", {"l1": 2}
    for _ in range(2):  # the second time from the file
        assert measure.remembered(file, made, lambda: {"l0": 5}) == {"l1": 2, "l0": 5}
        made = {"l1": 2}
    assert measure.remembered(file, {"l1": 3}, lambda: {"l0": 4})["l0"] == 4
    assert len(file.read_text().splitlines()) == 2


def test_every_claim_has_a_committed_row():
    saved = measure.read("claims")
    assert [row["id"] for row in saved] == CLAIMS == claims.CLAIMS
    for row in saved:
        assert set(row) == {"id", "claim", "setting", "seeds", "measured", "verdict"}
        assert row["verdict"] in ("agrees", "disagrees", "not decidable on toy data")
        assert row["seeds"] >= 5 or row["verdict"] == "not decidable on toy data"


@pytest.mark.parametrize("number", ["G5", "G6", "A1", "A2", "A3", "A4", "A5", "A6", "A9", "D4"])
def test_the_committed_claims_follow_from_the_committed_runs(number):
    """Rows that rest on sweeps are computed again; a hand-edited number would not survive."""
    saved = {row["id"]: row for row in measure.read("claims")}
    assert claims.Claims(runs=RUNS).judged(number) == saved[number]


@pytest.mark.filterwarnings("ignore::UserWarning")  # settings that fail are here to be seen failing
def test_the_evidence_is_collected_in_small():
    """A few steps, two seeds: every kind of run goes through, and the claims are all there."""
    seen = claims.Claims(steps=20, seeds=2, n_l1=2)
    table = [seen.judged(number) for number in claims.CLAIMS]
    assert [row["id"] for row in table] == CLAIMS
    exact = {row["id"]: row["verdict"] for row in table}
    for claim in ("S1", "S2", "S3", "S4", "S5", "G1", "G3", "G4", "G7", "G8", "D3"):
        assert exact[claim] == "agrees", claim


def test_a_claim_that_does_not_hold_is_said_to_disagree():
    """Swap the names of Standard and Gated in the runs: the headline's verdict turns."""
    swap = {"Standard": "Gated", "Gated": "Standard"}
    runs = [row | {"variant": swap.get(row["variant"], row["variant"])} for row in RUNS]
    assert claims.Claims(runs=runs).judged("D4")["verdict"] == "disagrees"


# -- The command -----------------------------------------------------------------------------------


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "results" / "rebuild.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_rebuild_writes_numbers_picture_and_page(tmp_path):
    done = run("pareto", "--steps", "3", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "pareto.json", "pareto.svg"]
    read = partial(measure.read, folder=tmp_path / "out")
    assert read("pareto")["steps"] == 3
    _, places = pareto.shown(read)
    assert (tmp_path / "out" / "README.md").read_text() == rebuild.filled(PAGE, places)
    assert places["verdict"] in done.stdout


@pytest.mark.parametrize(
    "arguments", [["--steps", "many"], ["--steps", "0"], ["--stops", "3"], ["rebuilt"]]
)
def test_bad_usage_is_told_and_exits_with_2(arguments, tmp_path):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: rebuild.py" in done.stderr
