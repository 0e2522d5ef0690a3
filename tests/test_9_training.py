"""Section 9: the training loop, and what it shows of shrinkage and of dying gates."""

import inspect
import itertools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_saes import (
    SCALING,
    VARIANTS,
    assert_equal,
    random_batch,
    random_sae,
    seeds,
    sizes,
    variants,
)
from torch.nn import functional as F

import gated_sae
from gated_sae import (
    GatedSAE,
    StandardSAE,
    Trainer,
    evaluate,
    resample,
    rescale_and_shift,
    train,
)
from toy_data import SuperpositionData

DATA = SuperpositionData(8, 16, firing=0.1, seed=3)


def trained(sae, *, data=DATA, seed=0, batch=64, **options):
    options = dict(l1=0.1, steps=20, lr=1e-2, device="cpu") | options
    records = list(train(sae, data.batches(batch, seed), **options))
    return sae, records


# -- What training shows ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy():
    """Both kinds over a range of λ, on 64 features in 32 dimensions, 3 active."""
    data = SuperpositionData(32, 64, firing=3 / 64)
    options = dict(data=data, batch=256, steps=1500, log_every=1500)
    standard, _ = trained(StandardSAE(32, 64, stack=3), l1=torch.tensor([0.2, 0.4, 0.8]), **options)
    l1 = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.8, 1.2])
    gated, _ = trained(GatedSAE(32, 64, stack=6), l1=l1, **options)
    held_out = list(itertools.islice(data.batches(1000, seed=99), 10))
    return evaluate(standard, held_out), evaluate(gated, held_out)


def test_standard_shrinks_and_gated_does_not(toy):
    """Margins: γ of Standard is 0.05 short of 1, and falls as λ rises; of Gated within 0.02."""
    standard, gated = toy
    assert (standard.gamma < 0.95).all()
    assert (standard.gamma.diff() < -0.03).all()
    assert ((gated.gamma - 1).abs() < 0.02).all()


def test_the_norm_ratio_of_an_unbiased_sae_is_below_one(toy):
    """S7 on a trained SAE: γ near 1, and yet the plain norm ratio would report shrinkage.

    That is 1 - norm ratio = FVU at γ = 1 (and E x = 0): half of it at least.
    """
    _, gated = toy
    assert (1 - gated.norm_ratio > gated.fvu / 2).all()
    assert_equal(gated.norm_ratio, gated.cosine_squared, rtol=0.03, atol=0)


def test_gated_needs_fewer_latents_for_the_same_error(toy):
    """Each Standard SAE is beaten by a Gated one that has less error with 10% fewer latents."""
    standard, gated = toy
    for fvu, l0 in zip(standard.fvu, standard.l0, strict=True):
        assert ((gated.fvu < fvu) & (gated.l0 < 0.9 * l0)).any()


@pytest.mark.parametrize("tied", [True, False])
def test_without_aux_the_gates_die_and_with_it_they_live(tied):
    """G2: nothing raises b_gate. Margins: under 1/100 of the latents fire that do with aux."""
    options = dict(steps=1500, l1=0.1, lr=1e-2, log_every=1500)
    held_out = list(itertools.islice(DATA.batches(1000, seed=99), 10))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # γ of a dead SAE is undefined, and says so
        dying, records = trained(GatedSAE(8, 16, tied=tied, aux=None), **options)
        dead = evaluate(dying, held_out)
    alive = evaluate(trained(GatedSAE(8, 16, tied=tied), **options)[0], held_out)
    assert records[0].metrics.l0 > 1
    assert alive.l0 > 3
    assert dead.l0 < alive.l0 / 100
    assert alive.fvu < 0.01
    assert dead.fvu > 0.9


# -- The loop, against a plain one -----------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_loop_is_project_step_renormalise(variant):
    """Five steps by hand, with schedules written out and every operation in its place."""
    steps, lr, l1, warm, fall = 5, 1e-2, 0.3, 2, 2
    sae, expected = (random_sae(variant, (8, 16), 0) for _ in range(2))
    batches = [x.double() for x in itertools.islice(DATA.batches(32, seed=0), steps)]
    ramps = dict(lr_warmup=0.4, l1_warmup=0.4, lr_decay=0.4)
    for _ in train(
        sae, batches, l1=l1, steps=steps, lr=lr, betas=(0.5, 0.9), device="cpu", **ramps
    ):
        pass

    optimizer = torch.optim.Adam(expected.parameters(), betas=(0.5, 0.9))
    for step, x in enumerate(batches, start=1):
        optimizer.param_groups[0]["lr"] = lr * min(1, step / warm, (steps + 1 - step) / fall)
        optimizer.zero_grad()
        expected.losses(x).total(l1 * min(1, step / warm)).backward()
        W = expected.W_dec
        if expected.unit_norm:
            W.grad = W.grad - (W.grad * W.data).sum(1, keepdim=True) * W.data
        optimizer.step()
        if expected.unit_norm:
            W.data = W.data / W.data.norm(dim=1, keepdim=True)
    assert_equal(dict(sae.state_dict()), dict(expected.state_dict()))
    assert_equal(((sae.W_dec.norm(dim=-1) - 1).abs() < 1e-9).all().item(), expected.unit_norm)


@settings(max_examples=5)
@given(variants, seeds)
def test_a_stack_trains_as_its_members_do(variant, seed):
    """One λ for each member, one shared stream of batches."""
    stack = random_sae(variant, (8, 16), seed, stack=(2,))
    singles = [random_sae(variant, (8, 16), seed) for _ in range(2)]
    for i, single in enumerate(singles):
        single.load_state_dict({name: value[i] for name, value in stack.state_dict().items()})
    batches = [x.double() for x in itertools.islice(DATA.batches(32, seed=0), 10)]
    options = dict(steps=10, lr=1e-2, device="cpu")
    list(train(stack, batches, l1=torch.tensor([0.1, 0.8]), **options))
    for i, (single, l1) in enumerate(zip(singles, (0.1, 0.8), strict=True)):
        list(train(single, batches, l1=l1, **options))
        own = {name: value[i] for name, value in stack.state_dict().items()}
        assert_equal(own, dict(single.state_dict()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seeds_give_the_same_bits_whatever_the_global_seed(variant):
    def run(global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        sae, records = trained(VARIANTS[variant](8, 16))
        assert torch.equal(before, torch.get_rng_state())
        return dict(sae.state_dict()), records[-1].losses

    (a, a_losses), (b, b_losses) = run(0), run(12345)
    assert_equal(a, b, rtol=0, atol=0)
    assert_equal(a_losses, b_losses, rtol=0, atol=0)


def test_other_seeds_give_other_results():
    (a, _), (b, _) = trained(GatedSAE(8, 16), seed=0), trained(GatedSAE(8, 16), seed=1)
    assert not torch.equal(a.W_dec, b.W_dec)


# -- A8: resampling --------------------------------------------------------------------------------

LATENT_AXIS = {"W_enc": -1, "W_mag": -1, "W_dec": -2}  # of the others, which have b_dec aside: -1


def of_latent(name, tensor):
    """With the latents as the last dimension."""
    return tensor.movedim(LATENT_AXIS.get(name, -1), -1)


def some_dead(sae, seed):
    """A random mask, an optimiser with moments from a step on random data, and that data."""
    x = random_batch(7, sae.d_in, seed=seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.5, 0.9))
    sae.losses(x).total(0.5).sum().backward()
    optimizer.step()
    generator = torch.Generator().manual_seed(seed)
    dead = torch.rand(*sae.stack, sae.d_sae, generator=generator) < 0.5
    return dead, x, optimizer


@example("gated untied", (3, 4), 0, ())
@example("jumprelu", (3, 4), 0, ())
@given(variants, sizes, seeds, st.sampled_from([(), (2, 3)]))
def test_only_the_dead_are_resampled_and_all_of_them(variant, size, seed, stack):
    """The living and b_dec keep their bits, in the optimiser too; the dead start over in both."""
    sae = random_sae(variant, size, seed, stack=stack)
    dead, x, optimizer = some_dead(sae, seed)
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    moments = ("exp_avg", "exp_avg_sq")
    kept = {n: [optimizer.state[p][m].clone() for m in moments] for n, p in sae.named_parameters()}
    resample(sae, dead, x, torch.Generator().manual_seed(seed), optimizer)
    for name, value in sae.named_parameters():
        held = [optimizer.state[value][moment] for moment in moments]
        assert optimizer.state[value]["step"] == 1
        if name == "b_dec":
            assert_equal([value, *held], [before[name], *kept[name]], rtol=0, atol=0)
            continue
        mask = dead.unsqueeze(-2) if name in LATENT_AXIS else dead
        for now, was in zip([value, *held], [before[name], *kept[name]], strict=True):
            alive = ~mask.expand_as(of_latent(name, now))
            assert torch.equal(of_latent(name, now)[alive], of_latent(name, was)[alive])
        average, average_sq = (of_latent(name, moment) for moment in held)
        assert (average[~alive] == 0).all()
        for member in itertools.product(*map(range, stack)):  # the mean of each SAE's own living
            here, fresh = alive[member], average_sq[member]
            mean = fresh[here].mean() if here.any() else torch.tensor(0.0)
            assert_equal(fresh[~here], mean.expand(int((~here).sum())).to(fresh))
        if name not in LATENT_AXIS:
            start = torch.tensor(sae.latent_vectors.get(name, 0.0))  # that of r_mag is 0
            assert (value[dead].float() == start).all()


@example("gated untied", (3, 4), 0, False)
@given(variants, sizes, seeds, st.booleans())
def test_the_dead_restart_at_the_worst_row_seen_from_b_dec(variant, size, seed, shared):
    """One in each member, at its own row, so much the worst that no other is drawn."""
    sae = random_sae(variant, size, seed, stack=(2, 3))
    generator = torch.Generator().manual_seed(seed)
    dead = torch.randint(size[1], (2, 3), generator=generator)
    mask = F.one_hot(dead, size[1]).bool()
    x = random_batch(*(() if shared else (2, 3)), 7, size[0], seed=seed)
    x[..., 3, :] *= 1e6
    if not shared:
        x[1] = x[1].roll(1, dims=-2)  # row 4 in these members
    norms = sae.W_enc.detach().norm(dim=-2).masked_fill(mask, torch.nan)
    norms = 0.2 * norms.nanmean(-1).nan_to_num(1)  # 0.2 where it was the only latent
    resample(sae, mask, x, generator)
    for i in itertools.product(range(2), range(3)):
        worst = x[3] if shared else x[i][3 + i[0]]
        d = F.normalize(worst - sae.b_dec[i].detach(), dim=0)
        assert_equal(sae.W_dec[i][dead[i]], d)
        assert_equal(sae.W_enc[i][:, dead[i]], norms[i] * d)
        if hasattr(sae, "W_mag"):
            assert_equal(sae.W_mag[i][:, dead[i]], norms[i] * d)


@given(variants, sizes, seeds)
def test_a_stack_is_resampled_as_its_members_are(variant, size, seed):
    """On one row, where there is nothing to draw."""
    stack = random_sae(variant, size, seed, stack=(2,))
    dead, x, _ = some_dead(stack, seed)
    singles = [random_sae(variant, size, seed) for _ in range(2)]
    for i, single in enumerate(singles):
        single.load_state_dict({name: value[i] for name, value in stack.state_dict().items()})
    resample(stack, dead, x[:1], torch.Generator())
    for i, single in enumerate(singles):
        resample(single, dead[i], x[:1], torch.Generator())
        own = {name: value[i] for name, value in stack.state_dict().items()}
        assert_equal(own, dict(single.state_dict()))


def test_rows_are_drawn_by_their_squared_error_squared():
    """x̂ = 0, so rows of norms 1 and 2 are drawn 1 : 16, seen to four standard deviations."""
    n = 20_000  # members, of one latent each
    sae = StandardSAE(2, 1, stack=n)
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    resample(sae, torch.ones(n, 1, dtype=torch.bool), x, torch.Generator().manual_seed(0))
    assert (sae.W_dec[..., 0] == 1).double().mean().item() == pytest.approx(1 / 17, abs=0.0067)


@given(variants, sizes, seeds)
def test_resampling_draws_from_its_generator_alone(variant, size, seed):
    def resampled(global_seed):
        torch.manual_seed(global_seed)
        sae = random_sae(variant, size, seed)
        dead, x, optimizer = some_dead(sae, seed)
        before = torch.get_rng_state()
        resample(sae, dead, x, torch.Generator().manual_seed(seed), optimizer)
        assert torch.equal(before, torch.get_rng_state())
        return dict(sae.state_dict())

    assert_equal(resampled(0), resampled(1), rtol=0, atol=0)


def half_killed(make, **options):
    sae = make(8, 16, **options)
    with torch.no_grad():
        bias = sae.b_enc if hasattr(sae, "b_enc") else sae.b_gate
        bias[..., 8:] = -1e3
    return sae


@pytest.mark.parametrize("variant", ["standard", "gated", "gated untied", "gated natural"])
def test_resampling_revives_the_dead(variant):
    """A8, in four worlds from half the latents dead: one of 20 at most, and 0.75 of the FVU."""
    worlds = [SuperpositionData(8, 16, firing=0.1, seed=seed) for seed in (3, 4, 5, 6)]

    def batches(size, seed):
        return map(torch.stack, zip(*(world.batches(size, seed) for world in worlds), strict=True))

    held_out = list(itertools.islice(batches(1000, 99), 10))
    options = dict(data=SimpleNamespace(batches=batches), steps=600, log_every=600)
    left, revived = (
        evaluate(
            trained(half_killed(VARIANTS[variant], stack=4), resample_every=every, **options)[0],
            held_out,
        )
        for every in (None, 100)
    )
    assert (left.dead_fraction == 0.5).all()
    assert revived.dead_fraction.mean() < 0.05
    assert (revived.fvu / left.fvu).mean() < 0.75


def test_who_was_silent_in_every_step_since_the_last_time_is_resampled(monkeypatch):
    """In steps of no size, against a count by hand; never after the last step; f of each step."""
    sae = GatedSAE(8, 16, stack=2)
    with torch.no_grad():
        sae.b_gate.copy_(torch.linspace(-2, 0, 32).view(2, 16))
    batches = list(itertools.islice(DATA.batches(4, seed=0), 9))
    fires = torch.stack([(sae.encode(x) > 0).any(-2) for x in batches])  # (step, *stack, d_sae)
    calls = []

    def resample(sae, dead, x, generator, optimizer, sparse):
        assert torch.equal(x, batches[3 * len(calls) + 2])
        assert optimizer.state[sae.W_enc]["step"] == 3 * len(calls) + 3
        calls.append(dead.clone())

    monkeypatch.setattr(gated_sae, "resample", resample)
    options = dict(l1=0.0, steps=9, lr=1e-12, device="cpu")
    list(train(sae, batches, resample_every=3, **options))
    assert_equal(torch.stack(calls), ~torch.stack([fires[:3].any(0), fires[3:6].any(0)]))
    assert all(dead.any() and not dead.all() for dead in calls)
    assert not torch.equal(*calls)
    calls.clear()
    list(train(sae, batches, **options))
    assert not calls


@pytest.mark.parametrize("stack", [(), (2,)])
def test_the_same_dead_are_revived_the_same_way(stack):
    """With one seed of its own, whatever the global one; and the decoder's rows keep norm 1."""

    def run(global_seed):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        sae = GatedSAE(8, 16, stack=stack)
        with torch.no_grad():
            sae.b_gate[..., 8:] = -1e3
        trained(sae, steps=30, resample_every=10)
        assert torch.equal(before, torch.get_rng_state())
        assert (sae.b_gate > -1e2).all()
        assert_equal(sae.W_dec.norm(dim=-1), torch.ones(*stack, 16))
        return dict(sae.state_dict())

    assert_equal(run(0), run(1), rtol=0, atol=0)


def test_a_float64_latent_restarts_where_it_started():
    sae = random_sae("jumprelu", (4, 6), 0)
    dead, x, _ = some_dead(sae, 0)
    resample(sae, dead, x, torch.Generator())
    assert (sae.threshold[dead] == 0.1).all()


@pytest.mark.parametrize(("batch", "d_sae"), [(50, 6), (8, 8), (10, 40)])
def test_no_two_restart_at_one_row_while_there_are_others(batch, d_sae):
    """They would stay the same for ever. Six, or eight, of the latents are dead."""
    sae = random_sae("standard", (4, d_sae), 0, stack=2)
    dead = torch.zeros(2, d_sae, dtype=torch.bool)
    dead[..., -8:] = True
    resample(sae, dead, random_batch(batch, 4, seed=0), torch.Generator().manual_seed(0))
    for W_dec in sae.W_dec:
        assert len(W_dec.unique(dim=0)) == d_sae


def test_more_dead_than_rows_share_them():
    sae = random_sae("standard", (4, 8), 0)
    x = random_batch(3, 4, seed=0)
    resample(sae, torch.ones(8, dtype=torch.bool), x, torch.Generator().manual_seed(0))
    at = F.normalize(x - sae.b_dec.detach(), dim=-1)
    assert ((sae.W_dec.unsqueeze(1) - at).norm(dim=-1).min(1).values < 1e-9).all()


def test_resampling_leaves_frozen_parameters():
    sae = random_sae("gated", (4, 6), 0)
    before = sae.W_enc.requires_grad_(False).clone()
    resample(sae, torch.ones(6, dtype=torch.bool), random_batch(9, 4, seed=0), torch.Generator())
    assert_equal(sae.W_enc.detach(), before, rtol=0, atol=0)


def test_resampling_does_not_see_the_scale_of_x():
    """x̂ = 0, and of two rows one is ten times as long: 1 : 10⁴, for members from 1e-12 to 1e12."""
    sae = StandardSAE(2, 1, stack=25)
    with torch.no_grad():
        sae.b_enc.fill_(-1e30)
    x = torch.logspace(-12, 12, 25)[:, None, None] * torch.tensor([[1.0, 0.0], [0.0, 10.0]])
    resample(sae, torch.ones(25, 1, dtype=torch.bool), x, torch.Generator().manual_seed(0))
    assert (sae.W_dec[..., 1] == 1).all()


# -- Records ---------------------------------------------------------------------------------------


def test_records_come_at_the_first_step_the_cadence_and_the_last():
    _, records = trained(GatedSAE(8, 16), steps=25, log_every=10)
    assert [record.step for record in records] == [1, 10, 20, 25]


def test_records_say_what_was_lowered_and_what_came_of_it():
    sae = GatedSAE(8, 16, stack=2)
    x = next(DATA.batches(64, seed=0))
    before = sae.losses(x)
    (record,) = train(sae, [x], l1=torch.tensor([0.1, 0.2]), steps=1, lr=1e-2, device="cpu")
    assert_equal(
        record.losses, before._replace(**{k: v.detach() for k, v in before._asdict().items()})
    )
    assert not any(term.requires_grad for term in record.losses)
    assert_equal(record.metrics.fvu, evaluate(sae, [x]).fvu)
    assert_equal(record.l1, torch.tensor([0.1, 0.2]))
    assert record.lr == 1e-2


def test_schedules_rise_from_zero_and_the_rate_falls_again():
    _, records = trained(GatedSAE(8, 16), steps=100, log_every=1, lr=1.0e-2, l1=2.0)
    lrs, l1s = [r.lr for r in records], [r.l1.item() for r in records]
    assert lrs[:10] == pytest.approx([1e-3 * k for k in range(1, 11)])
    assert lrs[10:80] == pytest.approx([1e-2] * 70)
    assert lrs[80:] == pytest.approx([1e-2 * (20 - k) / 20 for k in range(20)])
    assert l1s == pytest.approx([min(2.0, 0.2 * k) for k in range(1, 101)])


def test_whoever_stops_iterating_stops_the_training():
    drawn = 0

    def counted():
        nonlocal drawn
        for x in DATA.batches(32, seed=0):
            drawn += 1
            yield x

    run = train(GatedSAE(8, 16), counted(), l1=0.1, steps=100, log_every=10, device="cpu")
    assert drawn == 0
    assert next(run).step == 1
    assert next(run).step == 10
    assert drawn == 10
    run.close()
    assert drawn == 10


def test_training_takes_exactly_its_steps_from_the_batches():
    batches = DATA.batches(32, seed=0)
    list(train(GatedSAE(8, 16), batches, l1=0.1, steps=7, device="cpu"))
    eighth = next(itertools.islice(DATA.batches(32, seed=0), 7, None))
    assert torch.equal(next(batches), eighth)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in SCALING])
def test_a_decoder_from_elsewhere_is_refused_or_the_function_kept(variant):
    sae = random_sae(variant, (8, 16), 0)
    with torch.no_grad():
        sae.W_dec *= 2
    x = next(DATA.batches(64, seed=0)).double()
    before = sae(x)
    try:
        list(train(sae, [x], l1=0.1, steps=1, lr=1e-12, device="cpu"))
    except ValueError:
        return
    assert_equal(sae(x), before)


@pytest.mark.parametrize("variant", SCALING)
def test_a_decoder_from_elsewhere_is_folded_and_the_function_kept(variant):
    """Rows of norms 0.2 to 5: one step of no size changes nothing but their norms, if those."""
    sae = random_sae(variant, (8, 16), 0)
    norms = torch.linspace(0.2, 5, 16).double()
    with torch.no_grad():
        sae.W_dec *= (norms / sae.W_dec.norm(dim=-1))[:, None]
    x = next(DATA.batches(64, seed=0)).double()
    before = sae(x)
    list(train(sae, [x], l1=0.1, steps=1, lr=1e-12, device="cpu"))
    assert_equal(sae(x), before)
    assert_equal(sae.W_dec.norm(dim=-1), torch.ones(16).double() if sae.unit_norm else norms)


def test_the_model_that_makes_the_batches_is_not_trained():
    model = torch.nn.Linear(8, 8)
    batches = (model(x) for x in DATA.batches(32, seed=0))
    list(train(GatedSAE(8, 16), batches, l1=0.1, steps=2, device="cpu"))
    assert model.weight.grad is None


def test_training_works_where_gradients_are_switched_off():
    with torch.no_grad():
        switched_off, _ = trained(GatedSAE(8, 16))
    assert_equal(dict(switched_off.state_dict()), dict(trained(GatedSAE(8, 16))[0].state_dict()))


@pytest.mark.parametrize("frozen", ["W_dec", "W_enc", "b_dec", "r_mag"])
def test_frozen_parameters_stay(frozen):
    sae = GatedSAE(8, 16)
    before = getattr(sae, frozen).requires_grad_(False).clone()
    trained(sae)
    assert_equal(getattr(sae, frozen).detach(), before, rtol=0, atol=1e-6)


def test_without_gradients_there_is_no_training():
    with torch.inference_mode(), pytest.raises(ValueError, match="no gradients"):
        train(GatedSAE(8, 16), [], l1=0.1, steps=5, device="cpu")
    with pytest.raises(ValueError, match="no gradients"):
        train(GatedSAE(8, 16).requires_grad_(False), [], l1=0.1, steps=5, device="cpu")


def test_the_callers_batches_are_made_with_the_callers_gradients():
    """A model that is read under no_grad must not build its graph at every step."""
    model = torch.nn.Linear(8, 8)
    tracked = []

    def batches():
        for x in DATA.batches(32, seed=0):
            y = model(x)
            tracked.append(y.requires_grad)
            yield y

    with torch.no_grad():
        list(train(GatedSAE(8, 16), batches(), l1=0.1, steps=3, device="cpu"))
    assert tracked == [False] * 3


def test_half_precision_is_refused_with_advice():
    with pytest.raises(TypeError, match=r"bfloat16, expected float32: train, then convert"):
        train(GatedSAE(8, 16, dtype=torch.bfloat16), [], l1=0.1, steps=5, device="cpu")


def test_betas_are_refused_at_once():
    with pytest.raises(ValueError, match="beta"):
        train(GatedSAE(8, 16), [], l1=0.1, steps=5, betas=(1.5, 0.9), device="cpu")


# -- Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_bad_batch_stops_training_and_leaves_the_parameters(variant, bad):
    batches = list(itertools.islice(DATA.batches(32, seed=0), 5))
    batches[3][7, 2] = bad
    sae, until = VARIANTS[variant](8, 16), VARIANTS[variant](8, 16)
    options = dict(l1=0.1, lr=1e-2, device="cpu", lr_decay=0.0)
    with pytest.raises(ValueError, match="step 4: NaN or infinity in 1 of 32 rows, first in row 7"):
        list(train(sae, batches, steps=5, **options))
    list(train(until, batches[:3], steps=3, **options))
    assert_equal(dict(sae.state_dict()), dict(until.state_dict()), rtol=0, atol=0)


def test_a_loss_that_overflows_stops_training():
    batches = [next(DATA.batches(4, seed=0)), torch.full((4, 8), 1e30)]
    sae = GatedSAE(8, 16)
    with pytest.raises(ValueError, match="step 2: the loss is inf"):
        list(train(sae, batches, l1=0.1, steps=2, device="cpu"))
    assert all(p.isfinite().all() for p in sae.parameters())


def test_batches_that_end_early_are_counted_and_the_training_kept():
    sae, fresh = GatedSAE(8, 16), GatedSAE(8, 16)
    batches = itertools.islice(DATA.batches(32, seed=0), 3)
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        list(train(sae, batches, l1=0.1, steps=5, device="cpu"))
    assert not torch.equal(sae.W_enc, fresh.W_enc)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": -3}, "steps is -3"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"log_every": 0}, "log_every is 0"),
        ({"resample_every": 0}, "resample_every is 0"),
        ({"resample_every": -1}, "resample_every is -1"),
        ({"resample_every": 1.5}, "resample_every is 1.5"),
        ({"resample_every": True}, "resample_every is True"),
        ({"l1": -0.1}, "l1 is -0.1"),
        ({"l1": math.nan}, "l1 is nan"),
        ({"l1": math.inf}, "l1 is inf"),
        ({"l1": torch.tensor([0.1, 0.2])}, r"shape \(\) or \(3,\)"),
        ({"l1": torch.tensor([0.1, 0.2, -1.0])}, r"l1 is \["),
        ({"lr": 0.0}, "lr is 0.0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr_warmup": 1.5}, r"\(1.5, 0.1, 0.2\), expected shares"),
    ],
)
def test_bad_arguments_are_named_at_the_call(options, says):
    """At the call, not when the generator is first asked."""
    options = dict(l1=0.1, steps=5, device="cpu") | options
    with pytest.raises(ValueError, match=says):
        train(GatedSAE(8, 16, stack=3), DATA.batches(32, seed=0), **options)


def test_a_bad_batch_is_named_by_its_number():
    batches = [next(DATA.batches(4, seed=0)), torch.ones(4, 7)]
    with pytest.raises(ValueError, match=r"batch 1: x is \(4, 7\)"):
        list(train(GatedSAE(8, 16), batches, l1=0.1, steps=2, device="cpu"))


@settings(max_examples=10)
@given(variants, st.integers(1, 2), st.integers(1, 2), seeds)
def test_the_smallest_saes_and_empty_data_train_without_a_nan(variant, d_in, d_sae, seed):
    sae = random_sae(variant, (d_in, d_sae), seed)
    with torch.no_grad():
        sae.W_dec[0] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        list(train(sae, [torch.zeros(3, d_in)] * 5, l1=0.1, steps=5, lr=0.1, device="cpu"))
    assert all(p.isfinite().all() for p in sae.parameters())


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_the_gpu_is_training_on_the_cpu(variant):
    batches = [x.double() for x in itertools.islice(DATA.batches(32, seed=0), 10)]
    results = []
    for device in ("cpu", "cuda"):
        sae = random_sae(variant, (8, 16), 0, stack=(2,))
        list(train(sae, batches, l1=0.1, steps=10, lr=1e-2, device=device))
        results.append({name: value.cpu() for name, value in sae.state_dict().items()})
    assert_equal(*results)


def test_defaults_are_those_the_docstring_cites():
    defaults = {k: p.default for k, p in inspect.signature(Trainer).parameters.items()}
    assert (defaults["lr"], defaults["betas"]) == (3e-4, (0.0, 0.999))


def test_the_device_is_the_one_asked_for_or_the_accelerator_or_the_cpu(monkeypatch):
    """The meta device stands in for an accelerator; there it has no generators."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda *device: generator())
    cases = ("meta", "cpu", "cpu"), (None, None, "cpu"), ("meta", None, "meta")
    for found, device, used in cases:
        answer = found and torch.device(found)
        monkeypatch.setattr(
            torch.accelerator, "current_accelerator", lambda check_available, answer=answer: answer
        )
        sae = GatedSAE(8, 16, penalty="norm_frozen")  # no norm to look at
        train(sae, [], l1=0.1, steps=1, device=device)
        assert sae.W_dec.device.type == used


def test_a_trainer_takes_its_steps_and_no_more():
    trainer = Trainer(GatedSAE(8, 16), l1=0.1, steps=3, device="cpu")
    batches = list(itertools.islice(DATA.batches(16, seed=0), 3))
    records = [trainer.step(x) for x in batches]
    assert [record.step for record in records] == [1, 2, 3]
    assert trainer.done == 3
    with pytest.raises(ValueError, match="all 3 steps are done"):
        trainer.step(batches[0])
    sae = GatedSAE(8, 16)
    (*_, last) = train(sae, batches, l1=0.1, steps=3, device="cpu")
    assert_equal(dict(trainer.sae.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)
    assert_equal(last.losses, records[-1].losses, rtol=0, atol=0)


def test_a_frozen_decoder_cannot_be_resampled():
    sae = rescale_and_shift(StandardSAE(8, 16))
    with pytest.raises(ValueError, match="W_dec is frozen, expected resample_every=None"):
        Trainer(sae, l1=0.1, steps=3, device="cpu", resample_every=1)


def test_without_penalty_or_ramps_training_still_runs():
    ramps = dict(lr_warmup=0.0, l1_warmup=0.0, lr_decay=0.0)
    _, records = trained(GatedSAE(8, 16), l1=0.0, steps=3, log_every=1, **ramps)
    assert [record.lr for record in records] == [1e-2] * 3


def test_the_ramps_are_apart_and_the_lowest_counts():
    ramps = dict(lr_warmup=1.0, l1_warmup=0.5, lr_decay=1.0)
    _, records = trained(GatedSAE(8, 16), steps=4, log_every=1, lr=1.0e-2, l1=1.0, **ramps)
    assert [record.lr for record in records] == pytest.approx([0.0025, 0.005, 0.005, 0.0025])
    assert [record.l1.item() for record in records] == pytest.approx([0.5, 1, 1, 1])


@pytest.mark.parametrize("name", ["lr_warmup", "l1_warmup", "lr_decay"])
def test_each_share_is_checked(name):
    with pytest.raises(ValueError, match="expected shares"):
        train(GatedSAE(8, 16), [], l1=0.1, steps=5, **{name: -0.1})


def test_an_infinite_rate_is_refused():
    with pytest.raises(ValueError, match="lr is inf"):
        train(GatedSAE(8, 16), [], l1=0.1, steps=5, lr=math.inf)


def test_one_bad_member_stops_the_stack():
    batches = torch.stack([next(DATA.batches(32, seed=s)) for s in (0, 1)])
    batches[1, 3, 0] = math.nan
    with pytest.raises(
        ValueError, match="step 1: NaN or infinity in 1 of 64 rows, first in row 35"
    ):
        list(train(GatedSAE(8, 16, stack=2), [batches], l1=0.1, steps=1, device="cpu"))
