"""Section 9: the training loop, and what it shows of shrinkage and of dying gates."""

import copy
import itertools
import math
from contextlib import nullcontext
from functools import partial

import pytest
import random_saes
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, random_batch, random_sae, seeds, sizes, variants
from torch import nn
from torch.nn import functional as F

import gated_sae
from gated_sae import GatedSAE, Losses, StandardSAE, Trainer, evaluate, resample, train
from toy_data import SuperpositionData

DATA = SuperpositionData(8, 16, firing=0.1, seed=3)


def some_batches(n, rows=32, data=DATA, seed=0):
    return list(itertools.islice(data.batches(rows, seed), n))


def trained(sae, batches=None, *, seed=0, **options):
    """An SAE after training, and the records: on all of some batches, or on 20 of DATA."""
    steps = len(batches) if isinstance(batches, list) else 20
    options = dict(l1=0.1, lr=1e-2, device="cpu", steps=steps) | options
    return sae, list(train(sae, batches or DATA.batches(64, seed), **options))


# -- What training shows ---------------------------------------------------------------------------


def test_gated_neither_shrinks_nor_needs_as_many_latents():
    """Both kinds over a range of λ, on 64 features in 32 dimensions, 3 active."""
    data, metrics = SuperpositionData(32, 64, firing=3 / 64), []
    for make, l1 in ((StandardSAE, (0.2, 0.4, 0.8)), (GatedSAE, (0.3, 0.4, 0.5, 0.6, 0.8, 1.2))):
        options = dict(l1=torch.tensor(l1), steps=1500, log_every=1500)
        sae, _ = trained(make(32, 64, stack=len(l1)), data.batches(256, seed=0), **options)
        metrics.append(evaluate(sae, some_batches(10, 1000, data, seed=99)))
    standard, gated = metrics
    # S1, S2. Margins: γ of Standard is 0.05 short of 1, and falls as λ rises; of Gated within 0.02.
    assert (standard.gamma < 0.95).all()
    assert (standard.gamma.diff() < -0.03).all()
    assert ((gated.gamma - 1).abs() < 0.02).all()
    # S7: γ is near 1, and yet the plain norm ratio would report shrinkage: by 1 - norm ratio = FVU
    # at γ = 1 (and E x = 0), and by half of it at least.
    assert (1 - gated.norm_ratio > gated.fvu / 2).all()
    assert_equal(gated.norm_ratio, gated.cosine_squared, rtol=0.03, atol=0)
    # D4: each Standard SAE is beaten by a Gated one that has less error with 10% fewer latents.
    for fvu, l0 in zip(standard.fvu, standard.l0, strict=True):
        assert ((gated.fvu < fvu) & (gated.l0 < 0.9 * l0)).any()


@pytest.mark.parametrize("tied", [True, False])
def test_without_aux_the_gates_die_and_with_it_they_live(tied):
    """G2: nothing raises b_gate. Margins: under 1/100 of the latents fire that do with aux."""
    options, held_out = dict(steps=1500, log_every=1500), some_batches(10, 1000, seed=99)
    options["resample_every"] = None
    dying, records = trained(GatedSAE(8, 16, tied=tied, aux=None), **options)
    living, _ = trained(GatedSAE(8, 16, tied=tied), **options)
    dead, alive = evaluate(dying, held_out), evaluate(living, held_out)
    assert records[0].metrics.l0 > 0.2
    assert alive.l0 > 3
    assert dead.l0 < alive.l0 / 100
    assert alive.fvu < 0.01
    assert dead.fvu > 0.9


# -- The start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", random_saes.SCALING)  # the others are never quite closed
@pytest.mark.parametrize("far", [0.0, 30.0])
def test_a_fresh_sae_is_sparse_and_too_short_rather_than_too_long(variant, far):
    """On normal rows 2 standard deviations are passed by 2.3 %, wherever the rows lie."""
    x = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0)) + far
    sae = VARIANTS[variant](64, 256, stack=2)
    assert_equal(gated_sae.start(sae, x)[0], x.mean(0).expand(2, 64))
    f = sae.paths(x)[0] if isinstance(sae, GatedSAE) else sae.encode(x)
    assert 0.021 < (f > 0).double().mean() < 0.025
    metrics = evaluate(sae, [x])
    assert (metrics.fvu < 1.001).all()
    assert far or not (metrics.gamma > 1).any()
    assert gated_sae.start(sae, x + 1) == []


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_the_caller_set_or_froze_does_not_start(variant, frozen):
    """Or fine-tuning what was loaded, and was trained without b_dec, would begin by moving it."""
    sae, (x,) = VARIANTS[variant](8, 16), some_batches(1)
    getattr(sae, sae.opener).data[3] = 0.5
    sae.b_dec.requires_grad_(not frozen)
    with random_saes.unchanged(sae):
        assert gated_sae.start(sae, x + 3) == []


HALF = "losses are in float16, expected bfloat16"  # small gradients come out 0, latents look dead
REFUSED = {
    "overflow": (lambda sae: lambda x: sae.losses(1e30 * x), ValueError, "expected finite"),
    "half": (lambda sae: torch.autocast("cpu", torch.float16)(sae.losses), ValueError, HALF),
    "a copy's": (lambda sae: copy.deepcopy(sae).losses, ValueError, "losses are of another SAE"),
    "no graph": (lambda sae: torch.no_grad()(sae.losses), RuntimeError, "grad"),
    "none": (lambda _: lambda x: None, AttributeError, "total"),
}


@pytest.mark.parametrize("way", REFUSED)
@pytest.mark.parametrize("variant", ["gated", "standard", "standard norm"])
def test_a_first_step_that_fails_takes_its_start_back(way, variant):
    (lowered, error, says), sae = REFUSED[way], VARIANTS[variant](8, 16)
    trainer = Trainer(sae, l1=0.1, steps=3, losses=lowered(sae), device="cpu")
    with random_saes.unchanged(sae), pytest.raises(error, match=says):
        trainer.step(*some_batches(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_only_the_first_step_looks_at_what_the_backward_pass_needs(variant, monkeypatch):
    """Looking at each step kept pages of the heap from being used again: 1 GB in 600 steps."""
    seen = []
    monkeypatch.setattr(gated_sae, "no_float16", lambda t: seen.append(trainer.done) or t)
    trainer = Trainer(VARIANTS[variant](8, 16), l1=0.1, steps=3, device="cpu")
    for x in some_batches(3):
        trainer.step(x)
    assert set(seen) == {0}


def test_data_far_from_the_origin_trains_as_well_as_centred():
    """A mean of 10 standard deviations: FVU within 5 % of that of the same rows, centred."""
    fvu, data = [], SuperpositionData(16, 32, firing=2 / 32)
    offset = 10 * gated_sae.variance(itertools.islice(data.batches(256, 1), 20), 16).item() ** 0.5
    direction = F.normalize(torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0)
    for far in (0.0, offset):
        rows = lambda seed, far=far: (x + far * direction for x in data.batches(256, seed))  # noqa: E731
        sae, _ = trained(GatedSAE(16, 32), rows(0), l1=0.3, steps=800, log_every=800)
        fvu.append(evaluate(sae, itertools.islice(rows(9), 20)).fvu)
    assert fvu[1] < 1.05 * fvu[0] < 0.3


# -- The loop, against a plain one -----------------------------------------------------------------

LOWERED = {  # what `losses=` may be, as functions of the SAE
    None: lambda sae: None,
    "sparse": lambda sae: partial(gated_sae.fast_losses, sae, sparse=True),
    "scaled": lambda sae: lambda x: Losses(*(3 * term for term in sae.losses(x))),
    "normalized": lambda sae: lambda x: gated_sae.normalized(sae.losses(x), x),
    "autocast": lambda sae: torch.autocast("cpu", torch.bfloat16)(sae.losses),
}
LOOPS = [*((variant, None) for variant in VARIANTS), *(("gated", way) for way in [*LOWERED][1:])]


@pytest.mark.parametrize(("variant", "lowered"), LOOPS)
def test_the_loop_is_project_step_renormalise(variant, lowered):
    """Five steps by hand, with schedules written out and every operation in its place."""
    steps, lr, l1, warm, fall = 5, 1e-2, 0.3, 2, 2
    sae, expected = (random_sae(variant, (8, 16), 0) for _ in range(2))
    losses = LOWERED[lowered](expected) or expected.losses
    batches = [x.double() for x in some_batches(steps)]
    options = dict(lr_warmup=0.4, l1_warmup=0.4, lr_decay=0.4, betas=(0.5, 0.9), log_every=1)
    options |= dict(losses=LOWERED[lowered](sae), l1=l1, lr=lr)
    _, records = trained(sae, batches, **options)
    optimizer = torch.optim.Adam(expected.parameters(), betas=(0.5, 0.9))
    for step, (record, x) in enumerate(zip(records, batches, strict=True), start=1):
        rate, price = lr * min(1, step / warm, (steps + 1 - step) / fall), l1 * min(1, step / warm)
        terms = losses(x)
        assert (record.step, record.lr, record.l1.item()) == pytest.approx((step, rate, price))
        assert_equal(record.losses, Losses(*(term.detach() for term in terms)))
        assert not record.losses.total(1.0).requires_grad
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        terms.total(price).backward()
        W = expected.W_dec
        if random_saes.unit_norm(expected):
            W.grad = W.grad - (W.grad * W.data).sum(1, keepdim=True) * W.data
        optimizer.step()
        if random_saes.unit_norm(expected):
            W.data = W.data / W.data.norm(dim=1, keepdim=True)
        assert_equal(record.metrics.fvu, evaluate(expected, [x]).fvu)
    assert_equal(sae.state_dict(), expected.state_dict())
    assert ((sae.W_dec.norm(dim=-1) - 1).abs() < 1e-9).all() == ("norm" not in variant)


@pytest.mark.parametrize(("rows", "every"), [(32, None), (1, 3)])  # of one row, nothing is drawn
@settings(max_examples=5)
@given(variants, seeds)
def test_a_stack_is_trained_and_resampled_as_its_members_are(rows, every, variant, seed):
    """One λ for each member, one shared stream of batches."""
    stack, l1 = random_sae(variant, (8, 16), seed, stack=(2,)), torch.tensor([0.1, 0.8]).double()
    singles = [random_saes.member(stack, i) for i in range(2)]
    _, records = trained(stack, some_batches(10, rows), l1=l1, resample_every=every)
    assert_equal(records[-1].l1, l1)
    for i, single in enumerate(singles):
        trained(single, some_batches(10, rows), l1=l1[i], resample_every=every)
        assert_equal(random_saes.member(stack, i).state_dict(), single.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_seeds_give_the_same_bits_whatever_the_global_seed(variant):
    def run(global_seed, seed=0):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        sae, records = trained(half_killed(variant), seed=seed, resample_every=10)
        assert torch.equal(before, torch.get_rng_state())
        return sae.state_dict() | records[-1].losses._asdict()

    assert_equal(run(0), run(12345), rtol=0, atol=0)
    assert not torch.equal(run(0)["W_dec"], run(0, seed=1)["W_dec"])


@pytest.mark.cuda
@pytest.mark.parametrize("variant", VARIANTS)
def test_training_on_the_gpu_is_training_on_the_cpu(variant):
    on_cpu, on_gpu = (random_sae(variant, (8, 16), 0, stack=(2,)) for _ in range(2))
    trained(on_cpu, some_batches(10))
    trained(on_gpu, some_batches(10), device="cuda")
    assert_equal(on_gpu.cpu().state_dict(), on_cpu.state_dict())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_autocast_keeps_parameters_and_losses_in_float32(device):
    """Near the float32 result, but not it."""
    sae, (*_, exact) = trained(GatedSAE(8, 16), device=device)
    rough = GatedSAE(8, 16)
    losses = torch.autocast(device, torch.bfloat16)(rough.losses)
    _, (*_, last) = trained(rough, device=device, losses=losses)
    assert {v.dtype for v in (*rough.parameters(), last.losses.reconstruct)} == {torch.float32}
    assert 0 < (rough.W_dec - sae.W_dec).abs().max() < 0.1
    assert last.metrics.fvu.item() == pytest.approx(exact.metrics.fvu.item(), rel=0.1)


# -- A8: resampling --------------------------------------------------------------------------------

LATENT_AXIS = {"W_enc": -1, "W_mag": -1, "W_dec": -2}  # of the others, which have b_dec aside: -1


@example("gated untied", (3, 4), 0, ())
@example("jumprelu", (3, 4), 0, ())
@given(variants, sizes, seeds, st.sampled_from([(), (2, 3)]))
def test_only_the_dead_are_resampled_and_all_of_them(variant, size, seed, stack):
    """The living and b_dec keep their bits, in the optimiser too; the dead start over in both."""
    sae, x = random_sae(variant, size, seed, stack=stack), random_batch(7, size[0], seed=seed)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2, betas=(0.5, 0.9))
    sae.losses(x).total(0.5).sum().backward()
    optimizer.step()  # so that it has moments
    dead = torch.rand(*stack, size[1], generator=torch.Generator().manual_seed(seed)) < 0.5

    def held():
        """Each parameter and its moments, with latents as the last dimension."""
        for name, p in sae.named_parameters():
            values = p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"]
            yield name, [v.detach().movedim(LATENT_AXIS.get(name, -1), -1).clone() for v in values]

    before = dict(held())
    resample(sae, dead, x, torch.Generator().manual_seed(seed), optimizer)
    assert {state["step"].item() for state in optimizer.state.values()} == {1}
    for name, (value, average, average_sq) in held():
        if name == "b_dec":
            assert_equal([value, average, average_sq], before[name], rtol=0, atol=0)
            continue
        alive = ~(dead.unsqueeze(-2) if name in LATENT_AXIS else dead).expand_as(value)
        for now, was in zip((value, average, average_sq), before[name], strict=True):
            assert torch.equal(now[alive], was[alive])
        assert (average[~alive] == 0).all()
        dims = tuple(range(len(stack), value.ndim))  # in which lies the mean of each SAE's living
        total, n = ((v * alive).sum(dims, keepdim=True) for v in (average_sq, alive))
        assert_equal(average_sq, torch.where(alive, average_sq, total / n.clamp_min(1)))
        if name not in (*LATENT_AXIS, sae.opener):
            assert (value[dead] == sae.latent_vectors.get(name, 0.0)).all()  # that of r_mag is 0


@example("gated untied", (3, 4), 0, False)
@given(variants, sizes, seeds, st.booleans())
def test_the_dead_restart_at_the_worst_row_seen_from_b_dec(variant, size, seed, shared):
    """One in each member, at its own row, so much the worst that no other is drawn, and opens at
    half of what that row gives."""
    sae = random_sae(variant, size, seed, stack=(2, 3))
    generator = torch.Generator().manual_seed(seed)
    mask = F.one_hot(torch.randint(size[1], (2, 3), generator=generator), size[1]).bool()
    x = random_batch(*(() if shared else (2, 3)), 7, size[0], seed=seed)
    x[..., 3, :] *= 1e6
    if not shared:
        x[1] = x[1].roll(1, dims=-2)  # row 4 in these members
    norms = sae.W_enc.detach().norm(dim=-2).masked_fill(mask, torch.nan)
    norms = 0.2 * norms.nanmean(-1).nan_to_num(1)  # 0.2 where it was the only latent
    resample(sae, mask, x, generator)
    worst = x.take_along_dim(x.norm(dim=-1, keepdim=True).argmax(-2, keepdim=True), -2)
    worst = (worst - sae.b_dec.detach().unsqueeze(-2)).view(6, -1)
    theta = sae.latent_vectors.get("threshold", 0)
    assert_equal(getattr(sae, sae.opener)[mask], theta - norms.view(6) * worst.norm(dim=-1) / 2)
    d = F.normalize(worst, dim=-1)
    assert_equal(sae.W_dec[mask], d.view(6, -1))
    for encoder in (sae.W_enc, getattr(sae, "W_mag", sae.W_enc)):
        assert_equal(encoder.mT[mask], norms.view(6, 1) * d.view(6, -1))


@pytest.mark.parametrize("variant", random_saes.SCALING)
@pytest.mark.parametrize("scale", [0.3, 3.0])
def test_each_that_restarts_fires_on_a_row(variant, scale):
    """On its own, that is, and on few: W_enc is short, a θ is not."""
    sae, x = VARIANTS[variant](16, 32), scale * random_batch(256, 16, seed=0).float()
    gated_sae.start(sae, x)
    dead = torch.arange(32) < 8
    resample(sae, dead, x, torch.Generator().manual_seed(0))
    share = (sae.encode(x) > 0).double().mean(0)[dead]
    assert (share > 0).all()
    assert share.mean() < 0.2


@pytest.mark.parametrize("x", [torch.ones(64, 1), torch.ones(0, 8), torch.full((4, 8), math.nan)])
def test_no_sae_starts_from_what_are_no_rows(x):
    sae, says = GatedSAE(8, 16), "x is .*, expected|x has NaN"
    with random_saes.unchanged(sae), pytest.raises(ValueError, match=says):
        gated_sae.start(sae, x)


@pytest.mark.parametrize("scale", [1e-12, 1e-6, 1.0, 1e6, 1e12])
def test_rows_are_drawn_by_their_squared_error_squared(scale):
    """x̂ = 0, so rows of norms 1 and 2 are drawn 1 : 16, seen to four standard deviations."""
    n = 20_000  # members, of one latent each
    sae = StandardSAE(2, 1, stack=n)
    sae.b_enc.data.fill_(-1e30)
    x = scale * torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    resample(sae, torch.ones(n, 1, dtype=torch.bool), x, torch.Generator().manual_seed(0))
    assert (sae.W_dec[..., 0] == 1).double().mean().item() == pytest.approx(1 / 17, abs=0.0067)


@pytest.mark.parametrize(("batch", "d_sae"), [(50, 6), (8, 8), (10, 40), (3, 8)])
def test_no_two_restart_at_one_row_while_there_are_others(batch, d_sae):
    """They would stay the same for ever. Six, or eight, of the latents are dead."""
    sae, x = random_sae("standard", (4, d_sae), 0, stack=2), random_batch(batch, 4, seed=0)
    dead = (torch.arange(d_sae) >= d_sae - 8).expand(2, d_sae)
    resample(sae, dead, x, torch.Generator().manual_seed(0))
    for W_dec, b_dec in zip(sae.W_dec, sae.b_dec, strict=True):
        apart = (W_dec[-8:].unsqueeze(1) - F.normalize(x - b_dec, dim=-1)).norm(dim=-1)
        assert (apart.min(1).values < 1e-9).all()
        assert len(W_dec.unique(dim=0)) == d_sae or batch < 8


def half_killed(variant, **options):
    """8 of 16 latents fire on no row, for their π is -1000: that of the gate, if it is a step."""
    sae = VARIANTS[variant](8, 16, **options)
    bias = sae.b_mag if variant == "gated sigmoid" else getattr(sae, sae.opener)
    bias.data[..., 8:] = -1e3
    return sae


@pytest.mark.parametrize("variant", ["standard", "gated", "gated untied", "gated natural"])
def test_resampling_revives_the_dead(variant):
    """A8, in four worlds from half the latents dead: one of 20 at most, and 0.75 of the FVU."""
    worlds = [SuperpositionData(8, 16, firing=0.1, seed=seed) for seed in (3, 4, 5, 6)]

    def batches(size, seed):
        return map(torch.stack, zip(*(world.batches(size, seed) for world in worlds), strict=True))

    def metrics(**options):
        sae = half_killed(variant, stack=4)
        trained(sae, batches(64, 0), steps=600, log_every=600, **options)
        return evaluate(sae, itertools.islice(batches(1000, 99), 10))

    left, revived = metrics(resample_every=None), metrics()
    assert (left.dead_fraction == 0.5).all()
    assert revived.dead_fraction.mean() < 0.05
    assert (revived.fvu / left.fvu).mean() < 0.75


@pytest.mark.parametrize("variant", random_saes.SCALING)
def test_who_fired_on_no_row_since_the_last_time_is_resampled(variant, monkeypatch):
    """In steps of no size, against a count by hand; never after the last step; f of each step."""
    sae = VARIANTS[variant](8, 16, stack=2)
    getattr(sae, sae.opener).data.copy_(torch.linspace(-0.2, 0, 32).view(2, 16))
    sae.b_dec.requires_grad_(False)
    if "b_mag" in sae.latent_vectors:  # some gates open, and yet f = 0
        sae.b_mag.data[..., -4:] = -1e3
    batches, calls = some_batches(9, 4), []
    fires = torch.stack([(sae.encode(x) > 0).any(-2) for x in batches])  # (step, *stack, d_sae)

    def resample(sae, dead, x, generator, optimizer):
        assert torch.equal(x, batches[3 * len(calls) + 2])
        assert optimizer.state[sae.W_enc]["step"] == 3 * len(calls) + 3
        calls.append(dead.clone())

    monkeypatch.setattr(gated_sae, "resample", resample)
    trained(sae, batches, resample_every=3, l1=0.0, lr=1e-12)
    assert_equal(torch.stack(calls), ~torch.stack([fires[:3].any(0), fires[3:6].any(0)]))
    assert all(dead.any() and not dead.all() for dead in calls)
    assert not torch.equal(*calls)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith("gated")])
def test_an_sae_of_which_nothing_fires_is_revived(variant):
    """Its gates are open, so that L_aux, or norms, may give W_dec a gradient all the same."""
    sae = VARIANTS[variant](8, 16, stack=2)
    bias = sae.b_gate if variant == "gated natural" else sae.b_mag
    bias.data.fill_(-1e3)
    assert (evaluate(sae, some_batches(3)).dead_fraction == 1).all()
    trained(sae, steps=4, resample_every=3)
    assert (bias > -1).all()
    assert (evaluate(sae, some_batches(3)).l0 > 0).all()


def test_cutting_batches_into_parts_changes_nothing(monkeypatch):
    """As is done where f would be large: in metrics, and to find what is silent, or badly off."""
    ends = []
    for in_parts in (gated_sae.in_parts, lambda sae, x: x.split(5, -2)):
        monkeypatch.setattr(gated_sae, "in_parts", in_parts)
        sae, (*_, last) = trained(half_killed("gated", dtype=torch.float64), resample_every=5)
        metrics = {name: torch.as_tensor(value) for name, value in vars(last.metrics).items()}
        ends.append(sae.state_dict() | metrics)
    assert_equal(*ends)


# -- Schedules, steps and batches ------------------------------------------------------------------

FLAT = dict(lr_warmup=0.0, l1_warmup=0.0, lr_decay=0.0)
RISE, FALL = [k / 10 for k in range(1, 10)], [k / 20 for k in range(20, 0, -1)]


@pytest.mark.parametrize(
    ("shares", "lrs", "l1s"),
    [
        ({}, [*RISE, *[1] * 71, *FALL], [*RISE, *[1] * 91]),
        (FLAT, [1, 1, 1], [1, 1, 1]),
        (dict(zip(FLAT, (1.0, 0.5, 1.0), strict=True)), [0.25, 0.5, 0.5, 0.25], [0.5, 1, 1, 1]),
    ],
)
def test_schedules_rise_from_zero_and_the_rate_falls_again(shares, lrs, l1s):
    """Where ramps overlap, the lowest counts."""
    _, records = trained(GatedSAE(8, 16), steps=len(lrs), log_every=1, l1=2.0, **shares)
    assert [record.lr for record in records] == pytest.approx([1e-2 * lr for lr in lrs])
    assert [record.l1.item() for record in records] == pytest.approx([2 * l1 for l1 in l1s])


def test_a_trainer_takes_its_steps_and_no_more():
    """And `train` takes them from its batches; where these end early, it keeps what was trained."""
    batches, early = some_batches(3), GatedSAE(8, 16)
    trainer = Trainer(GatedSAE(8, 16), l1=0.1, steps=3, lr=1e-2, device="cpu", **FLAT)
    records = [trainer.step(x) for x in batches]
    with pytest.raises(ValueError, match="all 3 steps are done"):
        trainer.step(batches[0])
    assert ([record.step for record in records], trainer.done) == ([1, 2, 3], 3)
    sae, (*_, last) = trained(GatedSAE(8, 16), batches, **FLAT)
    with pytest.raises(ValueError, match="ended after 3 of 5 steps"):
        trained(early, batches, steps=5, **FLAT)
    for same in (sae, early):
        assert_equal(trainer.sae.state_dict(), same.state_dict(), rtol=0, atol=0)
    assert_equal(last.losses, records[-1].losses, rtol=0, atol=0)
    assert (trainer.betas, trainer.resample_every) == ((0.9, 0.999), 100)
    assert train.__kwdefaults__ == dict(log_every=100)
    assert Trainer(GatedSAE(16, 4), l1=0.1, steps=1, device="cpu").lr == 0.05 / 4


def test_training_draws_what_it_needs_and_the_model_that_makes_it_is_not_trained():
    """Records come at the first step, the cadence and the last; the caller keeps its grad mode."""
    model, ends = torch.nn.Linear(8, 8), []
    for grad in (True, False):
        sae, drawn = GatedSAE(8, 16), []
        stream = (drawn.append(model(x)) or drawn[-1] for x in DATA.batches(32, seed=0))
        with torch.set_grad_enabled(grad):
            run = train(sae, stream, l1=0.1, steps=25, log_every=10, device="cpu")
            assert not drawn
            assert [next(run).step, len(drawn)] == [1, 1]
            assert [next(run).step, len(drawn)] == [10, 10]
            assert [record.step for record in run] == [20, 25]
        assert [y.requires_grad for y in drawn] == [grad] * 25
        ends.append(sae.state_dict())
    assert_equal(*ends)
    assert model.weight.grad is None


@pytest.mark.parametrize("lowered", [None, "sparse"])
@pytest.mark.parametrize("frozen", ["W_dec", "W_enc", "b_dec", "r_mag"])
def test_frozen_parameters_stay_in_training_and_in_resampling(frozen, lowered):
    sae = half_killed("gated")
    before = getattr(sae, frozen).requires_grad_(False).clone()
    every = None if frozen == "W_dec" else 5
    trained(sae, resample_every=every, losses=LOWERED[lowered](sae))
    assert getattr(sae, frozen).grad is None
    resample(sae, torch.ones(16, dtype=torch.bool), *some_batches(1), torch.Generator())
    assert_equal(getattr(sae, frozen).detach(), before, rtol=0, atol=1e-6)


@given(variants, sizes, seeds, st.sampled_from([(), (2,)]))
def test_a_decoder_from_elsewhere_is_folded_or_refused(variant, size, seed, stack):
    """Of norms 0 to 5. x̂ stays; norms do, too, where they are charged, until folded by hand."""
    sae, x = random_sae(variant, size, seed, stack=stack), random_batch(5, size[0], seed=seed)
    sae.W_dec.data *= torch.linspace(0.2, 5, size[1], dtype=torch.float64)[:, None]
    sae.W_dec.data[..., 0, :] = 0
    f, x_hat, losses, norms = sae.encode(x), sae(x), sae.losses(x), sae.W_dec.norm(dim=-1)
    folds = variant in random_saes.SCALING or size[1] == 1
    with nullcontext() if folds else pytest.raises(ValueError, match="norms .*, expected 1"):
        Trainer(sae, l1=0.1, steps=1, device="cpu")
        assert random_saes.unit_norm(sae) or torch.equal(sae.W_dec.norm(dim=-1), norms)
        gated_sae.fold_decoder_norms(sae)
    scales = torch.where((norms > 0) & folds, norms, 1)
    assert_equal(sae.encode(x), f * scales.unsqueeze(-2))
    assert_equal(sae.W_dec.norm(dim=-1), norms / scales)
    assert_equal((sae(x), *sae.losses(x)[::2]), (x_hat, *losses[::2]))


@given(variants, st.integers(1, 3), st.integers(1, 3), seeds)
def test_the_smallest_saes_and_empty_data_train_without_a_nan(variant, d_in, d_sae, seed):
    """Nor has a gradient one where the decoder, or the batch, has no length."""
    sae, x = random_sae(variant, (d_in, d_sae), seed), torch.zeros(3, d_in).double()
    sae.W_dec.data[0] = 0
    gated_sae.normalized(sae.losses(x), x).total(1.0).backward()
    gated_sae.step_on_unit_norm(torch.optim.SGD([sae.W_dec], lr=0.0), sae.W_dec)
    assert all(p.grad.isfinite().all() for p in sae.parameters())
    assert (sae.W_dec[0] == 0).all()
    trained(sae, [x] * 5, lr=0.1)
    assert all(p.isfinite().all() for p in sae.parameters())


def test_the_device_is_the_one_asked_for_or_the_accelerator_or_the_cpu(monkeypatch):
    # The meta device stands in for an accelerator, and is refused: it holds no numbers.
    for found, asked in (("meta", "cpu"), (None, None), ("meta", None), (None, "meta")):
        answer = lambda check_available, found=found: found and torch.device(found)  # noqa: E731
        monkeypatch.setattr(torch.accelerator, "current_accelerator", answer)
        sae = GatedSAE(8, 16, penalty="norm_frozen")  # no norm to look at
        refused = "meta" in (asked, asked or found)
        with pytest.raises(ValueError, match="device is meta") if refused else nullcontext():
            train(sae, [], l1=0.1, steps=1, device=asked)
        assert sae.W_dec.device.type == "cpu"


@pytest.mark.parametrize(("variant", "lowered"), LOOPS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("stack", [(), (2,)])
def test_a_bad_batch_or_loss_stops_training_before_any_change(variant, lowered, bad, stack):
    """One row of one member is enough: in the batch, or in a loss that overflows."""
    sae = VARIANTS[variant](8, 16, stack=stack)
    batches = [x.expand(*stack, 32, 8).clone() for x in some_batches(4)]
    batches[3].view(-1, 8)[-25, 2] = bad
    n, loss = (64, r"\[\d\S+, (inf|nan)\]") if stack else (32, "(inf|nan)")
    says = f"batch 3 has NaN or infinity in 1 of {n} rows, first in row {n - 25}$"
    says = f"step 4: the loss is {loss}, expected finite" if bad == 1e30 else says
    trainer = Trainer(sae, l1=0.1, steps=9, resample_every=2, losses=LOWERED[lowered](sae))

    def state():  # all that the next step depends on
        modules = sae.state_dict(), trainer.optimizer.state_dict(), trainer.generator.get_state()
        return copy.deepcopy((*modules, trainer.silent, trainer.done))

    for x in batches[:3]:
        trainer.step(x)
    before = state()
    with pytest.raises(ValueError, match=says):
        trainer.step(batches[3])
    with pytest.raises(ValueError, match=r"batch 3 is torch.float32 \(4, 7\), expected .* 8\)"):
        trainer.step(torch.ones(4, 7))
    for deep in (trainer.step, lambda x: evaluate(trainer.sae, [x])):  # no stack, no 3-D
        with pytest.raises(ValueError, match=r"batch [03] is torch.float32 \(5, 4, 8\), expected"):
            deep(torch.ones(5, 4, 8))
    assert_equal(state(), before, rtol=0, atol=0)
    assert trainer.step(batches[0]).step == 4


BAD = dict(steps=(0, -3, 1.5), resample_every=(0, -1, 1.5, True), log_every=(0,))
BAD |= dict(lr=(0.0, math.nan, math.inf, "1"), l1=(-0.1, math.nan, math.inf, "1", None, True))
BAD |= dict.fromkeys(("lr_warmup", "l1_warmup", "lr_decay"), (1.5, -0.1, "a", None, math.nan))
BAD |= dict(losses=(3,), device=("meta",), sae=(None, nn.Linear(8, 16)))
BETAS = (1.5, 0.9), (0.9,), 0.9, "ab", (0.9, 1), (True, "a"), None
MIXED = GatedSAE(8, 16)
MIXED.b_dec.data = MIXED.b_dec.data.half()
ONE_SCALE = gated_sae.rescale_and_shift(StandardSAE(8, 16))


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        *(({name: v}, (ValueError, TypeError), f"{name} is ") for name in BAD for v in BAD[name]),
        *(({"betas": v}, (ValueError, TypeError), "^betas (is|are) ") for v in BETAS),
        ({"l1": torch.tensor([0.1, 0.2])}, ValueError, r"shape \(\) or \(3,\)"),
        ({"l1": torch.tensor([0.1, 0.2, -1.0])}, ValueError, r"l1 is \["),
        ({"sae": MIXED}, TypeError, "float16.*, expected float32"),
        ({"sae": GatedSAE(8, 16, dtype=torch.bfloat16)}, TypeError, "bfloat16}, expected float32"),
        ({"sae": ONE_SCALE, "resample_every": 1}, ValueError, "W_dec is frozen"),
        ({"sae": GatedSAE(8, 16).requires_grad_(False)}, ValueError, "nothing here gets a grad"),
        ({"within": torch.inference_mode()}, ValueError, "nothing here gets a gradient"),
    ],
)
def test_bad_arguments_are_named_at_the_call(options, error, says):
    """At the call, not when the generator is first asked, and before the decoder is folded."""
    options = dict(sae=GatedSAE(8, 16, stack=3), l1=0.1, steps=5, device="cpu") | options
    within, kept = options.pop("within", nullcontext()), nullcontext()
    if isinstance(sae := options["sae"], GatedSAE):
        sae.W_dec.data *= 3
        kept = random_saes.unchanged(sae)
    with within, kept, pytest.raises(error, match=says):
        train(batches=DATA.batches(32, seed=0), **options)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrappers_come_off(wrap):
    """Training one trains the SAE; all that takes an SAE takes it too."""
    sae, other = (random_sae("gated", (8, 16), 0) for _ in range(2))
    wrapped, x = wrap(other), next(DATA.batches(32, 1)).double()
    for each in (sae, wrapped):
        trained(each, resample_every=5)
    assert_equal(other.state_dict(), sae.state_dict(), rtol=0, atol=0)
    assert evaluate(wrapped, [x]).fvu == evaluate(other, [x]).fvu
    for convert in (gated_sae.to_jumprelu, gated_sae.to_gated, partial(gated_sae.rescaled, c=1.0)):
        assert_equal(convert(wrapped)(x), convert(other)(x), rtol=0, atol=0)
    state = gated_sae.to_dictionary_learning(wrapped)
    assert_equal(state["r_mag"], other.r_mag.detach(), rtol=0, atol=0)
    with gated_sae.splice(inner := nn.Identity(), wrapped):
        assert_equal(inner(x), other(x))


def test_lambda_is_exact_whatever_the_default_dtype_and_losses_may_leave_the_decoder_alone():
    torch.set_default_dtype(torch.bfloat16)
    try:
        trainer = Trainer(sae := GatedSAE(8, 16, dtype=torch.float64), l1=0.3, steps=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert trainer.l1.item() == 0.3
    x, before = torch.randn(64, 8, dtype=torch.float64), sae.W_dec.detach().clone()
    trainer.losses = lambda x: gated_sae.Losses(*[sae.encode(x).sum()] * 3)
    trainer.step(x)
    assert_equal(sae.W_dec, before)
