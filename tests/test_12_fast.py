"""Section 12: the sparse step is the dense one, to rounding, and keeps no (batch, d_sae) tensor."""

import copy
import gc
import math
from functools import partial
from unittest.mock import Mock

import pytest
import random_saes
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from random_saes import VARIANTS, Seen, assert_equal, gradients, random_batch, seeds, sizes

import gated_sae
from gated_sae import GatedSAE, encoded, evaluate, fast_losses, find_support, train
from toy_data import SuperpositionData

UNABLE = ["gated untied", "gated sigmoid", "soft cutoff", "jumprelu"]
ABLE = [name for name in VARIANTS if name not in UNABLE]
sparse_losses = partial(fast_losses, sparse=True)
DATA = SuperpositionData(8, 16, firing=0.1, seed=3)
stacks = st.sampled_from([(), (3,), (2, 3)])
blocks = st.sampled_from([1, 3, 8, 1000])


def shifted(variant, size, seed, shift, **options):
    """A random SAE whose gates open often or seldom; one latent is dead, and one always fires."""
    sae = random_saes.random_sae(variant, size, seed, **options)
    bias = sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc
    bias.data += shift
    if size[1] > 2:
        bias.data[..., 0], bias.data[..., 1] = -1e3, 1e3
    return sae


def plain(d_in, d_sae, rows, shift=0):
    """A Gated SAE with W_enc = W_decᵀ, its gates' biases shifted, and normal rows."""
    sae = GatedSAE(d_in, d_sae)
    sae.W_enc.data *= 10
    sae.b_gate.data += shift
    return sae, torch.randn(rows, d_in, generator=torch.Generator().manual_seed(0))


# -- The same losses and gradients -----------------------------------------------------------------


@example("gated", (3, 5), 0, (), True, -1e6)  # no gate opens
@example("gated", (3, 5), 0, (2, 3), True, 1e6)  # all do
@example("standard norm", (3, 5), 0, (3,), False, -1e6)
@given(st.sampled_from(ABLE), sizes, seeds, stacks, st.booleans(), st.floats(-8, 8))
def test_losses_and_gradients_by_hand_are_autograds(variant, size, seed, stack, shared, shift):
    """Each term has a weight of its own; twice from one graph."""
    sae = shifted(variant, size, seed, shift, stack=stack)
    x = random_batch(*(() if shared else stack), 7, size[0], seed=seed).requires_grad_()
    weights = 0.1 + torch.rand(3, *stack, generator=torch.Generator().manual_seed(seed)).double()
    total = lambda losses: sum((w * v).sum() for w, v in zip(weights, losses, strict=True))  # noqa: E731
    slow = sae.losses(x)
    expected = gradients(sae, total(slow))
    for sparse in (False, True):
        fast = fast_losses(sae, x, sparse)
        assert_equal(fast, slow)
        for _ in range(2):
            assert_equal(gradients(sae, total(fast), retain_graph=True), expected)
    total(fast).backward()
    assert x.grad is None  # rather than a part of it


@given(st.sampled_from(ABLE), sizes, seeds, stacks, st.floats(-8, 8), st.booleans(), blocks)
def test_metrics_are_those_of_f(variant, size, seed, stack, shift, sparse, block):
    """And the size of blocks changes nothing."""
    sae = shifted(variant, size, seed, shift, stack=stack)
    x = random_batch(7, size[0], seed=seed).split(3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gated_sae, "BLOCK", block)
        monkeypatch.setattr(gated_sae, "encoded", lambda sae, x, _: encoded(sae, x, sparse))
        fast = vars(evaluate(sae, x))
        monkeypatch.setattr(gated_sae.Metrics, "code", gated_sae.dense_code)
        assert_equal(fast, vars(evaluate(sae, x)))


@given(seeds, st.sampled_from(["standard", "gated", "gated unfrozen"]))
def test_float32_gradients_agree_to_rounding(seed, variant):
    sae = shifted(variant, (24, 64), seed, -3.0, stack=(2,)).float()
    x = random_batch(50, 24, seed=seed).float()
    slow = gradients(sae, sae.losses(x).total(0.3).sum())
    for sparse in (False, True):
        fast = gradients(sae, fast_losses(sae, x, sparse).total(0.3).sum())
        for name, grad in slow.items():
            assert (grad - fast[name]).abs().max() <= 2e-5 * grad.abs().max() + 1e-6, name


@pytest.mark.parametrize("broken", ["x", "W_enc", "W_dec", "b_gate"])
@pytest.mark.parametrize("rough", [False, True])
def test_a_nan_shows_in_the_loss(broken, rough, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": rough})
    sae, x = shifted("gated", (256, 128), 0, -140.0), random_batch(20, 256, seed=0)
    (x if broken == "x" else getattr(sae, broken).data)[..., -1] = math.nan
    assert sparse_losses(sae, x).total(0.3).isnan()


def test_a_weight_changed_before_the_backward_pass_is_noticed():
    sae = shifted("gated", (8, 16), 0, -1.0)
    losses = sparse_losses(sae, random_batch(20, 8, seed=0))
    with torch.no_grad():
        sae.W_dec.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        losses.total(0.3).backward()


@pytest.mark.parametrize("variant", [*UNABLE, "bfloat16", "autocast"])
def test_what_has_no_such_path_refuses_it_and_trains_densely(variant):
    dtype = torch.bfloat16 if variant == "bfloat16" else None
    sae = VARIANTS.get(variant, GatedSAE)(8, 4096, dtype=dtype)
    (sae.b_gate if isinstance(sae, GatedSAE) else sae.b_enc).data -= 0.2  # few fire, but for soft
    x = next(DATA.batches(64, seed=0)).to(dtype)
    if variant != "autocast":
        with pytest.raises(ValueError, match="expected a Standard or a tied Gated SAE"):
            sparse_losses(sae, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=variant == "autocast"):
        assert_equal(fast_losses(sae, x), sae.losses(x), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_where_torch_rounds_products_the_losses_are_as_exact_as_the_dense(precision, request):
    """Under "medium" the factors of float32 products become bfloat16 on some CPUs."""
    sae, x = plain(64, 256, rows=500)
    sae.b_gate.data -= (x @ sae.W_enc).quantile(0.95, dim=0)
    exact = copy.deepcopy(sae).double().losses(x.double())
    before = torch.get_float32_matmul_precision()
    request.addfinalizer(partial(torch.set_float32_matmul_precision, before))
    torch.set_float32_matmul_precision(precision)
    for found, dense, truth in zip(sparse_losses(sae, x), sae.losses(x), exact, strict=True):
        assert (found - truth).abs() <= 2 * (dense - truth).abs() + 1e-6 * truth


# -- The rough product misses nothing --------------------------------------------------------------


def support_of(x, W, b, block=2**21):
    """Where z + b > 0, (latent, row), by a first look in bfloat16, and z there."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(gated_sae, "BLOCK", block)
        support, z = find_support(x, W, b, torch.bfloat16)
    found = torch.zeros(len(b), len(x), dtype=torch.bool)
    found[support.latent, support.row] = True
    return found, z


@given(seeds, st.integers(0, 3), st.integers(0, 38), st.sampled_from([1000, 2**21]))
def test_a_product_in_bfloat16_finds_every_open_gate(seed, spread, n_shut, block):
    """Also where rows, columns and biases are of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).double()  # noqa: E731
    x = draw(40, 256) * (spread * draw(40, 1)).exp() * (spread * draw(1, 256)).exp()
    W = draw(256, 64) * (spread * draw(256, 1)).exp() * (spread * draw(1, 64)).exp()
    in_order = (x @ W).sort(dim=0).values
    b = -in_order[n_shut : n_shut + 2].mean(0)  # between two entries of each latent
    is_open = (x @ W + b > 0).T
    assert is_open.sum() == 64 * (39 - n_shut)
    found, z = support_of(x, W, b, block)
    assert_equal(found, is_open)
    assert_equal(z, (x @ W).T[is_open])


@pytest.mark.parametrize("cancels", [False, True])
@pytest.mark.parametrize("d_in", range(256, 320, 3))
def test_no_open_gate_is_missed_where_all_roundings_pull_one_way(d_in, cancels):
    """x and w lie near the middle between two bfloat16 numbers: all products become smaller. Their
    sum is large, as the bias is, or next to nothing."""
    x = torch.full((8, 2 * d_in), 1 + 0.98 * 2**-8, dtype=torch.float64)
    if cancels:
        x[:, d_in:] = 1 + 1.02 * 2**-8
    W = x.T.clone()
    W[d_in:] *= -1 if cancels else 1
    found, _ = support_of(x, W, -(x @ W)[0] + 1e-4)
    assert found.all()


def test_where_bfloat16_is_fast_the_losses_are_the_same(monkeypatch):
    sae, x = plain(256, 512, rows=64, shift=-2.5)
    look = Mock(wraps=find_support)
    monkeypatch.setattr(gated_sae, "find_support", look)
    for rough in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda rough=rough: {"amx_bf16": rough})
        assert_equal(sparse_losses(sae, x), sae.losses(x))
    assert [call.args[3] for call in look.call_args_list] == [torch.float32, torch.bfloat16]


# -- Training --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stack", "every"), [((), None), ((3,), None), ((), 7)])
@pytest.mark.parametrize("variant", ["standard", "gated", "gated natural"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_training_ends_where_the_dense_one_ends(variant, stack, every, device):
    ends, options = [], dict(l1=0.1, steps=30, lr=1e-3, resample_every=every)
    for on in ("cpu", device):
        sae = shifted(variant, (8, 16), 0, -1.0, stack=stack)
        options |= dict(losses=partial(sparse_losses, sae) if ends else sae.losses, device=on)
        *_, last = train(sae, DATA.batches(64, seed=0), **options)
        ends.append(sae.cpu().state_dict() | {k: v.cpu() for k, v in last.losses._asdict().items()})
    assert_equal(*ends, rtol=1e-6, atol=1e-8)


def test_training_takes_the_sparse_path_once_few_latents_fire(monkeypatch):
    """Not so many, at some steps, do; a stack of six is large enough to be worth it."""
    taken, shares = Mock(wraps=find_support), []
    monkeypatch.setattr(gated_sae, "find_support", taken)
    data = SuperpositionData(64, 64, firing=0.03)
    options = dict(l1=3.0, steps=200, lr=1e-2, log_every=200, device="cpu")
    sae, dense = (GatedSAE(64, 64, stack=6, dtype=torch.float64) for _ in range(2))

    def watched(x):
        shares.append((dense.encode(x[:8]) > 0).double().mean())
        return dense.losses(x)

    list(train(GatedSAE(64, 64), data.batches(512, seed=0), **options))  # small: dense is faster
    assert not taken.called
    list(train(dense, data.batches(512, seed=0), losses=watched, **options))
    taken.reset_mock()
    *_, last = train(sae, data.batches(512, seed=0), **options)
    assert taken.call_count == sum(share < 1 / 12 for share in shares) + 2  # for two Records
    assert 20 <= taken.call_count < 202
    assert last.metrics.l0.mean() < 4
    assert_equal(sae.state_dict(), dense.state_dict(), rtol=1e-5, atol=1e-7)


# -- Work and memory -------------------------------------------------------------------------------


def alive():
    """Sizes of all tensors there are, by identity."""
    gc.collect()
    tensors = [v for v in gc.get_objects() if issubclass(type(v), torch.Tensor)]
    return {id(v): v.numel() for v in tensors if v.layout == torch.strided}


def test_the_sparse_step_keeps_no_dense_tensor_for_the_backward_pass():
    """Nor has it one: it works by blocks."""
    sae, x = plain(8, 4096, rows=1024, shift=-2)
    before = alive()
    assert 0 < (sae.encode(x) > 0).float().mean() < 0.05
    with Seen() as seen:
        losses = sparse_losses(sae, x)
        kept = alive()
        losses.total(0.1).backward()
    assert seen.largest <= max(gated_sae.BLOCK, sae.W_enc.numel()) < 1024 * 4096
    assert max(kept[name] for name in kept.keys() - before.keys()) < 1024 * 4096 / 8


def test_training_makes_no_dense_tensor_for_records_or_resampling():
    """Nor to find silent latents. Which all need f, or the rows' errors: of some rows at a time."""
    sae, x = plain(32, 2**15, rows=2 * 640, shift=-2)
    with Seen() as seen:
        run = train(sae, x.split(640), l1=0.1, steps=2, resample_every=1, device="cpu", lr=1e-6)
        assert [record.metrics.l0 > 1 for record in run] == [True] * 2
    assert seen.largest <= 2**24 < 640 * 2**15


@pytest.mark.cuda
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("variant", ["standard", "gated", "gated unfrozen", "gated natural"])
def test_losses_and_gradients_on_cuda_are_those_on_the_cpu(variant, sparse):
    sae, x = shifted(variant, (32, 128), 0, -2.0, stack=(2,)), random_batch(64, 32, seed=0)
    expected, grads = sae.losses(x), gradients(sae, sae.losses(x).total(0.3).sum())
    found = sparse_losses(sae.cuda(), x.cuda()) if sparse else sae.cuda().losses(x.cuda())
    grads_found = gradients(sae, found.total(0.3).sum())
    assert_equal([v.cpu() for v in found], list(expected))
    assert_equal({name: grad.cpu() for name, grad in grads_found.items()}, grads)
