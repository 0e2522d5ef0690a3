"""The language model of language.py, the SAEs spliced into it, and what is said of them."""

import itertools
import math

import pytest
import torch

from gated_sae import StandardSAE, harvest, loss_recovered, splice
from results import language, measure

SAVED = measure.read("language")
READ, HELD_OUT = language.english()
IDS = HELD_OUT[:2048].view(-1, 128)


@pytest.fixture(scope="module")
def model():
    return language.trained_model(READ, steps=40)


# -- The text --------------------------------------------------------------------------------------


def test_the_text_is_english_and_what_is_held_out_has_not_been_read():
    read, held_out = (bytes(part.tolist()) for part in (READ, HELD_OUT))
    assert (read + held_out).count(b" the ") > 1000
    assert len(held_out) == pytest.approx(len(read) / 9, rel=1e-3)
    paragraphs = (read + held_out).split(b"\n\n")
    assert len(set(paragraphs)) == len(paragraphs)
    stretches = [held_out[i : i + 80] for i in range(0, len(held_out) - 80, 40)]
    assert sum(stretch in read for stretch in stretches) <= len(stretches) / 100


def test_stretches_are_consecutive_and_start_anywhere():
    drawn, other = (language.stretches(torch.arange(10), 4, 5, seed=seed) for seed in (0, 1))
    rows = torch.cat(list(itertools.islice(drawn, 20)))
    assert (rows.diff(dim=1) == 1).all()
    assert set(rows[:, 0].tolist()) == set(range(7))
    assert not torch.equal(rows[:5], next(other))


def test_guessing_knows_what_follows_only_by_pairs():
    """abcabc…: single bytes cost log 3, pairs next to nothing; bytes drawn evenly cost log 256."""
    text = torch.tensor([97, 98, 99]).repeat(50_000)
    guessed = language.guessing(text, text[:1000])
    assert guessed["unigram"] == pytest.approx(math.log(3), abs=0.01)
    assert 0 < guessed["bigram"] < 0.01
    even = torch.randint(256, (100_000,), generator=torch.Generator().manual_seed(0))
    unigram = language.guessing(even[:-1000], even[-1000:])["unigram"]
    assert unigram == pytest.approx(math.log(256), abs=0.02)


# -- The model -------------------------------------------------------------------------------------


def test_a_seed_decides_the_model_and_the_global_generator_is_left_alone():
    weights = []
    with torch.random.fork_rng(devices=[]):
        for number, seed in enumerate((0, 0, 1)):
            before = torch.manual_seed(100 + number).get_state()
            weights.append(language.trained_model(READ, 2, seed).state_dict())
            assert torch.equal(torch.get_rng_state(), before)
    first, again, other = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mlp.2.weight"], other["mlp.2.weight"])


@pytest.mark.parametrize("changed", [1, 64, 127])
def test_a_later_byte_never_changes_an_earlier_logit(model, changed):
    logits, other = model(IDS), IDS.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    moved = (model(other) - logits).abs().amax((0, 2))
    assert (moved[:changed] == 0).all()
    assert (moved[changed:] > 0).all()


def test_cross_entropy_is_of_the_next_byte_and_a_few_steps_beat_equal_odds(model):
    log_p, found = model(IDS).log_softmax(-1), language.cross_entropy(model, IDS)
    each = [log_p[i, j, IDS[i, j + 1]] for i in range(len(IDS)) for j in range(127)]
    assert found.item() == pytest.approx(-sum(each).item() / len(each), rel=1e-5)
    assert found < math.log(256) - 1
    assert not any(p.requires_grad for p in model.parameters())


def test_an_sae_that_reproduces_the_mlp_costs_nothing(model):
    """x = ReLU(x) - ReLU(-x): no reconstruction error, so no rise of CE; x̂ = 0 is zero ablation."""
    eye, sae = torch.eye(128), StandardSAE(128, 256)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    (x,) = harvest(model, model.mlp, [IDS])
    assert x.shape == (IDS.numel(), 128)
    torch.testing.assert_close(sae(x), x, rtol=1e-5, atol=1e-6)

    def spliced(put):
        with splice(model.mlp, put), torch.no_grad():
            return language.cross_entropy(model, IDS).item()

    clean, zero = language.cross_entropy(model, IDS).item(), spliced("zero")
    assert spliced(sae) == pytest.approx(clean, abs=1e-5)
    assert loss_recovered(spliced(sae), clean, zero) == pytest.approx(1, abs=1e-3)
    sae.W_dec.data.zero_()
    assert spliced(sae) == pytest.approx(zero, abs=1e-6) != pytest.approx(clean, abs=1e-3)


# -- The experiment --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found():
    """As committed, in small: few steps, two λ, narrow SAEs, little text held out."""
    with pytest.MonkeyPatch.context() as patched:
        small = {k: r._replace(d_sae=r.d_sae // 32) for k, r in language.SPLICED.items()}
        patched.setattr(language, "SPLICED", small)
        patched.setattr(language, "english", lambda: (READ, HELD_OUT[:2100]))
        found = language.experiment(40, 5, n_l1=2)
    assert len({row["ce"] for row in found["table"]} | {found["ce"]["zero"]}) == 7
    return found


def test_the_committed_results_are_of_this_experiment(found):
    """Its model beats guessing by far; more penalty is fewer latents and a worse CE."""
    assert set(SAVED) == set(found)
    assert set(SAVED["ce"]) == set(found["ce"])
    assert all(set(row) == set(found["table"][0]) for row in SAVED["table"] + found["table"])
    for name, recipe in language.SPLICED.items():
        own = [row for row in SAVED["table"] if row["variant"] == name]
        assert {row["d_sae"] for row in own} == {recipe.d_sae}
        assert (own[0]["l1"], own[-1]["l1"]) == recipe.span
        for less, more in itertools.pairwise(own):
            assert less["l0"] > more["l0"]
            assert less["ce"] < more["ce"]
    assert {row["variant"] for row in SAVED["table"]} == set(language.SPLICED)
    assert (measure.RESULTS / "language.svg").read_text().startswith("<svg")
    ce = SAVED["ce"]
    assert ce["clean"] < 0.7 * ce["bigram"] < 0.7 * ce["unigram"] < 0.7 * math.log(256)


def test_loss_recovered_follows_from_the_ce_beside_it(found):
    for measured, ablated in itertools.product((SAVED, found), ("zero", "mean")):
        clean, worst = (measured["ce"][key] for key in ("clean", ablated))
        assert clean < worst
        for row in measured["table"]:
            expected = (worst - row["ce"]) / (worst - clean)
            assert row[f"recovered_{ablated}"] == pytest.approx(expected, abs=1e-3)


# -- What is said of it ----------------------------------------------------------------------------


def made_up(*factors):
    """CE = clean + c / L0, a c for each kind: so every interpolation has a known answer."""
    table = [
        {"variant": v, "l1": added, "l0": c / added, "gamma": 1.0, "fvu": 0.5, "ce": 1 + added}
        for v, c in zip(("Standard", "Gated", "Standard 1.5x"), factors, strict=False)
        for added in (0.01, 0.03, 0.3)
    ]
    return {"ce": {"clean": 1.0, "zero": 3.0, "mean": 2.0}, "table": table}


def test_the_comparison_is_at_equal_ce():
    rows = language.comparison(made_up(2.0, 1.0, 1.5))
    assert [row["recovered, mean"] for row in rows] == [0.8, 0.9, 0.95, 0.98]
    for row in rows:
        allowed = 1 - row["recovered, mean"]
        assert (row["CE"], row["recovered, zero"]) == pytest.approx((1 + allowed, 1 - allowed / 2))
        assert row["L0 Gated"] == pytest.approx(1 / allowed, abs=0.01)
        assert (row["γ Gated"], row["FVU Standard"]) == (1.0, 0.5)
        assert (row["Standard / Gated"], row["Standard 1.5x / Gated"]) == (2.0, 1.5)
    assert language.comparison(made_up(1.0, 2.0)) == []  # there is no third kind


@pytest.mark.parametrize(
    ("factors", "last", "said"),
    [
        ((2.0, 1.0, 1.5), 1, "Standard has 2.00 to 2.00 times its L0 (Gated is ahead)"),
        ((1.0, 2.0, 1.5), 1, "Standard has 0.50 to 0.50 times its L0 (Gated is behind)"),
        ((2.0, 1.0, 1.5), 1 / 4, "0.64 to 2.00 times its L0 (neither is ahead at every level)"),
        ((1.0, 2.0), 1, "cannot be compared"),
    ],
)
def test_the_sentence_says_who_is_ahead(factors, last, said):
    """In the fifth row Standard is ahead where CE rises by 0.3, not where by 0.01 to 0.03."""
    measured = made_up(*factors)
    measured["table"][2]["l0"] *= last
    assert said in language.verdict(measured)
