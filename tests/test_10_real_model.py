"""Section 10: activations out of a model, x̂ back into it, what it costs, and attributions."""

import itertools
import math
from collections import Counter
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from random_saes import assert_equal, random_batch, random_sae, seeds
from torch import nn

import gated_sae
from gated_sae import loss_recovered, splice
from results.claims import attribution_patching, compute_multiple, integrated_gradients

# -- Activations out of a model, and back into it --------------------------------------------------


class Block(nn.Linear):
    """As transformers have them: hidden states first in a tuple."""

    called = 0

    def forward(self, x):
        self.called += 1
        return super().forward(x), "cache"


class Model(nn.Module):
    def __init__(self, d=6, vocabulary=11):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, d), nn.Linear(d, vocabulary)
        self.first, self.second, self.unused = Block(d, d), Block(d, d), nn.Linear(d, d)

    def forward(self, input_ids, attention_mask=None):
        x, _ = self.first(self.embedding(input_ids))
        x, cache = self.second(x)
        assert cache == "cache"
        return self.head(x)


IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    """Afterwards, no hook is left on any of its modules."""
    torch.manual_seed(0)
    model = Model()
    yield model
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_harvested_is_what_the_module_puts_out(model, dtype):
    """In its dtype, and without padding. The rest of the model does not run."""
    expected = model.to(dtype).first(model.embedding(IDS))[0].detach()
    mask, every = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]), IDS >= 0
    padded = {"input_ids": IDS, "attention_mask": mask}
    found = gated_sae.harvest(model, model.first, [IDS, (IDS,), {"input_ids": IDS}, padded])
    for x, kept in zip(found, (every, every, every, mask.bool()), strict=True):
        assert_equal(x, expected[kept], rtol=0, atol=0)
        assert not x.requires_grad
    assert (model.first.called, model.second.called) == (5, 0)


class Anything(nn.Module):
    """Puts out x, whatever its shape, by way of another module."""

    def __init__(self, *inner):
        super().__init__()
        self.inner = nn.Sequential(*inner)

    def forward(self, x, attention_mask=None):
        return self.inner(x)


FITTING = [((6, 4), (2, 3)), ((6, 4), (6,))]  # experts, which see all tokens in a row
FITTING += [((2, 3, 5, 4), (2, 3))]  # heads, of which each token that counts has some
MISFITS = [((2, 3, 4), mask) for mask in ((2,), (2, 1, 3, 3), (2, 4))]
MISFITS += [((6, 4), (5,)), ((5, 4), (2, 3))]


@pytest.mark.parametrize(("x", "mask"), FITTING + MISFITS)
def test_a_mask_fits_or_both_shapes_are_shown(x, mask):
    fits, model, x = (x, mask) in FITTING, Anything(), random_batch(*x, seed=0)
    kept = torch.arange(math.prod(mask)).view(mask) % 2
    says = rf"input 0: attention_mask is .*{mask[-1]},?\), x \({x.shape[0]}, .*, expected"
    with nullcontext() if fits else pytest.raises(ValueError, match=says):
        (found,) = gated_sae.harvest(model, model.inner, [dict(x=x, attention_mask=kept)])
        rows = x.view(kept.numel(), -1, 4)[1::2].flatten(0, 1)
        assert_equal(found, rows, rtol=0, atol=0)


def test_reading_changes_nothing_and_drops_nothing():
    """A model in training mode reads in eval mode, and each module is put back into its own."""
    model, x = Anything(nn.BatchNorm1d(4), nn.Dropout(0.5)), torch.randn(20, 4)
    model.inner[1].eval()
    before, modes = str(model.state_dict()), [part.training for part in model.modules()]
    (found,) = gated_sae.harvest(model, model.inner, [x])
    assert str(model.state_dict()) == before
    assert [part.training for part in model.modules()] == modes == [True, True, True, False]
    assert_equal(found, model.eval()(x))
    with pytest.raises(RuntimeError):  # the model's own
        list(gated_sae.harvest(model.train(), model.inner, [torch.ones(3, 5)]))
    assert all(part.training for part in model.modules())
    assert not model.inner._forward_hooks


def test_first_tokens_and_long_rows_can_be_left_out_and_are_counted():
    """The first that count in each text: here padding comes first. Long ones: 0.4 %."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])
    model, x, left_out = Anything(), random_batch(3, 5, 4, seed=0), Counter()
    harvest = partial(gated_sae.harvest, model, model.inner)
    (found,) = harvest([dict(x=x, attention_mask=mask)], skip=2, left_out=left_out)
    assert_equal(found, torch.cat([x[0, 4:], x[1, 2:]]), rtol=0, atol=0)
    assert left_out == Counter(first=5, long=0)
    assert not list(harvest([dict(x=x[2:], attention_mask=mask[2:])], skip=1))
    rows = random_batch(500, 4, seed=1)
    rows[[7, 300]] *= 1000
    kept = torch.cat([rows[:7], rows[8:300], rows[301:]])
    assert_equal(next(harvest([rows], max_norm=20, left_out=left_out)), kept, rtol=0, atol=0)
    assert left_out == Counter(first=5, long=2)
    assert_equal(next(harvest([rows])), rows, rtol=0, atol=0)
    rows[3] = math.nan  # is shown to whoever comes next
    assert next(harvest([rows], max_norm=20)).isnan().any()
    for name, odd in (("skip", -1), ("skip", 1.5), ("max_norm", 0.0), ("max_norm", "a")):
        with pytest.raises(ValueError, match=f"{name} is"):
            next(harvest([rows], **{name: odd}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_hook_that_does_not_run_is_named(model):
    """As in a model that was compiled before, where torch.compile looks at hooks but once."""
    compiled = torch.compile(model.eval(), backend="eager")
    compiled(IDS)
    other, says = nn.Identity(), "the model never called .*torch.compile hides it"
    for module, run in ((model.unused, model), (other, compiled)):
        with pytest.raises(ValueError, match=says), splice(module, "zero"):
            run(IDS)
        with pytest.raises(ValueError, match=f"input 0: {says}"):
            next(gated_sae.harvest(run, module, [IDS]))
    with pytest.raises(IndexError):  # the model's own passes, and no hook is left
        list(gated_sae.harvest(model, model.first, [IDS + 100]))
    with splice(model.first, "zero"):  # seen by the torch of today
        assert_equal(compiled(IDS), model(IDS))


def test_rows_to_shuffle_are_rows_and_what_comes_out_is_no_view():
    for odd in (torch.randn(50, 8), [torch.randn(2, 5, 8)]):
        with pytest.raises(ValueError, match=r"got \(.*8,?\), expected \(tokens, d\)"):
            next(gated_sae.shuffle(odd, 4, 16))
    for name, odd in (("batch", (0, 16)), ("batch", (2.5, 16)), ("held", (4, 0))):
        with pytest.raises(ValueError, match=f"{name} is"):
            next(gated_sae.shuffle([torch.randn(5, 8)], *odd))
    for x in gated_sae.shuffle([torch.randn(500, 8)], 16, 100):
        assert x.untyped_storage().nbytes() == x.numel() * 4


lengths = st.lists(st.integers(1, 30), min_size=1, max_size=12)


@given(lengths, st.integers(1, 10), st.integers(1, 60), seeds)
def test_every_row_is_given_out_once_in_batches(lengths, batch, held, seed):
    """In bounded memory: `held`, or two batches, and a batch are read ahead of what is out."""
    n, read, out = sum(lengths), [0], []
    x = torch.arange(n).float().view(n, 1)
    counted = (read.append(len(part)) or part for part in x.split(lengths))
    for rows in gated_sae.shuffle(counted, batch, held, seed):
        assert sum(read) - sum(map(len, out)) <= max(held, 2 * batch) + max(lengths)
        out.append(rows)
    assert {len(rows) for rows in out[:-1]} <= {batch}
    assert 1 <= len(out[-1]) <= batch
    assert_equal(torch.cat(out).sort(dim=0).values, x)
    again = torch.cat(list(gated_sae.shuffle(x.split(lengths), batch, held, seed)))
    assert_equal(again, torch.cat(out))


def test_rows_are_mixed_over_what_is_held_and_no_further():
    x = torch.arange(1000.0).view(1000, 1)
    out, other = (torch.cat(list(gated_sae.shuffle(x.split(10), 10, 200, s))) for s in (0, 1))
    assert (out - x).abs().mean() > 30
    assert (x - out).min() >= -210  # never given out before it was read
    assert out[:200].max() >= 200  # half of what is held stays
    assert not torch.equal(out, other)


def test_what_is_spliced_in_is_what_the_rest_of_the_model_reads(model):
    x = model.first(model.embedding(IDS))[0]
    mean, sae = x.flatten(0, 1).mean(0), random_sae("gated", (6, 16), 0).float()
    rest = lambda v: model.head(model.second(v)[0])  # noqa: E731
    puts = (sae, sae(x)), ("zero", 0 * x), (mean, mean.expand_as(x)), (x.flip(0), x.flip(0))
    for put, stands_in in puts:
        with splice(model.first, put):
            assert_equal(model(IDS), rest(stands_in))
        assert_equal(model(IDS), rest(x), rtol=0, atol=0)
    with pytest.raises(KeyError), splice(model.first, "zero"):
        raise KeyError


def test_the_output_keeps_its_type_and_its_dtype():
    sae, x = random_sae("gated", (6, 16), 0).float(), torch.randn(2, 3, 6).bfloat16()
    new, module = sae(x.float()).bfloat16(), nn.Identity()
    for rest in (lambda x: x, lambda x: (x, 1), lambda x: [x], lambda x: gated_sae.Losses(x, 1, 2)):
        with splice(module, sae):
            out = module(rest(x))
        assert type(out) is type(rest(x))
        assert_equal(out, rest(new), rtol=0, atol=0)


SHAPES = (), (1,), (3, 1, 6), (2, 6), (5,)  # of which x, (3, 5, 6), has no row
WRONG = [(torch.zeros(shape), r"\(.*\), expected a row of x") for shape in SHAPES]
OTHERS = "mean", None, random_sae("gated", (6, 16), 0, stack=(2,))
WRONG += [(put, "('mean'|None|GatedSAE.*), expected a single SAE, 'zero' or") for put in OTHERS]


@pytest.mark.parametrize(("put", "says"), WRONG)
def test_what_cannot_be_spliced_in_is_named(model, put, says):
    """At once, but for what broadcasts."""
    with pytest.raises(ValueError, match=f"put is {says}"), splice(model.first, put):
        model(IDS)
    assert model.first.called == isinstance(put, torch.Tensor)


@pytest.mark.parametrize("output", ["text", (), torch.zeros(3), torch.zeros(3, 4).long()])
def test_an_output_without_activations_is_named(output):
    odd, says = nn.Identity(), "Identity put out .*, expected floats"
    with pytest.raises(TypeError, match=says), splice(odd, "zero"):
        odd(output)
    with pytest.raises(TypeError, match=says):
        list(gated_sae.harvest(odd, odd, [(output,)]))
    assert not odd._forward_hooks


# -- D1, D2: what splicing costs -------------------------------------------------------------------

ces, gaps, hits, slopes = (st.floats(*ends) for ends in ((0.5, 20), (0.1, 10), (-1, 15), (0.02, 1)))


@given(ces, st.lists(hits, min_size=1), st.lists(gaps, min_size=1), ces)
def test_loss_recovered_is_affine_from_ablated_to_clean(clean, hits, gaps, size):
    """D1: 1 at the clean loss, 0 at the ablated one, linear everywhere, in any unit. So an ablation
    that hurts more keeps the order, and what is not recovered shrinks by the ratio of the gaps."""
    for hit, gap in itertools.product(hits, gaps):
        score = loss_recovered(size * (clean + hit), size * clean, size * (clean + gap))
        assert isinstance(score, float)
        assert score == pytest.approx(1 - hit / gap, rel=0, abs=1e-9)
    hits, gaps = (torch.tensor(v, dtype=torch.float64) for v in (hits, gaps))
    together = loss_recovered(clean + hits, clean, clean + gaps.unsqueeze(-1))
    assert_equal(together, 1 - hits / gaps.unsqueeze(-1), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ablated", [3.0, 2.5, math.inf, math.nan])
@pytest.mark.parametrize("given_as", [float, lambda ablated: torch.tensor([4.0, ablated])])
def test_an_ablation_that_does_not_hurt_is_refused(ablated, given_as):
    """At the clean loss there is no scale; below it the order of two SAEs would be reversed."""
    with pytest.raises(ValueError, match="expected positive and finite"):
        loss_recovered(3.1, 3.0, given_as(ablated))


@given(slopes, ces, st.lists(st.floats(0, 12), min_size=2, max_size=6), st.floats(0, 3))
def test_a_power_law_is_inverted_exactly(b, scale, decades, down):
    """D2: the share 10^-down trains the spliced loss. The clean model is beyond the table."""
    assume(max(decades) - min(decades) > 0.1)
    compute, big = 10 ** torch.tensor(decades, dtype=torch.float64), 1e14
    clean, sae = scale * big**-b, scale * (big * 10**-down) ** -b
    share = compute_multiple(compute.tolist(), (scale * compute**-b).tolist(), sae, clean)
    assert share == pytest.approx(10**-down, rel=1e-6)
    share = compute_multiple([1, 10, 1000], [1000, 10, 1], 2.0, 1.0)  # off it: least squares
    assert share == pytest.approx(2 ** (-42 / 39))


@given(st.integers(2, 6), slopes, st.floats(0.1, 2), st.floats(1, 4), st.floats(0.1, 2))
def test_a_floor_makes_the_share_too_large(n, b, floor, beyond, down):
    """Below the losses in the table, L = E + A C^-b falls ever more slowly than any fit to it."""
    compute = 10.0 ** torch.arange(n, dtype=torch.float64)
    curve = lambda c: floor + 2 * c**-b  # noqa: E731
    big, table = 10 ** (n - 1 + beyond + down), (compute.tolist(), curve(compute).tolist())
    share = compute_multiple(*table, curve(big * 10**-down), curve(big))
    assert share > 10**-down


@pytest.mark.parametrize("loss", [[0.1, 0.1, 0.1], [2, 3, 5], [0.7, 0.1, 0.7]])
def test_tables_without_a_falling_curve_are_refused(loss):
    with pytest.raises(ValueError, match="expected it to fall"):
        compute_multiple([1, 10, 100], loss, 2.0, 1.0)


# -- D3: what a gradient cannot see ----------------------------------------------------------------


def jump_and_shift(theta, w):
    """Σ w JumpReLU_θ(z) and Σ w ReLU(z - θ): (..., d) -> (...)."""
    jump = lambda z: (w * gated_sae.jump_relu(z, theta)).sum(-1)  # noqa: E731
    return jump, lambda z: (w * (z - theta).relu()).sum(-1)


def activation_patching(fn, z, z_patch):
    """fn(z with z_patch in coordinate i) - fn(z) for each i, (..., d)."""
    at = torch.eye(z.shape[-1], dtype=torch.bool)
    return torch.stack([fn(torch.where(i, z_patch, z)) for i in at], -1) - fn(z).unsqueeze(-1)


@st.composite
def points(draw):
    """z, another point (batch, d), θ ≥ 0 and weights (d,), of a size at which much crosses."""
    batch, d = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    drawn = random_batch(2 * batch + 2, d, seed=draw(seeds))
    z, other, theta, w = drawn.split([batch, batch, 1, 1])
    return z, other, theta[0].abs() / 2, w[0] / 2


@given(points(), st.integers(1, 9))
def test_attributions_are_the_same_bit_by_bit_and_miss_the_jump(drawn, steps):
    """D3: what ReLU(z - θ) has of that error is its kink; JumpReLU has it and ±θ per crossing."""
    z, other, theta, w = drawn
    both, zero, lost = jump_and_shift(theta, w), torch.zeros_like(z), w * theta * (z > theta)
    for method in (partial(integrated_gradients, steps=steps), attribution_patching):
        jump, shift = (method(fn, z, other) for fn in both)
        assert_equal(jump, shift, rtol=0, atol=0)
    assert_equal(jump, w * (z > theta) * (other - z))

    def errors(to):
        return [activation_patching(fn, z, to) - attribution_patching(fn, z, to) for fn in both]

    jump, shift = errors(other)
    assert_equal(jump - shift, w * theta * ((other > theta).double() - (z > theta).double()))
    # Patched to θ itself there is no kink between, and the jump is the whole error.
    assert_equal(errors(theta.where(z > theta, z)), [-lost, zero])
    # Down to 0, attribution is right for JumpReLU alone, whose branches are linear through 0.
    assert_equal(errors(zero), [zero, lost])


@given(points())
def test_all_agree_on_linear_functions_and_only_patching_sees_a_bare_step(drawn):
    z, other, _, w = drawn
    linear, step = lambda z: (w * z).sum(-1) + 3, lambda z: (z > 1).double().sum(-1)
    crossings = (other > 1).double() - (z > 1).double()
    methods = partial(integrated_gradients, steps=4), attribution_patching, activation_patching
    for method, sign, seen in zip(methods, (-1, 1, 1), (0, 0, 1), strict=True):
        assert_equal(method(linear, z, other), sign * w * (other - z))
        assert_equal(method(step, z, other), seen * crossings)


@given(points(), st.integers(1, 9), st.data())
def test_completeness_fails_by_exactly_the_jumps(drawn, steps, data):
    """D3: θ at the edges of the rule's steps, where the rule is exact at any number of them."""
    z, _, _, w = drawn
    ks = data.draw(st.lists(st.integers(0, 2 * steps), min_size=len(w), max_size=len(w)))
    z = z[:1].abs().expand_as(z)
    theta, zero = z[0] * torch.tensor(ks) / steps, torch.zeros_like(z)
    jump, shift = jump_and_shift(theta, w)
    crossed = (w * theta * (z > theta)).sum(-1)
    for a, b, sign in ((zero, z, 1), (z, zero, -1)):
        found = integrated_gradients(jump, b, a, steps)
        assert_equal(found, sign * w * (z - theta).relu())
        assert_equal(jump(b) - jump(a) - found.sum(-1), sign * crossed)
        assert_equal(shift(b) - shift(a), integrated_gradients(shift, b, a, steps).sum(-1))
