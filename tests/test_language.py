"""The language model of language.py, the SAEs spliced into it, and what is said of them."""

import itertools
import math

import pytest
import torch

from gated_sae import StandardSAE, harvest
from results import language, measure

SAVED = {name: measure.read(name) for name in ("language", "models", "smaller")}
READ, HELD_OUT = language.english()
IDS = HELD_OUT[:2048].view(-1, 128)


@pytest.fixture(scope="module")
def source():
    """Two models that have read next to nothing, and little text."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(language, "english", lambda: (READ[:50_000], HELD_OUT[:2100]))
        return language.Model(seeds=2, steps=40)


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
    assert not torch.equal(first["layer.linear2.weight"], other["layer.linear2.weight"])


@pytest.mark.parametrize("changed", [1, 64, 127])
def test_a_later_byte_never_changes_an_earlier_logit(source, changed):
    model, other = source.models[0], IDS.clone()
    other[:, changed] = (other[:, changed] + 1) % 256
    moved = (model(other) - model(IDS)).abs().amax((0, 2))
    assert (moved[:changed] == 0).all()
    assert (moved[changed:] > 0).all()


def test_cross_entropy_is_of_the_next_byte_and_a_few_steps_beat_equal_odds(source):
    model = source.models[0]
    log_p, found = model(IDS).log_softmax(-1), language.cross_entropy(model, IDS)
    each = [log_p[i, j, IDS[i, j + 1]] for i in range(len(IDS)) for j in range(127)]
    assert found.item() == pytest.approx(-sum(each).item() / len(each), rel=1e-5)
    assert found < math.log(256) - 1
    assert not any(p.requires_grad for p in model.parameters())


def test_a_smaller_model_is_narrower_and_reads_less():
    model = language.trained_model(READ, 2, d_model=16)
    assert model(IDS[:1]).shape == (1, 128, 256)
    assert sum(p.numel() for p in model.parameters()) == SAVED["smaller"][0]["parameters"]


# -- What SAEs see of it, and what is committed ----------------------------------------------------


def test_rows_are_of_each_model_and_of_variance_d_in(source):
    x = next(source.stream(0, batch=64, copies=(3,)))
    assert x.shape == (2, 3, 64, 128)
    assert torch.equal(x[:, 0], x[:, 2])
    assert not torch.equal(x[0], x[1])
    for rows, c in zip(*source.scaled, strict=True):
        assert len(rows) == 50_000 // 128 * 128
        assert rows.var(0).sum().item() == pytest.approx(128)
        assert c > 0
    held_out = torch.cat(list(source.held_out((3,))), 2)
    assert held_out.shape == (2, 3, 2048, 128)
    (x,) = harvest(source.models[1], source.models[1].mlp, [HELD_OUT[:2048].view(-1, 128)])
    torch.testing.assert_close(held_out[1, 2], source.scaled[1][1] * x)


def test_scores_stand_between_x_and_what_takes_its_place(source):
    """A spliced SAE that gives back c x loses nothing, one that gives E x all there is to lose; and
    one that gives 0 is zero ablation."""
    eye, sae = torch.eye(128), StandardSAE(128, 256)
    sae.W_enc.data, sae.W_dec.data = torch.cat([eye, -eye], 1), torch.cat([eye, -eye])
    for seed, ce in enumerate(source.ce):
        assert source.scores(sae, seed)["lost"] == pytest.approx(0, abs=1e-4)
        dead = StandardSAE(128, 1)
        dead.b_enc.data.fill_(-1e9)
        assert source.scores(dead, seed)["ce"] == pytest.approx(ce["zero"], abs=2e-5)
        assert min(ce["zero"], ce["mean"]) > ce["clean"] + 0.05
        dead.b_dec.data.copy_(source.scaled[1][seed] * source.x[seed].mean(0))
        scores = source.scores(dead, seed)
        assert (scores["lost"], scores["ce"]) == pytest.approx((1, ce["mean"]), abs=1e-4)


def test_smaller_models_are_worse_by_a_falling_curve():
    """D2: as committed, the same sizes for each seed, over a factor of compute of 30 at least."""
    for seed in {row["seed"] for row in SAVED["models"]}:
        rows = [row for row in SAVED["smaller"] if row["seed"] == seed]
        assert [row["d_model"] for row in rows] == [*language.SIZES, 128]
        assert rows[-1]["compute"] > 30 * rows[0]["compute"]
        assert all(row["compute"] == 6 * row["parameters"] * row["bytes"] for row in rows)
        assert all(a["ce"] > b["ce"] for a, b in itertools.pairwise(rows))
        assert rows[-1]["ce"] == SAVED["models"][seed]["clean"]


def test_more_penalty_is_fewer_latents_and_a_worse_ce_as_committed():
    ce = {row["seed"]: row for row in SAVED["models"]}
    for variant, seed in itertools.product(("Standard", "Standard 1.5x", "Gated"), ce):
        at = (variant, seed)
        own = [row for row in SAVED["language"] if (row["variant"], row["seed"]) == at]
        assert len(own) >= 4
        for less, more in itertools.pairwise(own):
            assert less["l1"] < more["l1"]
            assert less["l0"] > more["l0"]
            assert less["ce"] < more["ce"]
        for row in own:
            lost = (row["ce"] - ce[seed]["clean"]) / (ce[seed]["mean"] - ce[seed]["clean"])
            assert row["lost"] == pytest.approx(lost, abs=1e-3)
