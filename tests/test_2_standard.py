"""Section 2: the standard SAE, its shrinkage, and what every variant inherits."""

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import (
    VARIANTS,
    assert_equal,
    gradients,
    random_batch,
    random_sae,
    scaling_variants,
    seeds,
    sizes,
    variants,
)

import gated_sae
from gated_sae import (
    SAE,
    GatedSAE,
    JumpReLUSAE,
    Losses,
    StandardSAE,
    fold_decoder_norms,
    step_on_unit_norm,
)

numbers = st.floats(-10, 10)


# -- S1: shrinkage ---------------------------------------------------------------------------------


@given(numbers, st.floats(0, 10))
def test_closed_form_beats_every_other_coefficient(x, l1):
    cost = lambda f: (x - f) ** 2 + l1 * f  # noqa: E731
    best = gated_sae.shrink(torch.tensor(x, dtype=torch.float64), l1).item()
    others = np.linspace(0, 20, 4001)
    assert best >= 0
    assert cost(best) <= cost(others).min() + 1e-9


@pytest.mark.parametrize(("x", "l1"), [(3.0, 1.0), (0.4, 1.0), (-1.0, 0.5), (2.0, 0.0)])
def test_gradient_descent_finds_the_closed_form(x, l1):
    f = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    for _ in range(200):
        (slope,) = torch.autograd.grad((x - f) ** 2 + l1 * f, f)
        f = (f - 0.1 * slope).clamp_min(0).detach().requires_grad_()
    assert f.item() == pytest.approx(max(0, x - l1 / 2), abs=1e-9)


# -- The loss --------------------------------------------------------------------------------------


@given(sizes, st.integers(1, 7), seeds)
def test_standard_loss_and_gradients_match_the_oracle(size, batch, seed):
    sae = random_sae("standard", size, seed)
    x = random_batch(batch, size[0], seed=seed + 1)
    weights = dict(a=1.3, l1=0.7)
    losses = sae.losses(x)
    total = weights["a"] * losses.reconstruct + weights["l1"] * losses.sparsity + losses.aux
    p = {name: value.detach().numpy() for name, value in sae.named_parameters()}
    expected, grads = oracle.standard(x.numpy(), p, **weights)
    assert_equal(losses, Losses(*(torch.tensor(v, dtype=torch.float64) for v in expected)))
    assert_equal(gradients(sae, total), {k: torch.from_numpy(grads[k]) for k in p})


def test_squared_error_sums_over_features_and_means_over_the_batch():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]])
    assert gated_sae.squared_error(x, torch.zeros(3, 2)).item() == pytest.approx(
        (1 + 4 + 9 + 16) / 3
    )


def test_total_weighs_sparsity_alone_and_takes_one_l1_per_member():
    terms = Losses(torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([0.5, 0.25]))
    assert terms.total(torch.tensor([0.1, 1.0])).tolist() == [2.5, 22.25]
    assert terms.total(2).tolist() == [21.5, 42.25]


# -- What every variant inherits -------------------------------------------------------------------


@given(variants, sizes, seeds)
def test_rows_do_not_see_each_other(variant, size, seed):
    sae = random_sae(variant, size, seed)
    x = random_batch(5, size[0], seed=seed)
    assert_equal(torch.cat([sae(row) for row in x.split(1)]), sae(x))


@given(variants, sizes, seeds)
def test_losses_are_means_over_rows(variant, size, seed):
    sae = random_sae(variant, size, seed)
    x = random_batch(4, size[0], seed=seed)
    one_by_one = [sae.losses(row) for row in x.split(1)]
    means = Losses(*(torch.stack(term).mean() for term in zip(*one_by_one, strict=True)))
    assert_equal(sae.losses(x), means)


@given(variants, sizes, seeds)
def test_latents_have_no_order(variant, size, seed):
    sae = random_sae(variant, size, seed)
    shuffled = random_sae(variant, size, seed)
    order = torch.randperm(size[1], generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, value in shuffled.named_parameters():
            if name in ("W_enc", "W_mag"):
                value.copy_(value[:, order])
            elif name != "b_dec":
                value.copy_(value[order])
    x = random_batch(5, size[0], seed=seed)
    assert_equal(shuffled.encode(x), sae.encode(x)[:, order])
    assert_equal(shuffled.losses(x), sae.losses(x))


@given(variants, sizes, seeds, st.booleans(), st.booleans())
def test_a_stack_is_its_members(variant, size, seed, shared, normalize):
    """Values, losses and gradients, with one batch for all or one for each."""
    stack = random_sae(variant, size, seed, stack=(2, 3), normalize=normalize)
    x = random_batch(*(() if shared else (2, 3)), 5, size[0], seed=seed)
    losses, x_hat = stack.losses(x), stack(x)
    grads = gradients(stack, losses.total(0.3).sum())
    for i in np.ndindex(2, 3):
        single = random_sae(variant, size, seed, normalize=normalize)
        single.load_state_dict({name: value[i] for name, value in stack.state_dict().items()})
        x_i = x if shared else x[i]
        assert_equal(x_hat[i], single(x_i))
        own = single.losses(x_i)
        assert_equal(Losses(*(term[i] for term in losses)), own)
        assert_equal({k: g[i] for k, g in grads.items()}, gradients(single, own.total(0.3)))


@given(scaling_variants, sizes, seeds, st.floats(0.1, 10))
def test_normalized_errors_do_not_see_the_scale_of_x(variant, size, seed, c):
    """A7. Scaling x, biases and thresholds by c scales f, x̂ and Σf by c, the errors by c²."""
    x = random_batch(5, size[0], seed=seed)
    for normalize in (True, False):
        sae = random_sae(variant, size, seed, normalize=normalize)
        scaled = random_sae(variant, size, seed, normalize=normalize)
        with torch.no_grad():
            for name, value in scaled.named_parameters():
                if name.startswith("b_") or name == "threshold":
                    value.mul_(c)
        own, other = sae.losses(x), scaled.losses(c * x)
        errors = 1 if normalize else c**2
        assert_equal(other[::2], (errors * own.reconstruct, errors * own.aux))
        assert_equal(scaled(c * x), c * sae(x))
        if sae.penalty != "log":  # which has no law of scale
            degree = 0 if isinstance(sae, JumpReLUSAE) else 1  # a count of latents has none either
            assert_equal(other.sparsity, c**degree * own.sparsity)


@given(variants, sizes, seeds)
def test_normalized_losses_are_the_losses_over_the_mean_square(variant, size, seed):
    x = random_batch(5, size[0], seed=seed)
    plain = random_sae(variant, size, seed).losses(x)
    x_sq = x.square().sum() / 5
    expected = Losses(plain.reconstruct / x_sq, plain.sparsity, plain.aux / x_sq)
    assert_equal(random_sae(variant, size, seed, normalize=True).losses(x), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_encoder_starts_as_a_copy_of_the_decoder(variant):
    sae = VARIANTS[variant](5, 7, stack=(2,))
    assert_equal(sae.W_enc, sae.W_dec.mT)
    assert_equal(sae.W_dec.norm(dim=-1), torch.ones(2, 7))
    storages = [p.untyped_storage().data_ptr() for p in sae.parameters()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("variant", VARIANTS)
def test_randomness_comes_from_the_generator_alone(variant):
    def make(global_seed, **options):
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        state = VARIANTS[variant](5, 7, **options).state_dict()
        assert torch.equal(before, torch.get_rng_state())
        return state

    assert_equal(make(0), make(1), rtol=0, atol=0)
    generators = (torch.Generator().manual_seed(s) for s in (3, 3, 4))
    a, b, c = (make(0, generator=g) for g in generators)
    assert_equal(a, b, rtol=0, atol=0)
    assert not torch.equal(a["W_dec"], c["W_dec"])


@given(variants, sizes, seeds)
def test_a_forward_pass_changes_no_state(variant, size, seed):
    sae = random_sae(variant, size, seed)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    x = random_batch(5, size[0], seed=seed)
    kept = x.clone()
    sae(x), sae.losses(x)
    assert_equal(before, dict(sae.state_dict()), rtol=0, atol=0)
    assert_equal(x, kept, rtol=0, atol=0)


@given(variants, st.integers(1, 3), st.integers(1, 3), seeds)
def test_a_zero_decoder_row_and_a_zero_batch_stay_finite(variant, d_in, d_sae, seed):
    sae = random_sae(variant, (d_in, d_sae), seed, normalize=True)
    with torch.no_grad():
        sae.W_dec[0] = 0
    sae.losses(torch.zeros(3, d_in, dtype=torch.float64)).total(1.0).backward()
    step_on_unit_norm(torch.optim.SGD([sae.W_dec], lr=0.0), sae.W_dec)
    assert all(p.isfinite().all() and p.grad.isfinite().all() for p in sae.parameters())
    assert (sae.W_dec[0] == 0).all()


@given(scaling_variants, sizes, seeds, st.sampled_from([(), (2,)]))
def test_folding_norms_into_the_latents_keeps_the_reconstruction(variant, size, seed, stack):
    sae = random_sae(variant, size, seed, stack=stack)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.2, 5, size[1], dtype=torch.float64)[:, None]
        sae.W_dec[..., 0, :] = 0
    x = random_batch(5, size[0], seed=seed)
    f, x_hat, losses = sae.encode(x), sae(x), sae.losses(x)
    norms = sae.W_dec.norm(dim=-1)
    norms = torch.where(norms > 0, norms, 1).unsqueeze(-2)
    fold_decoder_norms(sae)
    assert_equal(sae.encode(x), f * norms)
    assert_equal(sae(x), x_hat)
    assert_equal(sae.losses(x)[::2], losses[::2])
    rest = sae.W_dec.norm(dim=-1)[..., 1:]
    assert_equal(rest, torch.ones_like(rest))


@given(variants, sizes, seeds)
def test_removing_the_radial_gradient_leaves_the_tangent(variant, size, seed):
    sae = random_sae(variant, size, seed)
    sae.W_dec.data /= sae.W_dec.data.norm(dim=-1, keepdim=True)
    sae.losses(random_batch(5, size[0], seed=seed)).total(1.0).backward()
    full, d = sae.W_dec.grad.clone(), sae.W_dec.detach().clone()
    step_on_unit_norm(torch.optim.SGD([sae.W_dec], lr=0.1), sae.W_dec)
    tangent = sae.W_dec.grad
    assert_equal((tangent * d).sum(-1), torch.zeros(size[1]).double(), rtol=0, atol=1e-9)
    along = full - tangent  # what was taken away is parallel to d
    assert_equal(along, (full * d).sum(-1, keepdim=True) * d)
    assert_equal(sae.W_dec.norm(dim=-1), torch.ones(size[1]).double())


# -- Bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 5), ValueError, r"\(3, 5\), expected .* 4"),
        (torch.zeros(4), ValueError, r"\(4,\)"),
        (torch.zeros(0, 4), ValueError, r"\(0, 4\)"),
        (torch.zeros(3, 4, dtype=torch.int64), TypeError, "int64, expected torch.float32"),
        (torch.zeros(3, 4, dtype=torch.complex64), TypeError, "complex64, expected torch.float32"),
        (torch.zeros(3, 4, dtype=torch.float64), TypeError, "float64, expected torch.float32"),
        (np.zeros((3, 4)), TypeError, "ndarray, expected"),
    ],
)
@pytest.mark.parametrize("method", ["encode", "forward", "losses"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_batches_are_named(variant, method, x, error, says):
    with pytest.raises(error, match=says):
        getattr(VARIANTS[variant](4, 8), method)(x)


def test_a_stack_refuses_other_leading_dimensions():
    with pytest.raises(
        ValueError, match=r"\(2, 5, 4\), expected \(batch, 4\) or \(\*\(3,\), batch, 4\)"
    ):
        GatedSAE(4, 8, stack=3).encode(torch.zeros(2, 5, 4))


def test_losses_want_rows():
    sae = GatedSAE(4, 8)
    assert sae(torch.zeros(2, 5, 4)).shape == (2, 5, 4)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\), expected \(batch, 4\)$"):
        sae.losses(torch.zeros(2, 5, 4))


@pytest.mark.parametrize(
    ("args", "options", "error", "says"),
    [
        ((0, 8), {}, ValueError, "d_in is 0"),
        ((4, -1), {}, ValueError, "d_sae is -1"),
        ((4, 2.5), {}, ValueError, "d_sae is 2.5"),
        ((4, True), {}, ValueError, "d_sae is True"),
        ((4, 8), {"stack": (3, 0)}, ValueError, "stack is 0"),
        ((4, 8), {"dtype": torch.int32}, TypeError, "int32, expected a floating"),
    ],
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_bad_sizes_are_named(variant, args, options, error, says):
    with pytest.raises(error, match=says):
        VARIANTS[variant](*args, **options)


def test_numpy_integers_are_integers():
    sae = GatedSAE(np.int64(4), np.int32(8), stack=np.int64(2))
    assert [type(n) for n in (sae.d_in, sae.d_sae, *sae.stack)] == [int] * 3


def test_the_base_class_is_no_variant():
    with pytest.raises(TypeError, match="abstract"):
        SAE(4, 8)


def test_a_single_member_prints_its_options():
    assert "d_in=4, d_sae=8" in repr(StandardSAE(4, 8))


def test_members_of_a_stack_start_apart():
    sae = StandardSAE(4, 8, stack=2)
    assert not torch.equal(sae.W_dec[0], sae.W_dec[1])
