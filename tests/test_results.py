"""The experiments in results/: their tables, verdicts, sentences, and what is committed."""

import json
import subprocess
import sys
from pathlib import Path

import bench
import numpy as np
import pytest
import random_saes
import torch
from torch.nn import functional as F

from results import claims, language, measure, rebuild

ROOT = Path(__file__).parent.parent
PAGE = (measure.RESULTS / "README.md").read_text()
RUNS, LANGUAGE = measure.read("runs"), measure.read("language")
CLAIMS = [f"{part}{i + 1}" for part, n in zip("SGAD", (7, 8, 9, 4), strict=True) for i in range(n)]


def made_up_table():
    """Three exact power laws, L0 = c / FVU, so that every interpolation has a known answer."""
    factors = {"Standard": 2.0, "Standard 1.5x": 1.5, "Gated": 1.0}
    gammas = {"Standard": 0.8, "Standard 1.5x": 0.9, "Gated": 1.0}
    fixed = {"l1": 1, "seed": 0}
    return [
        fixed | {"variant": v, "l0": c / fvu, "fvu": fvu, "lost": fvu / 2, "gamma": gammas[v]}
        for v, c in factors.items()
        for fvu in (0.1, 0.22, 0.5)
    ]


def test_interpolation_is_exact_on_power_laws_and_leaves_out_what_is_beaten():
    table = made_up_table()
    assert measure.at_fvu(table, "Standard", 0.15) == pytest.approx((2 / 0.15, 0.8))
    assert measure.at_fvu(table, "Standard", 0.22) == pytest.approx((2 / 0.22, 0.8))
    assert measure.at_fvu(table, "Standard", 0.1, (), "lost") == pytest.approx((2 / 0.2,))
    assert measure.at_fvu(table, "Standard", 0.05) is None
    assert measure.at_fvu(table, "Standard", 0.6) is None
    beaten = {"variant": "Gated", "l1": 1, "l0": 8.0, "fvu": 0.3, "gamma": 1}
    assert beaten not in measure.frontier([*table, beaten], "Gated")
    assert len(measure.frontier([*table, beaten], "Gated")) == 3
    table = [row | {"world": "plain"} for row in table]
    for by in ("fvu", "lost"):
        assert measure.l0_ratios(table, "Standard", "Gated", by=by) == pytest.approx([2.0])
    assert measure.at_l0(table, "Gated", 5, "plain", "gamma") == [1.0]
    middle = (0.22 * 0.1) ** -0.5  # in log L0, between rows of FVU 0.1 and 0.22
    assert measure.at_l0(table, "Gated", middle, "plain", "fvu") == pytest.approx([0.16])


def test_the_sentence_quotes_the_runs():
    worlds = (*measure.WORLDS, claims.LANGUAGE)
    runs = [row | {"world": name} for row in made_up_table() for name in worlds]
    sentence = claims.verdict(runs)
    assert "has 2.0 to 2.0 times as many" in sentence
    assert "(1.5 to 1.5 if 1.5 times as wide" in sentence
    assert "at equal cross-entropy, 2.0 times (1.5)" in sentence
    assert "γ is 1.00 to 1.00 for Gated and 0.80 to 0.80 for Standard" in sentence


def test_the_radial_share_is_one_where_only_lengths_are_wrong():
    """All rows are too short along one d: L_aux's gradient has nothing across. And by hand."""
    sae = claims.GatedSAE(3, 1, dtype=torch.float64)
    sae.W_enc.data = sae.W_dec.data.mT.clone()
    sae.b_gate.data.fill_(-0.5)
    x = torch.linspace(1, 2, 5, dtype=torch.float64)[:, None] * sae.W_dec.detach()
    assert measure.radial(sae, x)[0].item() == pytest.approx(1)
    sae, x = random_saes.random_sae("gated", (4, 6), 0), random_saes.random_batch(7, 4, seed=1)
    sae.aux, lengths = "unfrozen", []
    for term in (sae.losses(x).aux, sae.losses(x).reconstruct):
        grad, d = measure.gradient(sae, term, "W_dec"), F.normalize(sae.W_dec, dim=-1)
        lengths += [grad.norm().item(), (grad - (grad * d).sum(-1, True) * d).norm().item()]
    along, across = measure.radial(sae, x)
    assert across.item() == pytest.approx(lengths[1] / lengths[3])
    assert along.item() == pytest.approx((1 - (lengths[1] / lengths[0]) ** 2) ** 0.5)


# -- What is committed -----------------------------------------------------------------------------


def test_the_committed_runs_are_of_these_experiments():
    assert {(row["world"], row["variant"]) for row in RUNS} == set(claims.RUNS)
    assert {row["variant"] for row in LANGUAGE} == set(claims.IN_LANGUAGE)
    assert {row["seed"] for row in RUNS} == set(range(5))
    assert {row["seed"] for row in LANGUAGE} == set(range(3))


def test_the_tables_of_peers_and_of_speed_are_of_the_committed_numbers():
    peers = measure.read("peers")
    kinds = [[row for row in peers if row["data"] == data] for data in ("layer2", "synthetic")]
    for table in (*map(bench.quality_table, kinds), *bench.speed_tables(measure.read("speed"))):
        assert PAGE.count(table) == 1


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
    file, made = tmp_path / "a.jsonl", {"l1": 2, "of": "γ\u2028"}
    for _ in range(2):  # the second time from the file
        assert measure.remembered(file, made, lambda: {"l0": 5}) == made | {"l0": 5}
    with file.open("a") as lines:
        lines.write('{"l1": 3, "l')  # killed in the middle of a line
    assert measure.remembered(file, {"l1": 3}, lambda: {"l0": 4})["l0"] == 4
    assert measure.remembered(file, {"l1": 3}, lambda: {"l0": 0})["l0"] == 4
    assert [json.loads(line)["l0"] for line in file.read_text().splitlines()] == [5, 4]


def test_every_claim_has_a_committed_row_and_a_verdict():
    saved = measure.read("claims")
    assert [row["id"] for row in saved] == CLAIMS == claims.CLAIMS
    for row in saved:
        assert set(row) == {"id", "claim", "setting", "seeds", "measured", "verdict"}
        assert set(row["verdict"].values()) <= {"agrees", "disagrees"}
        assert row["verdict"]
        for kind in row["verdict"]:
            assert row["seeds"][kind] >= {"toy data": 5, "language model": 3}[kind]


IN_LANGUAGE = {"D1", "D2", "D4", "A1", "A2", "A3", "A4", "A9", "G2", "G5", "G6"}


@pytest.mark.parametrize("number", sorted(IN_LANGUAGE | {"A5", "A6"}))
def test_the_committed_claims_follow_from_the_committed_runs(number):
    """Rows that rest on sweeps are computed again; a hand-edited number would not survive."""
    (saved,) = (row for row in measure.read("claims") if row["id"] == number)
    assert (claims.LANGUAGE in saved["verdict"]) == (number in IN_LANGUAGE)
    # On toy data, some train SAEs of their own.
    trains = number in ("A4", "D1", "G2")
    kinds = [kind for kind in saved["verdict"] if kind == claims.LANGUAGE or not trains]
    seen = claims.Claims(measure.read).judged(number, kinds)
    for kind in kinds:
        assert seen["measured"][kind] == saved["measured"][kind]
        assert seen["verdict"][kind] == saved["verdict"][kind]


@pytest.mark.filterwarnings("ignore::UserWarning")  # settings that fail are here to be seen failing
def test_the_evidence_is_collected_in_small(monkeypatch, tmp_path):
    """A few steps, two seeds: every kind of run goes through, and the claims are all there."""
    read, held_out = language.english()
    monkeypatch.setattr(language, "english", lambda: (read[:50_000], held_out[:2100]))
    monkeypatch.setattr(language, "SIZES", language.SIZES[:2])
    remember, found = lambda made, measure: list(measure()), {}
    for measured in (claims.measured_toy, claims.measured_language):
        found |= measured(20, tmp_path, remember, seeds=2, n_l1=2)
    seen = claims.Claims(found.get, steps=20, seeds=2)
    table = [seen.judged(number) for number in claims.CLAIMS]
    assert [row["id"] for row in table] == CLAIMS
    model, saes = language.kept(tmp_path)
    assert model.mlp.out_features == saes["Standard"].d_in == saes["Gated"].d_in
    exact = {row["id"]: row["verdict"].get(claims.TOY) for row in table}
    for claim in ("S1", "S2", "S3", "S4", "S5", "G1", "G3", "G4", "G7", "G8", "D3"):
        assert exact[claim] == "agrees", claim


def test_a_claim_that_does_not_hold_is_said_to_disagree():
    """Swap the names of Standard and Gated in the runs: the headline's verdict turns."""
    swap = {"Standard": "Gated", "Gated": "Standard"}

    def swapped(name):
        rows = measure.read(name)
        return [row | {k: swap.get(row[k], row[k]) for k in row if k == "variant"} for row in rows]

    for name in ("D2", "D4"):
        verdicts = claims.Claims(swapped).judged(name)["verdict"]
        assert set(verdicts.values()) == {"disagrees"}


# -- The command -----------------------------------------------------------------------------------


def run(*arguments, cwd):
    command = [sys.executable, str(ROOT / "results" / "rebuild.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_the_page_and_its_pictures_are_drawn_from_the_committed_numbers(tmp_path):
    done = run("--shown", "--out", str(tmp_path / "out"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "README.md").read_text() == PAGE
    assert "At equal FVU" in done.stdout
    for shown in done.stdout.strip().split("\n\n"):
        assert PAGE.count(f" -->\n\n{shown}\n\n<!-- /") == 1
    drawn, kept = (sorted(folder.glob("*.svg")) for folder in (tmp_path / "out", measure.RESULTS))
    assert [picture.name for picture in drawn] == [picture.name for picture in kept]
    assert all(picture.read_text().startswith("<svg") for picture in (*drawn, *kept))


def test_an_interrupted_rebuild_goes_on(tmp_path, monkeypatch):
    """Stopped in its third run, started again: nothing is measured twice, and nothing is left."""
    calls, toy = [], ["toy", "--steps", "3", "--out", str(tmp_path)]

    def counted(source, name, variant, *_):
        calls.append((name, variant))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return [{"world": name, "variant": variant}]

    monkeypatch.setattr(claims, "run", counted)
    monkeypatch.setitem(claims.PARTS, "toy", (claims.measured_toy, lambda read: (None, {"-": ""})))
    with pytest.raises(KeyboardInterrupt):
        rebuild.main(toy)
    assert [file.name for file in tmp_path.iterdir()] == ["toy.begun.jsonl"]
    rebuild.main([*toy, "--shown"])
    rebuild.main(toy)
    assert calls == [*claims.RUNS[:3], *claims.RUNS[2:]]
    rows = measure.read("runs", tmp_path)
    assert [(row["world"], row["variant"]) for row in rows] == claims.RUNS
    assert not [*tmp_path.glob("*begun*")]


@pytest.mark.parametrize("usage", ["--steps many", "--steps 0", "--stops 3", "rebuilt"])
def test_bad_usage_is_told_and_exits_with_2(usage, tmp_path):
    done = run(*usage.split(), cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: rebuild.py" in done.stderr
