"""Section 11: the sparse step is the dense one, to rounding, and keeps no (batch, d_sae) tensor."""

import gc
import itertools
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, gradients, random_batch, random_sae, seeds, sizes
from torch.utils._python_dispatch import TorchDispatchMode

import gated_sae
from gated_sae import (
    GatedSAE,
    candidates,
    evaluate,
    find_support,
    rounding,
    sparse_losses,
    train,
)
from toy_data import SuperpositionData

ABLE = [name for name in VARIANTS if name not in ("gated untied", "gated sigmoid", "soft cutoff")]
ABLE.remove("jumprelu")
DATA = SuperpositionData(8, 16, firing=0.1, seed=3)
stacks = st.sampled_from([(), (3,), (2, 3)])


def gate_bias(sae):
    return sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc


def shifted(variant, size, seed, shift, **options):
    """A random SAE whose gates open often or seldom; one latent is dead, and one always fires."""
    sae = random_sae(variant, size, seed, **options)
    with torch.no_grad():
        gate_bias(sae).add_(shift)
        if size[1] > 2:
            gate_bias(sae)[..., 0], gate_bias(sae)[..., 1] = -1e3, 1e3
    return sae


# -- The same losses and gradients -----------------------------------------------------------------


@example("gated", (3, 5), 0, (), True, -1e6, False)  # no gate opens
@example("gated", (3, 5), 0, (2, 3), True, 1e6, False)  # all do
@example("standard norm", (3, 5), 0, (3,), False, -1e6, True)
@given(st.sampled_from(ABLE), sizes, seeds, stacks, st.booleans(), st.floats(-8, 8), st.booleans())
def test_losses_and_gradients_are_the_dense_ones(
    variant, size, seed, stack, shared, shift, normalize
):
    sae = shifted(variant, size, seed, shift, stack=stack, normalize=normalize)
    x = random_batch(*(() if shared else stack), 7, size[0], seed=seed).requires_grad_()
    dense, sparse = sae.losses(x), sparse_losses(sae, x)
    assert_equal(sparse, dense)
    weight = 0.1 + torch.rand(stack, generator=torch.Generator().manual_seed(seed)).double()
    assert_equal(
        gradients(sae, sparse.total(weight).sum()), gradients(sae, dense.total(weight).sum())
    )


@given(seeds, st.sampled_from(["standard", "gated", "gated unfrozen"]))
def test_float32_gradients_agree_to_rounding(seed, variant):
    sae = shifted(variant, (24, 64), seed, -3.0, stack=(2,)).float()
    x = random_batch(50, 24, seed=seed).float()
    dense = gradients(sae, sae.losses(x).total(0.3).sum())
    sparse = gradients(sae, sparse_losses(sae, x).total(0.3).sum())
    for name, grad in dense.items():
        assert (grad - sparse[name]).abs().max() <= 2e-5 * grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("block", [1, 3, 8, 40, 1000])
def test_the_size_of_blocks_changes_nothing(block, monkeypatch):
    sae = shifted("gated", (4, 9), 0, -1.0, stack=(2, 3))
    x = random_batch(7, 4, seed=0)
    expected, before = find_support((x - sae.b_dec.unsqueeze(-2)).detach(), sae.W_enc, sae.b_gate)
    monkeypatch.setattr(gated_sae, "BLOCK", block)
    found, z = find_support((x - sae.b_dec.unsqueeze(-2)).detach(), sae.W_enc, sae.b_gate)
    assert_equal((found.row, found.latent), (expected.row, expected.latent))
    assert_equal(z, before)


# -- The rough product misses nothing --------------------------------------------------------------


@given(seeds, st.integers(0, 3), st.integers(0, 38))
def test_a_product_in_bfloat16_finds_every_open_gate(seed, spread, n_shut):
    """Also where rows, columns and biases are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    x = draw(40, 256) * (spread * draw(40, 1)).exp() * (spread * draw(1, 256)).exp()
    W = draw(256, 64) * (spread * draw(256, 1)).exp() * (spread * draw(1, 64)).exp()
    in_order = (x @ W).sort(dim=0).values
    b = -in_order[n_shut : n_shut + 2].mean(0)  # between two entries of each latent
    is_open = (x @ W + b > 0).T.flatten()
    assert is_open.sum() == 64 * (39 - n_shut)
    rough = marked(candidates(x, W.T, b, torch.bfloat16), is_open)
    assert (rough | ~is_open).all()
    support, z = find_support(x, W, b)
    assert_equal(marked(support, is_open), is_open)
    assert_equal(z, (x @ W).T.flatten()[is_open])


@pytest.mark.parametrize("d_in", range(256, 320, 3))
def test_no_open_gate_is_missed_where_all_roundings_pull_one_way(d_in):
    """x and c lie just below the middle between two bfloat16 numbers, and both are rounded down."""
    x = torch.full((8, d_in), 1 + 0.98 * 2**-8, dtype=torch.float64)
    W = x.T.contiguous()
    b = -(x @ W)[0] * (1 - 1e-6)
    assert len(candidates(x, W.T, b, torch.bfloat16).row) == 64


def marked(support, like):
    mask = torch.zeros_like(like)
    mask[support.latent * support.x_shape[-2] + support.row] = True
    return mask


def test_where_bfloat16_is_fast_the_support_is_the_same(monkeypatch):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    sae = GatedSAE(256, 512)
    found = []
    for fast in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"amx_bf16": fast})
        support, _ = find_support(x, sae.W_enc, sae.b_gate - 2.5)
        found.append((support.row, support.latent))
    assert len(found[0][0]) > 100
    assert_equal(found[0], found[1])


# -- Training and evaluation -----------------------------------------------------------------------


def trained(variant, sparse, **options):
    sae = shifted(variant, (8, 16), 0, -1.0, stack=options.pop("stack", ()))
    options = dict(l1=0.1, steps=30, lr=1e-3, device="cpu", sparse=sparse) | options
    records = list(train(sae, DATA.batches(64, seed=0), **options))
    return sae, records[-1]


@pytest.mark.parametrize("options", [{}, {"stack": (3,)}, {"resample_every": 7}])
@pytest.mark.parametrize("variant", ["standard", "gated", "gated natural"])
def test_training_ends_where_the_dense_one_ends(variant, options):
    (dense, a), (sparse, b) = (trained(variant, which, **options) for which in (False, True))
    assert_equal(dict(sparse.state_dict()), dict(dense.state_dict()), rtol=1e-6, atol=1e-8)
    assert_equal(b.losses, a.losses)


@pytest.mark.parametrize("variant", ["standard", "gated", "gated natural"])
@pytest.mark.parametrize("stack", [(), (2, 3)])
def test_metrics_are_the_dense_ones(variant, stack):
    sae = shifted(variant, (8, 16), 0, -1.0, stack=stack)
    batches = [x.double() for x in itertools.islice(DATA.batches(50, seed=0), 3)]
    dense, sparse = (vars(evaluate(sae, batches, sparse=which)) for which in (False, True))
    assert dense.pop("n_rows") == sparse.pop("n_rows") == 150
    assert_equal(sparse, dense)


def test_training_takes_the_sparse_path_once_few_latents_fire(monkeypatch):
    """Half fire at the start, few later; a stack of six is large enough to be worth it."""
    taken, original = [], sparse_losses

    def watched(sae, x):
        taken.append((sae.encode(x) > 0).double().mean())
        return original(sae, x)

    monkeypatch.setattr(gated_sae, "sparse_losses", watched)
    data = SuperpositionData(16, 64, firing=0.03)
    options = dict(l1=3.0, steps=200, lr=1e-2, log_every=200, device="cpu")
    sae, dense = (GatedSAE(16, 64, stack=6, dtype=torch.float64) for _ in range(2))
    list(train(sae, data.batches(512, seed=0), **options))
    assert 20 <= len(taken) <= 180
    assert taken[0] < 1.2 / 16
    assert evaluate(sae, [next(data.batches(512, seed=1))]).l0.mean() < 4
    taken.clear()
    list(train(dense, data.batches(512, seed=0), sparse=False, **options))
    assert_equal(dict(sae.state_dict()), dict(dense.state_dict()), rtol=1e-5, atol=1e-7)
    list(train(GatedSAE(16, 64), data.batches(512, seed=0), **options))  # small: dense is faster
    assert not taken


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in ABLE])
def test_what_has_no_such_path_refuses_to_be_forced(variant):
    sae = VARIANTS[variant](8, 16)
    with pytest.raises(ValueError, match="expected a Standard or a tied Gated SAE"):
        list(train(sae, DATA.batches(8, seed=0), l1=0.1, steps=1, sparse=True, device="cpu"))
    with pytest.raises(ValueError, match="expected a Standard or a tied Gated SAE"):
        evaluate(sae, [next(DATA.batches(8, seed=0))], sparse=True)
    evaluate(sae, [next(DATA.batches(8, seed=0))])


def test_frozen_parameters_get_no_gradient():
    sae = shifted("gated", (8, 16), 0, -1.0).requires_grad_(False)
    for name in ("r_mag", "b_mag"):
        getattr(sae, name).requires_grad_(True)
    x = random_batch(20, 8, seed=0)
    for terms in (sae.losses(x), sparse_losses(sae, x)):
        sae.zero_grad()
        terms.total(0.3).backward()
        assert {n for n, p in sae.named_parameters() if p.grad is not None} == {"r_mag", "b_mag"}


def test_x_gets_no_gradient_rather_than_a_part_of_it():
    x = random_batch(20, 8, seed=0).requires_grad_()
    sparse_losses(shifted("gated", (8, 16), 0, -1.0), x).total(0.3).backward()
    assert x.grad is None


@pytest.mark.parametrize("broken", ["x", "W_enc", "W_dec", "b_gate"])
def test_a_nan_shows_in_the_loss(broken):
    sae = shifted("gated", (8, 16), 0, -1.0)
    x = random_batch(20, 8, seed=0)
    with torch.no_grad():
        (x if broken == "x" else getattr(sae, broken))[..., -1] = math.nan
    assert sparse_losses(sae, x).total(0.3).isnan()


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_torch_may_round_float32_products_and_no_open_gate_is_missed(precision):
    """Under "medium" the factors of float32 products become bfloat16 on some CPUs."""
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    sae = GatedSAE(64, 256)
    pi = (x @ sae.W_enc).detach()
    with torch.no_grad():
        sae.b_gate.copy_(-pi.quantile(0.95, dim=0))
    expected = (x.double() @ sae.W_enc.double() + sae.b_gate.double() > 1e-5).T.flatten()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        support, z = find_support(x, sae.W_enc, sae.b_gate)
    finally:
        torch.set_float32_matmul_precision(before)
    assert (marked(support, expected) | ~expected).all()
    exact = (x.double() @ sae.W_enc.double()).T.flatten()[marked(support, expected)]
    assert_equal(z.double(), exact, rtol=1e-5, atol=1e-5)


def test_the_newer_precision_switches_are_allowed_for(monkeypatch):
    def refuse():
        raise RuntimeError("mix of the legacy and new APIs")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", refuse)
    assert rounding(torch.float32) == rounding(torch.bfloat16) == 2**-7
    assert rounding(torch.float64) == 2**-52


def test_half_precision_is_evaluated_by_the_dense_path():
    sae = GatedSAE(16, 4096, dtype=torch.bfloat16)
    with torch.no_grad():
        sae.b_gate.fill_(-6.0)
    batches = [random_batch(64, 16, seed=i).bfloat16() for i in range(3)]
    assert evaluate(sae, batches).l0 < 4096 / 16


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    sae = shifted("gated", (8, 16), 0, -1.0)
    losses = sparse_losses(sae, random_batch(20, 8, seed=0))
    with torch.no_grad():
        sae.W_dec.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.total(0.3).backward()


# -- Work and memory -------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Counts dense matrix products, and the largest tensor that any operation gives."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.products += name in ("mm", "bmm", "addmm", "baddbmm")
        for value in out if isinstance(out, tuple | list) else (out,):
            if isinstance(value, torch.Tensor) and value.layout == torch.strided:
                self.largest = max(self.largest, value.numel())
        return out


def alive():
    """Sizes of all tensors there are, by identity."""
    gc.collect()
    tensors = [v for v in gc.get_objects() if issubclass(type(v), torch.Tensor)]
    return {id(v): v.numel() for v in tensors if v.layout == torch.strided}


@pytest.mark.parametrize("stack", [(), (3,)])
def test_a_dense_step_makes_three_products_on_its_way_forward(stack):
    """One of the encoder, two of the decoder."""
    sae, x = GatedSAE(8, 16, stack=stack), next(DATA.batches(64, seed=0))
    with Seen() as seen:
        sae.losses(x)
    assert seen.products == 3


def test_the_sparse_step_keeps_no_dense_tensor_for_the_backward_pass():
    """Nor has it one: it works by blocks."""
    batch, d_sae = 1024, 4096
    sae = GatedSAE(8, d_sae)
    with torch.no_grad():
        sae.b_gate.fill_(-2.0)
    x = torch.randn(batch, 8, generator=torch.Generator().manual_seed(0))
    before = alive()
    assert 0 < (sae.encode(x) > 0).float().mean() < 0.05
    with Seen() as seen:
        losses = sparse_losses(sae, x)
        kept = alive()
        losses.total(0.1).backward()
    assert seen.largest <= max(gated_sae.BLOCK, sae.W_enc.numel()) < batch * d_sae
    assert max(kept[name] for name in kept.keys() - before.keys()) < batch * d_sae / 8


def test_sparse_training_makes_no_dense_tensor_for_records_or_resampling():
    """Resampling also needs the rows' errors, and latents that are drawn anew."""
    batch, d_sae = 1024, 4096
    sae = GatedSAE(8, d_sae)
    with torch.no_grad():
        sae.b_gate.fill_(-2.0)
    x = torch.randn(3 * batch, 8, generator=torch.Generator().manual_seed(0)).split(batch)
    options = dict(l1=0.1, steps=3, log_every=1, resample_every=2, device="cpu", lr=1e-6)
    run = train(sae, x, sparse=True, **options)
    with Seen() as seen:
        assert [record.metrics.l0 > 1 for record in run] == [True] * 3
    assert seen.largest <= max(gated_sae.BLOCK, sae.W_enc.numel()) < batch * d_sae


# -- On a GPU --------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", ["standard", "gated", "gated unfrozen", "gated natural"])
def test_losses_and_gradients_on_cuda_are_those_on_the_cpu(variant, sparse):
    sae = shifted(variant, (32, 128), 0, -2.0, stack=(2,))
    x = random_batch(64, 32, seed=0)
    expected, grads = sae.losses(x), gradients(sae, sae.losses(x).total(0.3).sum())
    sae.cuda()
    found = sparse_losses(sae, x.cuda()) if sparse else sae.losses(x.cuda())
    grads_found = gradients(sae, found.total(0.3).sum())
    assert_equal([v.cpu() for v in found], list(expected))
    assert_equal({name: grad.cpu() for name, grad in grads_found.items()}, grads)


@pytest.mark.cuda
@pytest.mark.parametrize("sparse", [False, True, None])
def test_training_on_cuda_ends_where_the_cpu_ends(sparse):
    ends = []
    for device in ("cpu", "cuda"):
        sae = shifted("gated", (8, 16), 0, -1.0)
        options = dict(l1=0.1, steps=30, lr=1e-3, device=device, sparse=sparse)
        list(train(sae, DATA.batches(64, seed=0), **options))
        ends.append({name: value.cpu() for name, value in sae.state_dict().items()})
    assert_equal(*ends, rtol=1e-6, atol=1e-8)


@pytest.mark.cuda
def test_between_records_the_dense_loop_never_waits_for_the_device():
    data = SuperpositionData(32, 128, firing=0.1, correlation=0.2, device="cuda")
    batches, drawn = list(itertools.islice(data.batches(256, seed=0), 50)), []
    stream = (drawn.append(x) or x for x in batches)
    records = train(GatedSAE(32, 128), stream, l1=0.1, steps=50, log_every=50)
    next(records)  # step 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            next(records)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(drawn) == 50  # the last step is a record, and no other waited


@pytest.mark.cuda
def test_a_nan_on_cuda_is_reported_at_the_next_record_and_stops_the_steps():
    batches = [x.cuda() for x in itertools.islice(DATA.batches(32, seed=0), 40)]
    batches[25][7, 2] = math.nan
    sae, until = GatedSAE(8, 16), GatedSAE(8, 16)
    options = dict(l1=0.1, lr=1e-2, lr_warmup=0.0, l1_warmup=0.0, lr_decay=0.0, log_every=20)
    list(train(until, batches[:25], steps=25, **options))
    with pytest.raises(ValueError, match="an earlier loss"):
        list(train(sae, batches, steps=40, **options))
    assert_equal(dict(sae.state_dict()), dict(until.state_dict()), rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_autocast_trains_in_bfloat16_and_keeps_float32():
    fvu = []
    for autocast in (None, torch.bfloat16):
        sae = GatedSAE(8, 16)
        options = dict(l1=0.1, steps=300, lr=1e-2, autocast=autocast, device="cuda")
        *_, last = train(sae, DATA.batches(256, seed=0), **options)
        assert {p.dtype for p in sae.parameters()} == {torch.float32}
        assert last.losses.reconstruct.dtype == torch.float32
        fvu.append(last.metrics.fvu.item())
    assert fvu[1] == pytest.approx(fvu[0], rel=0.2)


def test_autocast_keeps_parameters_and_losses_in_float32():
    """On the CPU: near the float32 result, but not it."""
    (exact, a), (rough, b) = (
        (
            sae := GatedSAE(8, 16),
            list(
                train(
                    sae,
                    DATA.batches(64, seed=0),
                    l1=0.1,
                    steps=30,
                    lr=1e-2,
                    device="cpu",
                    autocast=autocast,
                )
            )[-1],
        )
        for autocast in (None, torch.bfloat16)
    )
    assert {p.dtype for p in rough.parameters()} == {torch.float32}
    assert b.losses.reconstruct.dtype == torch.float32
    assert 0 < (rough.W_dec - exact.W_dec).abs().max() < 0.1
    assert b.metrics.fvu.item() == pytest.approx(a.metrics.fvu.item(), rel=0.1)
