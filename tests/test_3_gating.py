"""Section 3: one path decides which latents fire, the other how strongly."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, random_batch, random_sae, seeds, sizes

from gated_sae import GatedSAE, gate


@given(sizes, seeds, st.booleans())
def test_the_paths_are_the_formulas_and_the_gate_decides(size, seed, tied):
    """At zero, it is shut; where it is open, the magnitude path says how strongly."""
    sae = random_sae(GatedSAE, size, seed, tied=tied)
    x = random_batch(5, size[0], seed=seed)
    xc = x - sae.b_dec
    W_mag = sae.W_enc * sae.r_mag.exp() if tied else sae.W_mag
    pi_gate, pi_mag = sae.paths(x)
    assert_equal(pi_gate, xc @ sae.W_enc + sae.b_gate)
    assert_equal(pi_mag, xc @ W_mag + sae.b_mag)
    pi_gate.data[0] = 0
    f = torch.where(pi_gate > 0, pi_mag.clamp_min(0), 0)
    assert_equal(gate(pi_gate, pi_mag), f, rtol=0, atol=0)
    assert_equal(sae.encode(x)[1:], f[1:], rtol=0, atol=0)
