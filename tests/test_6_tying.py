"""Section 6: weight tying, and the JumpReLU it makes."""

import pytest
import torch
from hypothesis import given
from random_saes import Seen, assert_equal, random_batch, random_sae, seeds, sizes, stacks

from gated_sae import GatedSAE, StandardSAE, jump_relu


@pytest.mark.parametrize(
    ("make", "encode", "losses"),
    [
        (lambda: StandardSAE(4, 8), 1, 2),
        (lambda: GatedSAE(4, 8), 1, 3),  # one of the encoder, two of the decoder
        (lambda: GatedSAE(4, 8, stack=3), 1, 3),
        (lambda: GatedSAE(4, 8, aux=None), 1, 2),
        (lambda: GatedSAE(4, 8, tied=False), 2, 4),
    ],
)
def test_one_encoder_product_serves_both_paths(make, encode, losses):
    for method, expected in (("encode", encode), ("losses", losses)):
        with Seen() as seen:
            getattr(make(), method)(torch.ones(5, 4))
        assert seen.products == expected


@given(sizes, seeds, stacks)
def test_a_tied_gate_is_a_jump_relu(size, seed, stack):
    """G7: the same outputs, wherever rounding does not decide which side of θ a value is on."""
    sae = random_sae("gated", size, seed, stack=stack)
    x = random_batch(20, size[0], seed=seed)
    pi_gate, pi_mag = sae.paths(x)
    clear = pi_gate.abs() > 1e-9
    assert_equal(sae.encode(x)[clear], jump_relu(pi_mag, sae.threshold)[clear], rtol=0, atol=0)


@given(seeds)
def test_the_jump_is_as_high_as_the_threshold(seed):
    theta = random_batch(6, seed=seed)
    at = theta.clamp_min(0)
    just = 1e-9
    assert (jump_relu(torch.stack([at - just, at]), theta) == 0).all()
    assert_equal(jump_relu((at + just)[None], theta)[0], at, rtol=0, atol=1e-8)
