"""The notebook: it runs, for other worlds too; and each computed sentence, against its numbers."""

import itertools
import math
import tomllib
from pathlib import Path

import pytest
import torch

import explainer
import gated_sae
from results import claims, measure

ROOT = Path(__file__).parent.parent
RUNS, CLAIMS = measure.read("runs"), measure.read("claims")


@pytest.mark.parametrize(("n", "says"), [(4, "four"), (5, "five"), (3, "three")])
def test_every_cell_runs_for_any_number_of_features(n, says):
    """One number in one place, and words and pictures follow."""
    assert (ROOT / "explainer.py").read_text().count("n_features = 4") == 1
    small = {"steps": 20, "live_steps": 4, "strengths": [0.4, 0.8], "n_features": n}
    small["live_sizes"] = {"Standard": 40, "Gated": 40, "rescale & shift": 40}
    outputs, definitions = explainer.app.run(defs=small)
    shown = "".join(output.text for output in outputs if hasattr(output, "text"))
    assert len(definitions["live_saes"]) == 5 * len(definitions["live_sizes"])
    assert definitions["naive_history"][-1]["step"] == 10
    assert definitions["gated"].d_sae == n
    for number in range(1, 13):
        assert f"{number} · " in shown
    assert shown.count("Predict first.") == 12
    assert claims.verdict([*RUNS, *measure.read("language")])[:40] in shown
    for words in (f"{says} features", f"{says} true directions", f"{says} gate biases"):
        assert words in shown.lower(), words
    assert shown.count("four ") >= 4 if n == 4 else "four" not in shown.lower()


def test_an_editor_opens_at_the_title_and_runs_the_cells():
    lines = (ROOT / "explainer.py").read_text().splitlines()
    assert lines.index("    # Gated Sparse Autoencoders") < 60
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["marimo"]
    assert settings["runtime"]["auto_instantiate"] is True


# -- The lesson's worlds and measurements ----------------------------------------------------------


def test_misses_are_angles():
    true = explainer.flatland(4).dictionary
    turned = math.cos(0.1) * true + math.sin(0.1) * true.roll(1, 0)
    assert explainer.misses(true).max() < 0.1
    assert explainer.misses(turned).tolist() == pytest.approx([math.degrees(0.1)] * 4, rel=1e-3)


def test_flatland_meets_the_closed_form_and_gated_does_not_shrink():
    """What sections 2 and 3 say, trained as the notebook trains it. A start is the same first
    dictionary for both kinds."""
    firsts = []
    for kind, lost in ((gated_sae.StandardSAE, 0.4), (gated_sae.GatedSAE, 0.0)):
        sae, history = explainer.learn(kind, 4, [0.8, 0.8], [5, 4], 200)
        firsts.append(history[0]["W_dec"])
        assert explainer.misses(history[-1]["W_dec"][0]).max() < 5
        true, found = explainer.lone_strengths(sae)
        strong = true > 0.8
        assert (true - found[:, 0])[strong].mean().item() == pytest.approx(lost, abs=0.03)
    assert firsts[0].equal(firsts[1])
    assert not firsts[0][0].equal(firsts[0][1])


def test_the_flow_of_gradients_has_its_exact_zeros():
    sae, _ = explainer.learn(gated_sae.GatedSAE, 4, [0.8], [5], 20)
    (sae,) = measure.members(sae)
    x = next(explainer.flatland(4).batches(500, seed=1))
    zeros = {key for key, norm in explainer.gradient_flow(sae, x, 0.8).items() if norm == 0}
    silent = {(t, p) for t in ("λ L_sparsity", "L_aux") for p in ("r_mag", "b_mag", "W_dec")}
    assert zeros == silent | {("L_reconstruct", "b_gate")}


def test_live_saes_are_those_of_their_rows_and_do_not_start_at_the_truth():
    kinds = "Standard", "Gated", "JumpReLU", "rescale & shift"
    rows, saes = explainer.live_runs([(kind, 40) for kind in kinds], 3, 1, n_l1=2)
    data = explainer.small_world(1)
    held_out = list(itertools.islice(data.batches(1000, 20_001), 5))
    for row, sae in zip(rows, saes, strict=True):
        assert gated_sae.evaluate(sae, held_out).l0.item() == pytest.approx(row["l0"], abs=1e-3)
        assert (sae.W_dec @ data.dictionary.T).amax(1).mean() < 0.9


def test_latents_that_are_the_truth_lose_nothing():
    data = explainer.small_world(0)
    sae = gated_sae.StandardSAE(20, 40)
    sae.W_dec.data = data.dictionary.clone()
    sae.encode = lambda x: data.sample(4000, torch.Generator().manual_seed(5))[1]
    latents = explainer.latents_of(sae, data)
    found = [latent[key] for latent in latents for key in ("cosine", "share")]
    assert found == pytest.approx([1] * len(found))


def test_a_click_wins_until_the_list_is_used():
    rows = [{"variant": "Gated", "l1": 0.5}, {"variant": "Gated", "l1": 0.7}]
    assert explainer.picked(rows, {}, 0) == 0
    assert explainer.picked(rows, {"pick": {"variant": ["Gated"], "l1": [0.7]}}, 0) == 1


# -- Each computed sentence against the numbers it quotes ------------------------------------------

TRUE = torch.tensor([0.2, 1.0, 2.0, 3.0])
SHRUNK = gated_sae.shrink(TRUE, 0.8)
FOUND = {"Standard": TRUE / 2, "Gated": torch.tensor([0.0, 1.0, 2.0, 3.0])}
HEARD = {("L_reconstruct", "W_dec"): 0.25, ("L_aux", "b_gate"): 0.5, ("L_aux", "b_dec"): 0.125}
HEARD |= {("L_reconstruct", "b_gate"): 0.0, ("L_aux", "W_dec"): 0.0}
ROW = {"variant": "Gated", "l1": 0.5, "l0": 2.04, "fvu": 0.1, "gamma": 1.0}
LATENTS = [{"cosine": c, "share": s} for c, s in ((0.95, 0.5), (0.5, 0.7), (1.0, 0.6))]
NORMS = "Norms live, aux frozen: after 200 steps|**2.09 times**|2.14 times|"


def in_language(standard, zero):
    """Recovered scores beside zeros and the mean, and the CE of these."""
    scores = (0.8, standard), (0.9, 0.925), (0.7, 0.775)
    table = [{"recovered_zero": score, "recovered_mean": other} for score, other in scores]
    return {"table": table, "ce": {"zero": zero, "mean": 3.5, "clean": 1.0}}


SENTENCES = [
    (("superposition", 50, [1.2, 30.4], 8, 12), "After **50** steps|1° to 30°|**8 of 12** starts"),
    (("shrinkage", 0.8, TRUE, SHRUNK), "λ/2 = **0.40**|took **0.40**|lies 0.00 from"),
    (("shrinkage", 0.8, TRUE, (TRUE - 0.5).relu()), "took **0.50**"),
    (
        ("strengths", 0.6, TRUE, FOUND),
        "λ = 0.6|**Standard 50%** and **Gated 100%**|on 100% and 75% of",
    ),
    (
        ("dying", [0.0, 0.0], [0.04, 0.05], 0.5, 0.0, 200),
        "**0, exactly**|0.04 to 0.05|from 0.50 to **0.00** in 200 steps",
    ),
    (
        ("flow", HEARD, HEARD | {("L_aux", "W_dec"): 0.75}),
        "hears 0 from|**0.5** from L_aux|**0.75**|with 0.25. Frozen, with **0**|b_dec: 0.12.",
    ),
    (("norms", "norms live, aux frozen", 0.1, 200, 2.09, 2.14), NORMS + "collapsed"),
    (("norms", "norms live, aux frozen", 1.1, 200, 2.09, 2.14), NORMS + "stayed"),
    (("norms", "norms live, aux frozen", 3.0, 200, 2.09, 2.14), NORMS + "swelled"),
    (
        ("two_vectors", 60, explainer.two_vectors(60, 0.5)),
        "γ = **1.00**|1.00 x̂|is 0.25 x|**0.25**, the squared cosine of 60°|‖x‖² is 0.25.",
    ),
    (("latents", ROW, LATENTS), "**Gated, λ = 0.50**: 2.0 latents|2 of the 3 latents|**60%**"),
    (
        ("recovered", in_language(0.85, 3.0)),
        "the **mean** is the worse thing to put in: CE 3.00 with zeros, 3.50 with|scores against "
        "the mean are 2.5 to 7.5 points higher|order of the 3 SAEs is **the same** under both",
    ),
    (("recovered", in_language(0.95, 3.0)), "the 3 SAEs is **not the same** under both"),
    (("recovered", in_language(0.95, 4.0)), "the **zero** is the worse"),
]
MEASURED = {row["id"]: row["measured"].get("toy data") for row in CLAIMS}
for name in measure.WORLDS:
    ratio = MEASURED["D4"][f"L0 Standard / Gated, {name}"]["mean"]
    wide = MEASURED["A9"][f"L0 Standard 1.5x / Gated, {name}"]["mean"]
    SENTENCES.append((("frontier", RUNS, name), f"**{ratio:.1f} times**|wide {wide:.1f} times"))


@pytest.mark.parametrize(("of", "says"), SENTENCES, ids=lambda of: of[0])
def test_a_sentence_quotes_its_numbers(of, says):
    sentence = getattr(explainer, f"{of[0]}_sentence")(*of[1:])
    for part in says.split("|"):
        assert part in sentence, part


def test_answers_are_judged():
    asked = explainer.ask("?", ["*a", "b"], "because")
    assert "because" not in explainer.answer(asked).text
    for option, verdict in (("a", "Right."), ("b", "No: a.")):
        asked._update(option)
        assert verdict in explainer.answer(asked).text
        assert "because" in explainer.answer(asked).text


def test_code_is_shown_as_it_stands():
    source = explainer.inspect.getsource(gated_sae.shrink)
    assert "return F.relu(a - l1 / 2)" in source
    assert source in (ROOT / "gated_sae.py").read_text()
    assert "def" in explainer.source(gated_sae.shrink).text


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


def test_trained_saes_lie_where_their_gamma_says():
    """Length over cosine is γ: Gated on the circle, Standard inside it."""
    typical = explainer.typical(RUNS)
    gamma = {kind: length / math.cos(math.radians(turn)) for kind, turn, length in typical}
    assert gamma["Gated"] == pytest.approx(1, abs=0.02)
    assert gamma["Standard"] < 0.85


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


def test_sentence_on_the_claims():
    halves = explainer.claims_sentence(CLAIMS).split("; ")
    for half, kind in zip(halves, ("toy data", "language model"), strict=True):
        own = {row["id"]: row["verdict"][kind] for row in CLAIMS if kind in row["verdict"]}
        agree = list(own.values()).count("agrees")
        assert f"f {len(own)} claims measured on" in half
        assert f"{kind}, **{agree}** agree" in half
        for number, verdict in own.items():
            assert (number in half) == (verdict == "disagrees")
            assert f"- **{number}** " in explainer.claims_list(CLAIMS, kind, verdict)


def test_sentence_on_the_language_model():
    sentence = explainer.language_sentence(measure.read("language"))
    found = {row["id"]: row["measured"].get("language model") for row in CLAIMS}
    name = "L0 {} / Gated{}, language model"
    for number, kind in (("D4", "Standard"), ("A9", "Standard 1.5x")):
        for what in ("", ", equal CE"):
            assert f"{found[number][name.format(kind, what)]['mean']:.2f}" in sentence
