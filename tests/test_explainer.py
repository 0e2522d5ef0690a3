"""The notebook: it runs, for other worlds too; and each computed sentence, against its numbers."""

import inspect
import itertools
import math
import tomllib
from pathlib import Path

import marimo as mo
import pytest
import torch

import explainer
import gated_sae
from results import claims, language, measure

ROOT = Path(__file__).parent.parent
RUNS, CLAIMS = measure.read("runs"), measure.read("claims")
TEXT = (ROOT / "explainer.py").read_text()
SMALL = {"steps": 20, "live_steps": 50, "strengths": [0.4, 0.8], "dying_l1": [0.0, 0.1]}


def shown(everything, n):
    """What the page says, and what its cells define."""
    of = SMALL | {"n_features": n, "everything": mo.ui.switch(value=everything)}
    outputs, definitions = explainer.app.run(defs=of)
    return "".join(output.text for output in outputs if hasattr(output, "text")), definitions


@pytest.mark.parametrize(("n", "says"), [(4, "four"), (5, "five"), (3, "three")])
def test_every_cell_runs_for_any_number_of_features(n, says):
    """One number in one place, and words and pictures follow."""
    assert TEXT.count("n_features = 4") == 1
    text, definitions = shown(True, n)
    assert definitions["gated"].d_sae == n
    for number in range(1, 13):
        assert f"{number} · " in text
    assert text.count("Predict first.") == text.count("The answer is: ") == 12
    for words in (f"{says} features", f"{says} true directions", f"{says} gate biases"):
        assert words in text.lower(), words
    assert text.count("four ") >= 4 if n == 4 else "four " not in text.lower()


def test_nothing_is_given_away_before_there_is_an_answer():
    """Without one, no picture of a question, nothing to keep and no feedback is there."""
    text, _ = shown(False, 4)
    assert text.count("A picture comes with your answer.") == 12
    assert text.count("Keep:") == 1  # of the real latents, which no question precedes
    assert "The answer is: " not in text


def test_an_editor_opens_at_the_title_and_runs_the_cells():
    lines = TEXT.splitlines()
    assert lines.index("    # Gated Sparse Autoencoders") < 60
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["marimo"]
    assert settings["runtime"]["auto_instantiate"] is True


def test_each_answer_has_a_feedback_of_its_own():
    text = "Is it a?\n    - b, say | It is\n      not.\n    * a | Because.\n    "
    text = f"\n    It is said.\n\n    **Predict first.** {text}"
    assert "It is said" in explainer.before(text).text
    assert "Is it" not in explainer.before(text).text
    asked = explainer.ask(text, mo.ui.switch(value=False))
    for option, words in (("a", ["Right.", "Because."]), ("b, say", ["No: a.", "It is not."])):
        asked._update(option)
        assert all(word in asked.value.text for word in words)
    assert "The answer is: a." in explainer.ask(text, mo.ui.switch(value=True)).value.text


# -- The forty lines -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("steps", [1, 10])
def test_the_forty_lines_are_the_module(seed, steps, monkeypatch):
    """Losses, gradients and steps. The lines have no schedule, and biases start at 0."""
    generator = torch.Generator().manual_seed(seed)
    sae = gated_sae.GatedSAE(6, 10, generator=generator).double()
    sae.W_enc.data = sae.W_dec.data.mT.clone()
    batches = torch.randn(steps, 64, 6, generator=generator).double()
    monkeypatch.setattr(gated_sae, "start", lambda sae, x: [])
    options = {"l1_warmup": 0.0, "lr_warmup": 0.0, "lr_decay": 0.0, "device": "cpu"}
    trainer = gated_sae.Trainer(sae, l1=0.3, steps=steps, lr=0.01, **options)
    first = sae.W_dec.detach().clone()
    record = [trainer.step(x) for x in batches][-1]
    torch.set_default_dtype(torch.float64)
    try:
        *_, (parameters, losses) = explainer.forty_lines(first, batches, 0.3, 0.01)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [v.item() for v in losses] == pytest.approx([v.item() for v in record.losses], abs=1e-12)
    names = "W_dec", "W_enc", "b_dec", "b_gate", "b_mag", "r_mag"
    for name, parameter in zip(names, parameters, strict=True):
        own = getattr(sae, name)
        torch.testing.assert_close(parameter, own, rtol=1e-7, atol=1e-10, msg=name)
        torch.testing.assert_close(parameter.grad, own.grad, rtol=1e-7, atol=1e-10, msg=name)


def test_the_forty_lines_are_forty_and_each_edit_changes_them():
    code, found = inspect.getsource(explainer.forty_lines), {}
    code = code[code.index("def ") :]
    assert len(code.splitlines()) <= 40
    for name, (changes, why) in explainer.edits().items():
        shown, run = explainer.edited(code, changes)
        assert all(old in code for old, _ in changes)
        assert (run != code) == (name != "as it is") == shown.startswith("```diff") == bool(changes)
        assert len(why) > 40
        exec(run, scope := {"torch": torch})
        found[name], errors = explainer.forty_run(scope["forty_lines"], 4, steps=200)
        assert len(errors) == 200
    assert (whole := found["as it is"])["given back"] == "100%"
    assert float(found["drop L_aux"]["L0"]) < 0.02 < 0.1 < float(whole["L0"])
    assert float(found["encoder ten times too long"]["FVU"]) > float(whole["FVU"])


# -- The lesson's worlds and measurements ----------------------------------------------------------


def test_flatland_meets_the_closed_form_and_gated_does_not_shrink():
    """What sections 2 and 3 say, trained as the notebook trains it, at each λ that it offers. A
    start is the same first dictionary for both kinds."""
    firsts, l1 = [], [0.4, 0.8, 1.2]
    for kind, lost in ((gated_sae.StandardSAE, 0.5), (gated_sae.GatedSAE, 0.0)):
        sae, history = explainer.learn(kind, 4, l1, [5, 5, 5], 200)
        firsts.append(history[0]["state"]["W_dec"])
        true, found = explainer.lone_strengths(sae)
        for i in range(3):
            assert explainer.misses(history[-1]["state"]["W_dec"][i]).max() < 5
            for strong in ((true > 0.9) & (true < 1.1), true > 2):
                off = (true - found[:, i])[strong].mean().item()
                assert off == pytest.approx(lost * l1[i], abs=0.03)
    assert firsts[0].equal(firsts[1])
    true, turn = explainer.flatland(4).dictionary, torch.tensor([[0.8, 0.6], [-0.6, 0.8]])
    assert explainer.misses(true @ turn).tolist() == pytest.approx([36.87] * 4, abs=0.01)


def test_the_obvious_loss_closes_the_gates_at_any_penalty_but_none():
    untied = explainer.partial(gated_sae.GatedSAE, tied=False, aux=None)
    _, history = explainer.learn(untied, 4, [0.0, 0.001, 1.0], [5] * 3, 200, 1e-2)
    first, last = (history[k]["rates"].sum(-1) for k in (0, -1))
    assert (first > 0.1).all()
    assert last[0] == pytest.approx(first[0].item(), abs=0.05)
    assert (last[1:] < 0.01).all()


def test_the_flow_of_gradients_has_its_exact_zeros_and_what_a_step_keeps():
    (state,) = measure.members(explainer.learn(gated_sae.GatedSAE, 4, [0.8], [5], 200)[0])
    x = next(explainer.flatland(4).batches(500, seed=1))
    flow = explainer.gradient_flow(state, x, 0.8)
    zeros = {key for key, norm in flow.items() if norm == 0 and key[0] != "along"}
    silent = {(t, p) for t in ("λ L_sparsity", "L_aux") for p in ("r_mag", "b_mag", "W_dec")}
    assert zeros == silent | {("L_reconstruct", "b_gate")}
    state.aux = "unfrozen"
    flow = explainer.gradient_flow(state, x, 0.8)
    grad = measure.gradient(state, state.losses(x).aux, "W_dec").norm().item()
    assert math.hypot(flow["along", "L_aux"], flow["L_aux", "W_dec"]) == pytest.approx(grad)
    assert flow["along", "L_aux"] > 10 * flow["L_aux", "W_dec"] > 0


def test_saes_trained_while_one_waits_show_half_and_bad_seeds_are_told():
    rows = explainer.live_runs(300, 0)
    ratio = explainer.over_gated(rows, "Standard", "plain")
    assert 1.5 < ratio < 2.6
    assert f"**{ratio:.1f} times**" in explainer.live_sentence(rows, 0)
    for seed in (2.7, None, -1, 1000):
        assert explainer.live_runs(50, seed) == []
        assert f"The seed is {seed}, expected a whole" in explainer.live_sentence([], seed)
    few = [row for row in rows if row["fvu"] > 0.3]
    assert "train for longer" in explainer.live_sentence(few or rows[:1], 0)


# -- Real latents ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept():
    return explainer.kept_latents()


def test_the_kept_model_is_the_committed_one_and_its_saes_lose_alike(kept):
    corpus, model, on_corpus, saes = kept
    (seen,) = (row for row in measure.read("models") if row["seed"] == 0)
    assert language.cross_entropy(model, corpus).item() == pytest.approx(seen["clean"], abs=2e-3)
    lost, l0 = {}, {kind: (f > 0).sum(-1).float().mean().item() for kind, f in on_corpus.items()}
    for kind, sae in saes.items():
        with gated_sae.splice(model.mlp, sae), torch.no_grad():
            now = language.cross_entropy(model, corpus).item()
        lost[kind] = (now - seen["clean"]) / (seen["mean"] - seen["clean"])
        assert 0.02 < lost[kind] < 0.1
    assert abs(lost["Standard"] - lost["Gated"]) < 0.03
    assert l0["Standard"] > 1.5 * l0["Gated"]
    files = [measure.RESULTS / "language_model.safetensors"]
    files += [*measure.RESULTS.glob("standard/*"), *measure.RESULTS.glob("gated/*")]
    assert len(files) == 5
    assert sum(file.stat().st_size for file in files) < 2e6


@pytest.mark.parametrize("text", ["", "\ud800", "def f(x):\n\treturn x", "π ≠ 3 <b>", "x" * 500])
def test_any_text_is_read_and_shown(kept, text):
    _, model, _, saes = kept
    ids = explainer.read_bytes(text)
    assert 2 <= ids.shape[1] <= 128
    assert bytes(ids[0].tolist()).decode(errors="ignore")[:99] in f"{text:2}".replace("\ud800", "?")
    (x,) = gated_sae.harvest(model, model.mlp, [ids])
    losses = explainer.byte_losses(model, ids, {"as it is": x[None], **saes, "zeros": "zero"})
    whole = language.cross_entropy(model, ids).item()
    assert losses["as it is"].mean().item() == pytest.approx(whole, rel=1e-4)
    html = explainer.coloured(ids[0], x[:, 0].abs(), "#000000", 1.0).text
    assert html.count("<span title=") == ids.shape[1]
    assert "<b>" not in html


def test_a_latent_is_told_by_its_numbers(kept):
    corpus, model, on_corpus, saes = kept
    pair = explainer.nearest_latents(saes, 7)
    f = {kind: on_corpus[kind][:, i] for kind, i in pair.items()}
    d = torch.nn.functional.normalize(saes["Gated"].W_dec[7], dim=0)
    cosines = torch.nn.functional.normalize(saes["Standard"].W_dec, dim=-1) @ d
    said = explainer.latents_sentence(pair, f, saes, model)
    assert f"latent 7 fires on **{100 * (f['Gated'] > 0).float().mean():.1f}%**" in said
    assert f"cosine of {cosines.max():.2f}" in said
    logits = (d - d.mean()) * model.norm.weight @ model.unembed.weight.T
    best = explainer.letter(logits.argmax().item())
    assert f"Standard's: `{'␣' if best == ' ' else best}` `" in said
    assert explainer.histogram({"Gated": torch.ones(0)}, None, "") is not None  # fires nowhere
    card = explainer.latent_card("Gated", 7, corpus[0], f["Gated"][:128], corpus, f["Gated"])
    assert "latent 7" in card.text


# -- Each computed sentence against the numbers it quotes ------------------------------------------

TRUE = torch.tensor([0.2, 1.0, 2.0, 3.0])
SHRUNK = gated_sae.shrink(TRUE, 0.8)
FOUND = {"Standard": TRUE / 2, "Gated": torch.tensor([0.0, 1.0, 2.0, 3.0])}
FLOW = {("λ L_sparsity", "b_gate"): 0.5, ("L_aux", "b_gate"): 0.25, ("L_aux", "W_dec"): 0.0}
MIXED = FLOW | {("L_aux", "W_dec"): 0.75, ("L_reconstruct", "W_dec"): 0.125}
MIXED |= {("along", "L_aux"): 0.875}
HISTORY = [{"rates": torch.tensor([[r, r]])} for r in (0.25, 0.0)]
NORMS = "Norms live, aux frozen: after 200 steps|**2.09 times**|"
ENDS = torch.tensor([[1.0, 2.0], [3.0, 40.0]])
PUSH = "pushes with **0.5** and "


def in_language(standard, zero):
    """Recovered scores beside zeros and the mean, and the CE of these."""
    scores = (0.8, standard), (0.9, 0.925), (0.7, 0.775)
    table = [{"recovered_zero": score, "recovered_mean": other} for score, other in scores]
    return {"table": table, "ce": {"zero": zero, "mean": 3.5, "clean": 1.0}}


SENTENCES = [
    (
        *("superposition", 50, torch.tensor([1.2, 30.4]), ENDS),
        "After **50** training|two true|1° to 30°|**1 of 2** starts|(not 1)",
    ),
    ("shrinkage", 0.8, TRUE, SHRUNK, "λ/2 = **0.40**|took **0.40**|lies 0.000 from"),
    ("shrinkage", 0.8, TRUE, (TRUE - 0.5).relu(), "took **0.50**"),
    (
        *("strengths", 0.6, TRUE, FOUND),
        "on 100% (Standard) and 75% (Gated)|**Standard 50%** and **Gated 100%**",
    ),
    (
        *("dying", 0.1, [0.0, 0.0], [0.04, 0.05], HISTORY, 0),
        "two gate|**0, exactly**|0.04 to 0.05|λ = 0.1, L0 falls from 0.50 to **0.00**",
    ),
    ("dying", 0.0, [0.0], [0.04], HISTORY[:1] * 2, 0, "nobody pushes|0.50 before and 0.50 after"),
    ("flow", FLOW, "frozen", f"{PUSH}|back with **0.25**: a balance|L_aux has **0**, exactly"),
    ("flow", MIXED, "unfrozen", f"{PUSH}|d_i with **0.75**|with 0.12|with 0.88, for nothing"),
    ("flow", FLOW, None, f"{PUSH}nobody pulls back"),
    ("norms", "norms live, aux frozen", 0.1, 200, 2.09, NORMS + "collapsed"),
    ("norms", "norms live, aux frozen", 1.1, 200, 2.09, NORMS + "stayed"),
    ("norms", "norms live, aux frozen", 3.0, 200, 2.09, NORMS + "swelled"),
    ("two_vectors", 60, explainer.two_vectors(60, 0.5), "γ = **1.00**|0.25 x|not reciprocal|60°."),
    ("two_vectors", 0, explainer.two_vectors(0, 0.5), "γ = **0.50**|are reciprocal|**1.00**, is"),
    ("two_vectors", 85, explainer.two_vectors(85, 0.5), "γ = **5.74**|x̂ is too long, even if"),
    (
        *("recovered", in_language(0.85, 3.0)),
        "the **mean** is the worse thing to put in: CE 3.00 with zeros, 3.50 with|scores against "
        "the mean are 2.5 to 7.5 points higher|order of the 3 points is **the same** under both",
    ),
    ("recovered", in_language(0.95, 3.0), "the 3 points is **not the same** under both"),
    ("recovered", in_language(0.95, 4.0), "the **zero** is the worse"),
]
MEASURED = {row["id"]: row["measured"] for row in CLAIMS}
for name in measure.WORLDS:
    ratio = MEASURED["D4"]["toy data"][f"L0 Standard / Gated, {name}"]["mean"]
    wide = MEASURED["A9"]["toy data"][f"L0 Standard 1.5x / Gated, {name}"]["mean"]
    says = f"**{ratio:.1f} times**|Standard 1.5x: **{wide:.2f}**."
    SENTENCES.append(("frontier", RUNS, name, "Standard 1.5x", "nothing else", says))


@pytest.mark.parametrize("of", SENTENCES, ids=lambda of: of[0])
def test_a_sentence_quotes_its_numbers(of):
    name, *numbers, says = of
    sentence = getattr(explainer, f"{name}_sentence")(*numbers)
    for part in says.split("|"):
        assert part in sentence, part


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
    sentence = explainer.claims_sentence(CLAIMS)
    for kind in ("toy data", "language model"):
        own = {row["id"]: row["verdict"][kind] for row in CLAIMS if kind in row["verdict"]}
        agree = list(own.values()).count("agrees")
        assert f"**{agree} of {len(own)}** agree with the {kind}" in sentence
        for number, verdict in own.items():
            assert f"- **{number}** " in explainer.claims_list(CLAIMS, kind, verdict)


def test_sentences_on_the_language_model_quote_the_claims():
    rows, of = measure.read("language"), {n: m.get("language model") for n, m in MEASURED.items()}
    for (number, kind), what in itertools.product(
        (("D4", "Standard"), ("A9", "Standard 1.5x")), ("", ", equal CE")
    ):
        ratio = of[number][f"L0 {kind} / Gated{what}, language model"]["mean"]
        assert f"{ratio:.2f}" in explainer.language_sentence(rows)
    ratio = claims.shortly(of["G6"]["L0 aux unfrozen / Gated"])
    assert f"{ratio} times in section 10" in explainer.freezing_sentence(MEASURED["G6"])
    ratio = of["A1"]["L0 rescale & shift / Gated, equal CE"]["mean"]
    said = explainer.why_gate_sentence([*RUNS, *rows])
    assert f"{ratio:.2f} times in the model of section 10, at equal prediction: a repair" in said
