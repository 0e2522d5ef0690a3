"""The notebook: it runs, for other worlds too; and each computed sentence, against its numbers."""

import itertools
import math
import tomllib
from pathlib import Path

import pytest
import torch

import explainer
import gated_sae
from results import measure, pareto

ROOT = Path(__file__).parent.parent


def played(**more):
    """The notebook's cells, run with small settings: (all that they show, their variables)."""
    small = {"steps": 20, "live_steps": 4, "strengths": [0.4, 0.8], "n_features": 4} | more
    small["live_sizes"] = {"Standard": 40, "Gated": 40, "rescale & shift": 40}
    outputs, definitions = explainer.app.run(defs=small)
    return "".join(output.text for output in outputs if hasattr(output, "text")), definitions


def test_every_cell_runs():
    shown, definitions = played()
    assert len(definitions["live_saes"]) == 5 * len(definitions["live_sizes"])
    assert definitions["naive_history"][-1]["step"] == 10
    for number in range(1, 13):
        assert f"{number} · " in shown
    assert shown.count("Predict first.") == 12
    assert pareto.verdict(definitions["saved"]["table"])[:40] in shown
    assert shown.count("four ") >= 4


@pytest.mark.parametrize(("n", "says"), [(5, "five"), (3, "three")])
def test_flatland_may_have_any_number_of_features(n, says):
    """One number in one place, and words and pictures follow."""
    shown, definitions = played(n_features=n)
    assert definitions["gated"].d_sae == n
    for words in (f"{says} features", f"{says} true directions", f"{says} gate biases"):
        assert words.lower() in shown.lower(), words
    assert "four" not in shown.lower()


def test_flatlands_number_stands_in_one_place():
    source = (ROOT / "explainer.py").read_text()
    assert source.count("n_features = 4") == 1


def test_the_title_is_what_an_editor_opens_at():
    lines = (ROOT / "explainer.py").read_text().splitlines()
    (title,) = (i for i, line in enumerate(lines) if line.strip() == "# Gated Sparse Autoencoders")
    assert title < 60


def test_edit_runs_the_cells_on_opening():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["marimo"]
    assert settings["runtime"]["auto_instantiate"] is True


# -- The lesson's worlds and measurements ----------------------------------------------------------


def test_a_start_is_the_same_first_dictionary_for_every_kind():
    firsts = [
        explainer.learn(kind, 4, [0.8, 0.8], [3, 4], 1)[1][0]["W_dec"]
        for kind in (gated_sae.StandardSAE, gated_sae.GatedSAE)
    ]
    assert firsts[0].equal(firsts[1])
    assert not firsts[0][0].equal(firsts[0][1])


def test_misses_are_angles():
    true = explainer.flatland(4).dictionary
    turned = math.cos(0.1) * true + math.sin(0.1) * true.roll(1, 0)
    assert explainer.misses(true).max() < 0.1
    assert explainer.misses(turned).tolist() == pytest.approx([math.degrees(0.1)] * 4, rel=1e-3)


def test_flatland_meets_the_closed_form_and_gated_does_not_shrink():
    """What sections 2 and 3 say, trained as the notebook trains it."""
    for kind, lost in ((gated_sae.StandardSAE, 0.4), (gated_sae.GatedSAE, 0.0)):
        sae, history = explainer.learn(kind, 4, [0.8], [5], 200)
        assert explainer.misses(history[-1]["W_dec"][0]).max() < 5
        true, found = explainer.lone_strengths(sae)
        strong = true > 0.8
        assert (true - found[:, 0])[strong].mean().item() == pytest.approx(lost, abs=0.03)


def test_the_flow_of_gradients_has_its_exact_zeros():
    sae, _ = explainer.learn(gated_sae.GatedSAE, 4, [0.8], [5], 20)
    (sae,) = measure.members(sae)
    x = next(explainer.flatland(4).batches(500, seed=1))
    flow = {
        (cell["term"], cell["parameter"]): cell["norm"]
        for cell in explainer.gradient_flow(sae, x, 0.8)
    }
    zeros = {key for key, norm in flow.items() if norm == 0}
    silent = {(t, p) for t in ("λ L_sparsity", "L_aux") for p in ("r_mag", "b_mag", "W_dec")}
    assert zeros == silent | {("L_reconstruct", "b_gate")}


def test_the_live_saes_do_not_start_at_the_truth():
    _, saes = explainer.live_runs({"Gated": 40, "JumpReLU": 40}, 1, 0, n_l1=1)
    true = explainer.small_world(0).dictionary
    assert all((sae.W_dec @ true.T).amax(1).mean() < 0.9 for sae in saes)


def test_the_members_of_a_live_run_are_those_of_its_rows():
    rows, saes = explainer.live_runs({"Standard": 40, "rescale & shift": 40}, 3, 1, n_l1=2)
    data = explainer.small_world(1)
    held_out = list(itertools.islice(data.batches(1000, 20_001), 5))
    for row, sae in zip(rows, saes, strict=True):
        assert gated_sae.evaluate(sae, held_out).l0.item() == pytest.approx(row["l0"], abs=1e-3)


def test_latents_that_are_the_truth_lose_nothing():
    data = explainer.small_world(0)
    sae = gated_sae.StandardSAE(20, 40)
    sae.W_dec.data = data.dictionary.clone()
    sae.encode = lambda x: data.sample(4000, torch.Generator().manual_seed(5))[1]
    latents = explainer.latents_of(sae, data)
    assert all(latent["cosine"] == pytest.approx(1) for latent in latents)
    assert all(latent["share"] == pytest.approx(1) for latent in latents)


def test_a_click_wins_until_the_list_is_used():
    rows = [{"variant": "Gated", "l1": 0.5}, {"variant": "Gated", "l1": 0.7}]
    assert explainer.picked(rows, {}, 0) == 0
    assert explainer.picked(rows, {"pick": {"variant": ["Gated"], "l1": [0.7]}}, 0) == 1


# -- Each computed sentence against the numbers it quotes ------------------------------------------


def test_answers_are_judged():
    assert "Right." in explainer.feedback("a", "a", "because").text
    wrong = explainer.feedback("b", "a", "because").text
    assert "No: a." in wrong
    assert "because" in wrong
    assert "because" not in explainer.feedback(None, "a", "because").text


def test_code_is_shown_as_it_stands():
    assert "return F.relu(a - l1 / 2)" in gated_sae.__loader__.get_source("gated_sae")
    assert "def" in explainer.source(gated_sae.shrink).text
    assert explainer.inspect.getsource(gated_sae.shrink) in (ROOT / "gated_sae.py").read_text()


def test_sentence_on_superposition():
    sentence = explainer.superposition_sentence(50, [1.2, 30.4], 8, 12)
    assert "After **50** steps" in sentence
    assert "1° to 30°" in sentence
    assert "**8 of 12** starts" in sentence


def test_sentence_on_shrinkage():
    true = torch.tensor([0.2, 1.0, 2.0, 3.0])
    exact = explainer.shrinkage_sentence(0.8, true, gated_sae.shrink(true, 0.8))
    assert "λ/2 = **0.40**" in exact
    assert "took **0.40**" in exact
    assert "lies 0.00 from" in exact
    assert "took **0.50**" in explainer.shrinkage_sentence(0.8, true, (true - 0.5).relu())


def test_sentence_on_strengths():
    true = torch.tensor([1.0, 1.0, 2.0, 2.0])
    found = {"Standard": true / 2, "Gated": torch.tensor([0.0, 1.0, 2.0, 2.0])}
    sentence = explainer.strengths_sentence(0.6, true, found)
    assert "λ = 0.6" in sentence
    assert "**Standard 50%** and **Gated 100%**" in sentence
    assert "on 100% and 75% of" in sentence


def test_sentence_on_dying_gates():
    sentence = explainer.dying_sentence([0.0, 0.0], [0.04, 0.05], 0.5, 0.0, 200)
    assert "**0, exactly**" in sentence
    assert "0.04 to 0.05" in sentence
    assert "from 0.50 to **0.00** in 200 steps" in sentence


def test_sentence_on_the_frozen_decoder():
    terms, names = ("L_reconstruct", "L_aux"), ("b_gate", "W_dec", "b_dec")
    values = {("L_reconstruct", "W_dec"): 0.25, ("L_aux", "b_gate"): 0.5, ("L_aux", "b_dec"): 0.125}
    frozen, unfrozen = (
        [
            {"term": t, "parameter": p, "norm": (values | more).get((t, p), 0.0)}
            for t in terms
            for p in names
        ]
        for more in ({}, {("L_aux", "W_dec"): 0.75})
    )
    sentence = explainer.flow_sentence(frozen, unfrozen)
    for part in ("hears 0 from", "**0.5** from L_aux", "**0.75**", "with 0.25. Frozen, with **0**"):
        assert part in sentence, part
    assert sentence.endswith("0.12.")


@pytest.mark.parametrize(
    ("b_gate", "says"), [(-0.5, "jumps from 0 to **0.50**"), (0.5, "nothing jumps"), (0, "plain")]
)
def test_sentence_on_one_latent(b_gate, says):
    curves, z, theta, same = explainer.one_latent(b_gate, 0.0, 0.0)
    assert theta == -b_gate
    assert same == 0
    assert says in explainer.latent_sentence(b_gate, theta, same)
    assert (curves["output f̃"] <= curves["ReLU(π_mag)"]).all()
    assert z.min() == -1.5


@pytest.mark.parametrize(("norm", "says"), [(0.1, "collapsed"), (1.1, "stayed"), (3.0, "swelled")])
def test_sentence_on_norms(norm, says):
    sentence = explainer.norms_sentence("norms live, aux frozen", norm, 200, 2.09, 2.14)
    assert sentence.startswith("Norms live, aux frozen: after 200 steps")
    assert says in sentence
    assert "**2.09 times**" in sentence
    assert "2.14 times" in sentence


def test_sentence_on_the_two_factors():
    m = explainer.two_vectors(60, 0.5)
    sentence = explainer.two_vectors_sentence(60, m)
    for part in ("γ = **1.00**", "1.00 x̂", "is 0.25 x", "**0.25**, the squared cosine of 60°"):
        assert part in sentence, part
    assert sentence.endswith("is 0.25.")


def test_trained_saes_lie_where_their_gamma_says():
    """Length over cosine is γ: Gated on the circle, Standard inside it."""
    runs = measure.read("runs")
    gamma = {k: c / math.cos(math.radians(d)) for k, d, c in explainer.typical(runs)}
    assert gamma["Gated"] == pytest.approx(1, abs=0.02)
    assert gamma["Standard"] < 0.85


def test_sentence_on_half_as_many():
    runs = measure.read("runs")
    claimed = measure.read("claims")
    measured = {row["id"]: row["measured"] for row in claimed}
    for name in ("plain", "Zipf, correlated", "hierarchical"):
        sentence = explainer.frontier_sentence(runs, name)
        ratio = measured["D4"][f"L0 Standard / Gated, {name}"]["mean"]
        wide = measured["A9"][f"L0 Standard 1.5x / Gated, {name}"]["mean"]
        assert f"**{ratio:.1f} times**" in sentence
        assert f"wide {wide:.1f} times" in sentence


def test_sentence_on_latents():
    row = {"variant": "Gated", "l1": 0.5, "l0": 2.04, "fvu": 0.1, "gamma": 1.0}
    latents = [{"cosine": c, "share": s} for c, s in ((0.95, 0.5), (0.5, 0.7), (1.0, 0.6))]
    sentence = explainer.latents_sentence(row, latents)
    assert "**Gated, λ = 0.50**: 2.0 latents" in sentence
    assert "2 of the 3 latents" in sentence
    assert "**60%**" in sentence


@pytest.mark.parametrize(("theta", "z"), [(0.5, 1.5), (1.0, 0.5), (0.0, 1.0)])
def test_sentence_on_the_jump(theta, z):
    (ig, patched), (ig_relu, patched_relu) = numbers = explainer.jump_numbers(theta, z)
    assert patched == (z if z > theta else 0)
    assert ig == pytest.approx(max(z - theta, 0), abs=z / 900)
    assert ig == ig_relu == pytest.approx(patched_relu, abs=z / 900)
    sentence = explainer.jump_sentence(theta, z, numbers)
    assert f"by **{patched:.2f}**" in sentence
    assert f"missing, {patched - ig:.2f}, is" in sentence
    assert ("did not reach" in sentence) == (z <= theta)


def test_sentence_on_loss_recovered():
    """Against a baseline further off every score is higher; the order is told as it is."""
    table = [
        {"variant": v, "recovered_zero": zero, "recovered_mean": mean}
        for v, zero, mean in (("Standard", 0.8, 0.85), ("Gated", 0.9, 0.925), ("Gated", 0.7, 0.775))
    ]
    found = {"table": table, "ce": {"zero": 3.0, "mean": 3.5, "clean": 1.0}}
    sentence = explainer.recovered_sentence(found)
    assert "the **mean** is the worse thing to put in: CE 3.00 with zeros, 3.50 with" in sentence
    assert "scores against the mean are 2.5 to 7.5 points higher" in sentence
    assert "order of the 3 SAEs is **the same** under both" in sentence
    table[0]["recovered_mean"] = 0.95
    assert "**not the same**" in explainer.recovered_sentence(found)
    found["ce"]["zero"] = 4.0
    assert "the **zero** is the worse" in explainer.recovered_sentence(found)


def test_sentence_on_the_claims():
    claimed = measure.read("claims")
    sentence = explainer.claims_sentence(claimed)
    lists = {v: explainer.claims_list(claimed, v) for v in {row["verdict"] for row in claimed}}
    assert f"Of {len(claimed)} claims, **{lists['agrees'].count('- **')}** agree" in sentence
    for row in claimed:
        assert (row["id"] in sentence) == (row["verdict"] != "agrees")
        assert f"- **{row['id']}** {row['claim']}" in lists[row["verdict"]]
