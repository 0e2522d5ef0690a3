"""Section 10: loss recovered, its price in compute, and attributions that cannot see a jump."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gated_sae import (
    activation_patching,
    attribution_patching,
    compute_multiple,
    integrated_gradients,
    jump_relu,
    loss_recovered,
)

seeds = st.integers(0, 2**32 - 1)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 6))  # batch, d
ces = st.floats(0.5, 20)
slopes = st.floats(0.02, 1)


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_equal(a, b, **tolerance):
    torch.testing.assert_close(a, b, **tolerance)


# -- D1: loss recovered ----------------------------------------------------------------------------


@given(ces, st.floats(-1, 15), st.floats(-1, 15), st.floats(0.1, 10), st.floats(0.1, 10))
def test_the_ablation_never_changes_which_sae_is_better(clean, hit_a, hit_b, zero, mean):
    """D1: under either ablation the SAE of lower CE scores higher."""
    assume(abs(hit_a - hit_b) > 1e-9)
    for ablated in (clean + zero, clean + mean):
        a, b = (loss_recovered(clean + hit, clean, ablated) for hit in (hit_a, hit_b))
        assert (a > b) == (hit_a < hit_b)


@given(ces, st.floats(-1, 15), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_weaker_baseline_inflates_the_score(clean, hit, mean, more):
    """D1: what is not recovered shrinks by the ratio of the gaps. A negative hit is deflated."""
    by_mean = loss_recovered(clean + hit, clean, clean + mean)
    by_zero = loss_recovered(clean + hit, clean, clean + mean + more)
    assert 1 - by_zero == pytest.approx((1 - by_mean) * mean / (mean + more), abs=1e-9)
    if abs(hit) > 1e-6:
        assert (by_zero > by_mean) == (hit > 0)


@given(ces, st.floats(0.1, 10), st.floats(-1, 2), ces)
def test_loss_recovered_is_affine_from_ablated_to_clean(clean, gap, t, size):
    """D1: 0 at the ablated loss, 1 at the clean one, linear between; the unit does not matter."""
    ablated = clean + gap
    score = loss_recovered(size * (ablated - t * gap), size * clean, size * ablated)
    assert isinstance(score, float)
    assert score == pytest.approx(t, abs=1e-8)


def test_loss_recovered_of_tensors_is_that_of_each():
    sae, ablated = torch.tensor([3.0, 4.0]).double(), torch.tensor([[5.0], [9.0]]).double()
    expected = [[loss_recovered(s, 2.0, a) for s in (3.0, 4.0)] for a in (5.0, 9.0)]
    assert_equal(loss_recovered(sae, 2.0, ablated), torch.tensor(expected).double())


@pytest.mark.parametrize("ablated", [3.0, 2.5, math.inf, math.nan])
def test_an_ablation_that_does_not_hurt_is_refused(ablated):
    """At the clean loss there is no scale; below it the order of two SAEs would be reversed."""
    with pytest.raises(ValueError, match="expected positive and finite"):
        loss_recovered(3.1, 3.0, ablated)
    with pytest.raises(ValueError, match="expected positive and finite"):
        loss_recovered(torch.full((2,), 3.1), 3.0, torch.tensor([4.0, ablated]))


# -- D2: compute multiple --------------------------------------------------------------------------


def noisy_curve(n, b, seed):
    """n ≥ 2 points near L = 10 C^-b over decades; the noise is too small to turn the curve."""
    compute = 10.0 ** torch.arange(n, dtype=torch.float64)
    return compute, 10 * compute**-b * torch.exp(0.3 * b * randn(n, seed=seed).clamp(-2, 2))


@given(st.integers(2, 6), slopes, seeds, ces)
def test_no_hit_costs_nothing(n, b, seed, ce):
    """D2: also where the clean model is off the curve."""
    assert compute_multiple(*noisy_curve(n, b, seed), ce, ce).item() == 1


@given(st.integers(2, 6), slopes, seeds, ces, st.floats(0.5, 3), st.floats(1e-3, 1))
def test_a_larger_hit_leaves_a_smaller_share(n, b, seed, clean, sae, more):
    share = compute_multiple(*noisy_curve(n, b, seed), torch.tensor([sae, sae + more]), clean)
    assert share[1] < share[0]
    assert (share[0] < 1) == (sae > clean) or sae == pytest.approx(clean)


@given(slopes, ces, st.lists(st.floats(0, 12), min_size=2, max_size=6), st.floats(0, 3), seeds)
def test_a_power_law_is_inverted_exactly(b, scale, decades, down, seed):
    """D2: a model trained with the share `10^-down` has the spliced loss. The clean one is beyond
    the table, as the model under study is; its compute cancels."""
    assume(max(decades) - min(decades) > 0.1)
    compute = 10 ** torch.tensor(decades, dtype=torch.float64)
    big = 1e14
    clean, sae = scale * big**-b, scale * (big * 10**-down) ** -b
    share = compute_multiple(compute, scale * compute**-b, sae, clean)
    assert share.item() == pytest.approx(10**-down, rel=1e-6)


@given(st.integers(2, 8), slopes, seeds, st.floats(1, 2))
def test_the_fit_is_least_squares_in_logs(n, b, seed, ratio):
    """D2, against torch's own solver on columns (1, -log C)."""
    compute, loss = noisy_curve(n, b, seed)
    columns = torch.stack([torch.ones_like(compute), -compute.log()], -1)
    slope = torch.linalg.lstsq(columns, loss.log().unsqueeze(-1)).solution[1].item()
    share = compute_multiple(compute.tolist(), loss.tolist(), 3 * ratio, 3.0)
    assert share.log().item() == pytest.approx(-math.log(ratio) / slope, rel=1e-6, abs=1e-9)


@given(st.integers(2, 6), slopes, st.floats(0.1, 2), st.floats(1, 4), st.floats(0.1, 2))
def test_a_floor_makes_the_share_too_large(n, b, floor, beyond, down):
    """Below the losses in the table, L = E + A C^-b falls ever more slowly than any fit to it."""
    compute = 10.0 ** torch.arange(n, dtype=torch.float64)
    curve = lambda c: floor + 2 * c**-b  # noqa: E731
    big = compute.max() * 10 ** (beyond + down)
    share = compute_multiple(compute, curve(compute), curve(big * 10**-down), curve(big))
    assert share.item() > 10**-down


@pytest.mark.parametrize(
    ("compute", "loss", "sae", "clean", "says"),
    [
        ([1.0], [3.0], 2.0, 1.0, "n > 1 distinct"),
        ([5.0, 5.0], [3.0, 2.0], 2.0, 1.0, "n > 1 distinct"),
        ([], [], 2.0, 1.0, "n > 1 distinct"),
        ([1.0, 2.0, 3.0], [3.0, 2.0], 2.0, 1.0, "n > 1 distinct"),
        ([[1.0, 2.0]], [[3.0, 2.0]], 2.0, 1.0, "n > 1 distinct"),
        ([0.0, 2.0], [3.0, 2.0], 2.0, 1.0, "all positive"),
        ([1.0, 2.0], [3.0, -2.0], 2.0, 1.0, "all positive"),
        ([1.0, 2.0], [3.0, 2.0], 0.0, 1.0, "all positive"),
        ([1.0, 2.0], [3.0, 2.0], 2.0, math.nan, "all positive"),
        ([1.0, math.inf], [3.0, 2.0], 2.0, 1.0, "all positive"),
        ([1.0, 2.0], [2.0, 3.0], 2.0, 1.0, "b = -0.585, expected b > 0"),
        ([1.0, 2.0, 7.0], [0.1, 0.1, 0.1], 2.0, 1.0, "expected b > 0"),
        ([1.0, 10.0, 100.0], [0.7, 0.1, 0.7], 2.0, 1.0, "expected b > 0"),
    ],
)
def test_tables_without_a_falling_curve_are_refused(compute, loss, sae, clean, says):
    with pytest.raises(ValueError, match=says):
        compute_multiple(compute, loss, sae, clean)


# -- D3: what a gradient cannot see ----------------------------------------------------------------


def jump_and_shift(theta, w):
    """Σ w JumpReLU_θ(z) and Σ w ReLU(z - θ): (..., d) -> (...)."""
    return lambda z: (w * jump_relu(z, theta)).sum(-1), lambda z: (w * (z - theta).relu()).sum(-1)


def drawn(size, seed):
    """z, another point (batch, d), θ ≥ 0 and weights (d,), of a size at which much crosses."""
    batch, d = size
    z, other, theta, w = randn(2 * batch + 2, d, seed=seed).split([batch, batch, 1, 1])
    return 2 * z, 2 * other, theta[0].abs(), w[0]


@given(sizes, seeds, st.integers(1, 9))
def test_the_two_activations_have_the_same_attributions(size, seed, steps):
    """D3: bit by bit."""
    z, other, theta, w = drawn(size, seed)
    jump, shift = jump_and_shift(theta, w)
    assert_equal(
        integrated_gradients(jump, z, other, steps),
        integrated_gradients(shift, z, other, steps),
        rtol=0,
        atol=0,
    )
    both = [attribution_patching(fn, z, other) for fn in (jump, shift)]
    assert_equal(*both, rtol=0, atol=0)
    assert_equal(both[0], w * (z > theta) * (other - z))


@given(sizes, seeds)
def test_patching_sees_the_jump(size, seed):
    """D3: from 0 to z > θ, z in the one and z - θ in the other; down to 0, the same lost."""
    z, _, theta, w = drawn(size, seed)
    zero, fires = torch.zeros_like(z), z > theta
    for fn, gain in zip(jump_and_shift(theta, w), (z, z - theta), strict=True):
        assert_equal(activation_patching(fn, zero, z), w * fires * gain)
        assert_equal(activation_patching(fn, z, zero), -w * fires * gain)
        assert_equal(attribution_patching(fn, zero, z), zero, rtol=0, atol=0)


@given(sizes, seeds)
def test_attribution_differs_from_activation_by_the_jump(size, seed):
    """D3: what ReLU(z - θ) has of that error is its kink; JumpReLU has it and ±θ per crossing.

    Patched to θ itself there is no kink between, and the jump is the whole error.
    """
    z, other, theta, w = drawn(size, seed)
    jump, shift = jump_and_shift(theta, w)
    error = lambda fn, to: activation_patching(fn, z, to) - attribution_patching(fn, z, to)  # noqa: E731
    crossings = (other > theta).double() - (z > theta).double()
    assert_equal(error(jump, other) - error(shift, other), w * theta * crossings)
    edge = torch.where(z > theta, theta, z)
    assert_equal(error(jump, edge), -w * theta * (z > theta))
    assert_equal(error(shift, edge), torch.zeros_like(z))


@given(sizes, seeds)
def test_switching_off_is_the_one_patch_that_attribution_gets_right(size, seed):
    """D3: z -> 0 costs JumpReLU exactly gradient times z: its branches are linear through 0.

    So the same two methods that part on the way up agree on the way down; ReLU(z - θ) parts there.
    """
    z, _, theta, w = drawn(size, seed)
    jump, shift = jump_and_shift(theta, w)
    off = torch.zeros_like(z)
    assert_equal(attribution_patching(jump, z, off), activation_patching(jump, z, off))
    wrong = attribution_patching(shift, z, off) - activation_patching(shift, z, off)
    assert_equal(wrong, -w * theta * (z > theta))


@given(sizes, seeds)
def test_attribution_and_activation_patching_agree_on_linear_functions(size, seed):
    z, other, _, w = drawn(size, seed)
    fn = lambda z: (w * z).sum(-1) + 3  # noqa: E731
    assert_equal(attribution_patching(fn, z, other), w * (other - z))
    assert_equal(activation_patching(fn, z, other), w * (other - z))
    assert_equal(integrated_gradients(fn, z, other, 3), w * (z - other))


@given(sizes, seeds)
def test_activation_patching_keeps_the_other_coordinates(size, seed):
    """A product of coordinates: each effect depends on all the rest."""
    z, other, _, _ = drawn(size, seed)
    fn = lambda z: (1 + z).prod(-1)  # noqa: E731
    found = activation_patching(fn, z, other)
    for i in range(z.shape[-1]):
        patched = z.clone()
        patched[:, i] = other[:, i]
        assert_equal(found[:, i], fn(patched) - fn(z))


# -- D3: completeness ------------------------------------------------------------------------------


@given(sizes, seeds, st.integers(1, 5))
def test_integrated_gradients_are_exact_for_quadratics(size, seed, steps):
    """The midpoint rule is, at any number of steps: the gradient halfway, and complete."""
    z, other, _, w = drawn(size, seed)
    A = randn(size[1], size[1], seed=seed ^ 1)
    fn = lambda z: ((z @ A) * z).sum(-1) + z @ w  # noqa: E731
    found = integrated_gradients(fn, z, other, steps)
    assert_equal(found, (z - other) * ((z + other) / 2 @ (A + A.T) + w))
    assert_equal(found.sum(-1), fn(z) - fn(other))


@given(sizes, seeds)
def test_integrated_gradients_are_complete_for_smooth_functions(size, seed):
    """Summed where coordinates interact; each by itself where they do not."""
    z, other, _, w = drawn(size, seed)
    A = randn(size[1], 3, seed=seed ^ 1) / 2
    mixed = lambda z: (z @ A).sin().sum(-1)  # noqa: E731
    found = integrated_gradients(mixed, z, other, 500)
    assert_equal(found.sum(-1), mixed(z) - mixed(other), rtol=0, atol=1e-2)
    separate = lambda z: (w * z.sin()).sum(-1)  # noqa: E731
    found = integrated_gradients(separate, z, other, 500)
    assert_equal(found, w * (z.sin() - other.sin()), rtol=0, atol=1e-3)


@given(sizes, seeds, st.integers(1, 9), st.data())
def test_completeness_fails_by_exactly_the_jumps(size, seed, steps, data):
    """D3: θ at the edges of the rule's steps, where the rule is exact at any number of them."""
    batch, d = size
    ks = data.draw(st.lists(st.integers(0, 2 * steps), min_size=d, max_size=d))
    top, w = randn(2, d, seed=seed)
    z, zero = top.abs().repeat(batch, 1), torch.zeros(batch, d, dtype=torch.float64)
    theta = top.abs() * torch.tensor(ks) / steps
    jump, shift = jump_and_shift(theta, w)
    crossed = (w * theta * (z > theta)).sum(-1)
    for a, b, sign in ((zero, z, 1), (z, zero, -1)):
        found = integrated_gradients(jump, b, a, steps)
        assert_equal(found, sign * w * (z - theta).relu())
        assert_equal(jump(b) - jump(a) - found.sum(-1), sign * crossed)
        assert_equal(shift(b) - shift(a), integrated_gradients(shift, b, a, steps).sum(-1))


@given(sizes, seeds, st.integers(1, 50))
def test_a_kink_costs_at_most_half_a_step(size, seed, steps):
    """Between any two points, each coordinate: the ReLU's change, whichever of the two fn is."""
    z, other, theta, w = drawn(size, seed)
    found = integrated_gradients(jump_and_shift(theta, w)[0], z, other, steps)
    expected = w * ((z - theta).relu() - (other - theta).relu())
    assert ((found - expected).abs() <= (w * (z - other)).abs() / (2 * steps) + 1e-9).all()


# -- D3: how they are called -----------------------------------------------------------------------


def test_a_bare_step_has_no_attribution_but_an_effect():
    step = lambda z: (z > 1).double().sum(-1)  # noqa: E731
    z, off = torch.full((2, 3), 2.0).double(), torch.zeros(2, 3).double()
    assert_equal(integrated_gradients(step, z, off, 4), off)
    assert_equal(attribution_patching(step, z, off), off)
    assert_equal(activation_patching(step, z, off), off - 1)


@given(sizes, seeds, st.integers(2, 3))
def test_stacks_and_shared_points(size, seed, stack):
    """(stack, batch, d) with θ (stack, d) is each member alone; the other point may be one row."""
    z, other, theta, w = drawn(size, seed)
    z, other = torch.stack([z * (i + 1) for i in range(stack)]), other[0]
    theta = torch.stack([theta + i for i in range(stack)])
    jump = lambda theta: lambda z: (w * jump_relu(z, theta)).sum(-1)  # noqa: E731
    for method, more in (
        (integrated_gradients, [3]),
        (attribution_patching, []),
        (activation_patching, []),
    ):
        together = method(jump(theta), z, other, *more)
        alone = [method(jump(theta[i]), z[i], other.expand_as(z[i]), *more) for i in range(stack)]
        assert_equal(together, torch.stack(alone))


def test_attributions_need_no_graph_and_leave_none():
    z, other, theta, w = drawn((2, 3), 0)
    jump, _ = jump_and_shift(theta, w.requires_grad_())
    before = z.clone()
    with torch.no_grad():
        expected = attribution_patching(jump, z, other)
    assert not z.requires_grad
    z.requires_grad_()
    for found in (
        attribution_patching(jump, z, other),
        integrated_gradients(jump, z, other, 2),
        activation_patching(jump, z, other),
    ):
        assert not found.requires_grad
        assert found.shape == z.shape
    assert_equal(attribution_patching(jump, z, other), expected)
    assert_equal(z.detach(), before, rtol=0, atol=0)
    assert z.grad is None
    assert w.grad is None


@pytest.mark.parametrize("steps", [0, -1, 2.5, None])
def test_bad_steps_are_named(steps):
    with pytest.raises(ValueError, match=f"steps is {steps}, expected a positive integer"):
        integrated_gradients(lambda z: z.sum(-1), torch.ones(2, 3), torch.zeros(3), steps)


@pytest.mark.parametrize("fn", [torch.sum, torch.sin])
def test_a_function_that_does_not_give_one_number_per_row_is_named(fn):
    z = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"fn gave .*, expected \(2,\)"):
        integrated_gradients(fn, z, 0 * z, 2)
    with pytest.raises(ValueError, match=r"fn gave .*, expected \(2,\)"):
        attribution_patching(fn, z, 0 * z)
    with pytest.raises(ValueError, match=r"fn gave .*, expected \(2,\)"):
        activation_patching(fn, z, 0 * z)
