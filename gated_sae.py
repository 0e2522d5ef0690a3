"""Gated Sparse Autoencoders: every variant and loss, in one file.

A sparse autoencoder (SAE) explains an activation vector as a sum of a few directions out of a large
learned dictionary. The L1 penalty that keeps the sum short also pulls every coefficient towards
zero: it *shrinks*. A Gated SAE pays the penalty only for deciding *which* directions are used, not
for *how strongly*, and so reconstructs as well with fewer of them.

    Rajamanoharan, Conmy, Smith, Lieberum, Varma, Kramár, Shah, Nanda: Improving Dictionary Learning
    with Gated Sparse Autoencoders, arXiv 2404.16014v2. Below: "the paper", its sections "§".

    "The discussion" is the thread under its announcement, lesswrong.com/posts/vdoiWXeouGsZEYgrg.

A *latent* is one of the d_sae coefficients of that sum; it *fires* on x where it is not zero. How
many do so is ‖f‖₀, on average L0. A batch is a matrix of rows x. Every parameter may carry leading
`stack` dimensions: many SAEs in one module, which run as one.

    x        x           (..., batch, d_in)    activations
    x̂        x_hat       (..., batch, d_in)    their reconstruction
    f, f̃     f           (..., batch, d_sae)   the coefficients, nowhere negative: standard, gated
    π_gate   pi_gate     (..., batch, d_sae)   a gate is open where this is positive;
    π_mag    pi_mag      (..., batch, d_sae)   its latent's coefficient is then max(0, π_mag)
    W_enc    W_enc       (..., d_in, d_sae)    encoder: the paper's W_gate, transposed
    W_mag    W_mag       (..., d_in, d_sae)    a second one for the magnitudes, if they are not tied
    W_dec    W_dec       (..., d_sae, d_in)    decoder: row i is dictionary direction d_i, of norm 1
    b_dec    b_dec       (..., d_in)           subtracted before encoding, added after decoding
    b_enc, b_gate, b_mag (..., d_sae)          biases of the encoders: standard; gate and magnitude
    r_mag    r_mag       (..., d_sae)          log of a scale per latent: section 6
    λ        l1          () or stack           weight of the sparsity penalty
    E        .mean(-1)                         mean over the batch, of a *sum* over features
    1[·], ⊙                                    1 where true and 0 elsewhere; elementwise product

Map.  The ideas: 2 the standard SAE and its shrinkage · 3 gating · 4 why its gradient vanishes ·
5 the auxiliary task · 6 weight tying · 7 alternatives · 8 metrics · 9 training. No idea uses a
later one (checks, speed and other devices aside): stop after any section and own what came
before. The engineering: 10 on a real model · 11 the fast exact path, and many devices · 12 files
and conversions · 13 upkeep · 14 the command line.

Departures from the paper: W_enc starts as a copy of W_dec transposed, and λ warms up (both became
practice later); latents that never fire are restarted on request only; the untied variant has no
r_mag, since W_mag has scales of its own; the learning rate warms up and falls over shares of the
run.
"""

import argparse
import copy
import itertools
import json
import math
import operator
import os
import pickle
import signal
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache, partial
from numbers import Real
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# -- 2 · The standard SAE and its shrinkage --------------------------------------------------------
#
#     f = ReLU((x - b_dec) W_enc + b_enc)        x̂ = f W_dec + b_dec        E‖x - x̂‖² + λ E‖f‖₁
#
# The dictionary has more directions than x has dimensions, so many sums give the same x; the L1
# penalty asks for a short one. But it charges in the wrong currency: by size, where we only meant
# to charge for use.


def shrink(a: Tensor, l1: float) -> Tensor:
    """argmin over f ≥ 0 of (a - f)² + λ f  =  max(0, a - λ/2): what L1 does to one coefficient a.

    The derivative -2 (a - f) + λ is zero at f = a - λ/2. Small coefficients go to zero, which is
    what the penalty is for. All others come out λ/2 too small, which nobody asked for: shrinkage.
    """
    return F.relu(a - l1 / 2)


def rows(v: Tensor) -> Tensor:
    """A vector per SAE as a row that broadcasts over its batch: (..., n) -> (..., 1, n)."""
    return v.unsqueeze(-2)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """E‖x - x̂‖²: (..., batch, d_in) twice -> (...)."""
    return (x - x_hat).square().sum(-1).mean(-1)


def positive(x_sq: Tensor) -> Tensor:
    """E‖x‖², or 1 for 0: an all-zero batch has no scale to divide by."""
    return torch.where(x_sq > 0, x_sq, 1)


class Losses(NamedTuple):
    """The terms of a loss, each of shape `stack`. A term that a variant lacks is zero."""

    reconstruct: Tensor
    sparsity: Tensor
    aux: Tensor

    def total(self, l1: float | Tensor) -> Tensor:
        """reconstruct + λ sparsity + aux, of shape `stack`, for λ a number or of shape `stack`."""
        return self.reconstruct + l1 * self.sparsity + self.aux


def l1_penalty(f: Tensor, W_dec: Tensor, a: float = 1.0) -> Tensor:
    """‖f‖₁ for f ≥ 0: (..., batch, d_sae) -> (..., batch). Those of section 7 use W_dec and a."""
    return f.sum(-1)


# By name; section 7 adds its own. Each is a sum over latents, of terms that are 0 where f is.
PENALTIES = {"l1": l1_penalty}


def penalised_losses(x, f, charged, W_dec, b_dec, penalty=l1_penalty) -> Losses:
    """E‖x - x̂(f)‖² + λ E[penalty(charged)], for f, charged ≥ 0 of shape (..., batch, d_sae).

    A standard SAE is charged for f itself (§2.2 of the paper), and that shrinks f.
    """
    reconstruct = squared_error(x, f @ W_dec + rows(b_dec))
    return Losses(reconstruct, penalty(charged, W_dec).mean(-1), torch.zeros_like(reconstruct))


class SAE(nn.Module, ABC):
    """What all variants share: the dictionary and its start, decoding, and the form of a loss.

    x is (batch, d_in), shared by a whole stack, or (*stack, batch, d_in). A single SAE also encodes
    x of more dimensions. Wrong shapes raise ValueError, wrong dtypes TypeError.

    stack      leading dimensions: `stack=(12,)` is twelve independent SAEs
    generator  draws the initial dictionary. None is seed 0, never the global generator: two SAEs
               start alike unless given two generators
    normalize  (option) divide the squared errors by E‖x‖² of the batch (authors, in the discussion,
               to carry hyper-parameters between sites): c x then has the errors of x. But its
               sparsity is c times as large, so the same λ weighs c times as much
    penalty, a (options) "l1", or another of section 7; a is the slope of "log"
    """

    architecture: str
    latent_vectors: dict[str, float]  # those of (..., d_sae) that scale with f; where they start
    # What else the constructor takes: a positive number, or the values allowed. First the default.
    options: dict = {"normalize": (False, True), "penalty": PENALTIES, "a": 1.0}

    def __init__(
        self, d_in: int, d_sae: int, *, stack=(), generator=None, device=None, dtype=None, **options
    ):
        super().__init__()
        for name, value in check_config(self, d_in, d_sae, stack, dtype, options).items():
            setattr(self, name, value)
        W_dec = torch.empty(*self.stack, d_sae, d_in, device=device, dtype=dtype)
        if not W_dec.is_meta:  # on the meta device there are shapes and no numbers: see `load`
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            at = dict(generator=generator, device=generator.device, dtype=W_dec.dtype)
            W_dec.copy_(F.normalize(torch.randn(W_dec.shape, **at), dim=-1))
        self.W_dec = nn.Parameter(W_dec)
        # The encoder starts out looking along the directions it decodes to (discussion). A copy: a
        # view would share memory, and the two would stay tied for ever. (Transposed as it is, it
        # lies in memory latent by latent, as section 11 reads it.)
        self.W_enc = nn.Parameter(W_dec.clone().mT)
        self.b_dec = nn.Parameter(W_dec.new_zeros(*self.stack, d_in))
        for name, start in self.latent_vectors.items():
            setattr(self, name, nn.Parameter(W_dec.new_full((*self.stack, d_sae), start)))

    @property
    def config(self) -> dict:
        """The constructor's arguments: `type(sae)(**sae.config)` is an untrained sae like this."""
        return {name: getattr(self, name) for name in ("d_in", "d_sae", "stack", *self.options)}

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """f, how strongly each latent fires: (..., batch, d_in) -> (..., batch, d_sae), all ≥ 0."""

    @abstractmethod
    def loss_terms(self, x: Tensor) -> Losses:
        """The terms before `normalize`."""

    def project(self, x: Tensor) -> Tensor:
        """(x - b_dec) W_enc, the encoder's one product: (..., d_in) -> (..., d_sae)."""
        check_rows(self, x)
        return (x - rows(self.b_dec)) @ self.W_enc

    def decode(self, f: Tensor) -> Tensor:
        """x̂(f) = f W_dec + b_dec: (..., batch, d_sae) -> (..., batch, d_in)."""
        return f @ self.W_dec + rows(self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """x̂: (..., batch, d_in) -> the same, with `stack` in front where x was shared."""
        return self.decode(self.encode(x))

    def penalise(self, f: Tensor, W_dec: Tensor) -> Tensor:
        """The penalty that was asked for: (..., batch, d_sae) -> (..., batch)."""
        return PENALTIES[self.penalty](f, W_dec, self.a)

    def losses(self, x: Tensor) -> Losses:
        """The terms of this variant's loss on (batch, d_in) or (*stack, batch, d_in)."""
        check_rows(self, x, only_batches=True)
        return self.normalized(self.loss_terms(x), x)

    def normalized(self, terms: Losses, x: Tensor) -> Losses:
        if not self.normalize:
            return terms
        x_sq = positive(x.square().sum(-1).mean(-1))
        return terms._replace(reconstruct=terms.reconstruct / x_sq, aux=terms.aux / x_sq)

    @property
    def unit_norm(self) -> bool:
        """Whether training keeps rows of W_dec at norm 1: not under a penalty on their norms."""
        return self.W_dec.requires_grad and not self.penalty.startswith("norm")


class StandardSAE(SAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), §2.2 of the paper. Options: see `SAE`."""

    architecture = "standard"
    latent_vectors = {"b_enc": 0.0}

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.project(x) + rows(self.b_enc))

    def loss_terms(self, x: Tensor) -> Losses:
        f = self.encode(x)
        return penalised_losses(x, f, f, self.W_dec, self.b_dec, self.penalise)


# -- 3 · Gating ------------------------------------------------------------------------------------
# L1 is needed for one bit per latent: does it fire? Section 2 showed what it does to the rest. So
# split the encoder: one path decides *which* latents fire, the other *how strongly*, and only the
# first will be penalised. Each has weights (d_in, d_sae) and biases of its own.
#
#     π_gate = (x - b_dec) W_enc + b_gate             π_mag = (x - b_dec) W_mag + b_mag


def gate(pi_gate: Tensor, pi_mag: Tensor) -> Tensor:
    """f̃ = 1[π_gate > 0] ⊙ ReLU(π_mag), all (..., batch, d_sae); eq. 6, §3.2.1 of the paper.

    The step is flat wherever it is not vertical, so no gradient of f̃ tells the gate when to open.
    """
    return torch.where(pi_gate > 0, F.relu(pi_mag), 0)


# -- 4 · Why the gradient vanishes -----------------------------------------------------------------
# Put f̃ into the loss of section 2, penalise the gate alone, and training kills the SAE. Two lines
# show why. For every latent,
#
#     ∂ reconstruct / ∂b_gate  =  0                       f̃ sees π_gate through the step only: flat
#     ∂ sparsity    / ∂b_gate  =  E 1[π_gate > 0]  ≥  0   ReLU(π_gate) rises where the gate is open
#
# so descent lowers b_gate of each latent whose gate ever opens, and nothing ever raises it. W_enc
# is in the same trap. (Tied to W_mag, as in section 6, it still hears of the reconstruction, and
# only dies more slowly.) The loss reads well, falls for a while, and ends at the variance of x:
# every gate is shut, and x̂ = b_dec.


def incorrect_losses(x, f, pi_gate, W_dec, b_dec, penalty=l1_penalty) -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁: L_incorrect, §3.2.2 of the paper. It fails.

    What we mean to penalise is the gate itself, 1[π_gate > 0], but a step has no gradient here
    either. ReLU(π_gate) has one, and it reaches the gate. The reconstruction's still does not.
    """
    return penalised_losses(x, f, F.relu(pi_gate), W_dec, b_dec, penalty)


# -- 5 · The auxiliary task ------------------------------------------------------------------------
# The gate needs a reason to open. So let ReLU(π_gate) reconstruct x as well: that gradient says
# which latents would help. With its penalty this is section 2 over again, shrinkage and all, but
# nobody reads those coefficients as magnitudes: they train the gate, which uses their sign.
#
# Its decoder is a frozen copy, detached; or the auxiliary task would turn the d_i and move b_dec to
# suit the shrunken ReLU(π_gate), at the cost of f̃. b_dec is frozen only as the decoder's bias:
# in π_gate, as x - b_dec, it keeps its gradient.


def gated_losses(x, f, pi_gate, W_dec, b_dec, penalty=l1_penalty, frozen=True) -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁ + E‖x - x̂_frozen(ReLU(π_gate))‖², §3.2.2.

    `frozen=False` lets the auxiliary task train the decoder as well, the paper's ablation.
    """
    W_aux, b_aux = (W_dec.detach(), b_dec.detach()) if frozen else (W_dec, b_dec)
    f_gate = F.relu(pi_gate)
    aux = squared_error(x, f_gate @ W_aux + rows(b_aux))
    return penalised_losses(x, f, f_gate, W_dec, b_dec, penalty)._replace(aux=aux)


# -- 6 · Weight tying ------------------------------------------------------------------------------
# A second encoder costs a product and its parameters. But a latent's gate and its magnitude seek
# the same thing: let them look along one direction, and differ in scale and offset (§3.2.1).
#
#     z = (x - b_dec) W_enc          π_gate = z + b_gate          π_mag = exp(r_mag) ⊙ z + b_mag


class GatedSAE(SAE):
    """The Gated SAE, §3.2 of the paper. Options, beside those of `SAE`:

    tied  True: one encoder, and a scale exp(r_mag) per latent (the paper). False: a W_mag as well
    aux   "frozen" (the paper), "unfrozen" (its ablation), None (L_incorrect: the gates die)
    """

    latent_vectors = {"b_gate": 0.0, "b_mag": 0.0}
    options = SAE.options | {"tied": (True, False), "aux": ("frozen", "unfrozen", None)}
    gate = staticmethod(gate)  # section 7 has other gates

    def __init__(self, d_in: int, d_sae: int, **options):
        super().__init__(d_in, d_sae, **options)
        if self.tied:
            self.r_mag = nn.Parameter(torch.zeros_like(self.b_gate))
        else:
            self.W_mag = nn.Parameter(self.W_enc.detach().clone())

    @property
    def architecture(self) -> str:
        return "gated" if self.tied else "gated_untied"

    def paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """π_gate, π_mag: (..., batch, d_in) -> (..., batch, d_sae) twice."""
        z = self.project(x)
        z_mag = rows(self.r_mag.exp()) * z if self.tied else (x - rows(self.b_dec)) @ self.W_mag
        return z + rows(self.b_gate), z_mag + rows(self.b_mag)

    def encode(self, x: Tensor) -> Tensor:
        return self.gate(*self.paths(x))

    def loss_terms(self, x: Tensor) -> Losses:
        pi_gate, pi_mag = self.paths(x)
        args = x, self.gate(pi_gate, pi_mag), pi_gate, self.W_dec, self.b_dec, self.penalise
        if self.aux is None:
            return incorrect_losses(*args)
        return gated_losses(*args, frozen=self.aux == "frozen")

    @property
    def threshold(self) -> Tensor:
        """θ = b_mag - exp(r_mag) b_gate, (..., d_sae), with f̃ = jump_relu(π_mag, θ).

        Tied, π_gate > 0 says z > -b_gate, that is π_mag > θ: a JumpReLU. Untied, gate and magnitude
        look along two directions, and no threshold exists: ValueError.
        """
        if not self.tied:
            raise ValueError("this GatedSAE has tied=False and so no threshold, expected tied=True")
        return self.b_mag - self.r_mag.exp() * self.b_gate


def jump_relu(pi: Tensor, theta: Tensor) -> Tensor:
    """π ⊙ 1[π > max(θ, 0)], for π (..., batch, d_sae) and θ (..., d_sae): jumps by max(θ, 0).

    For θ ≤ 0 nothing jumps. At θ = 0, b_mag = exp(r_mag) b_gate and f̃ = exp(r_mag) ReLU(π_gate).
    """
    return pi * (pi > rows(theta).clamp_min(0))


# -- 7 · Alternatives ------------------------------------------------------------------------------
# What the discussion proposed instead, or beside: other penalties, then other gates and encoders.


def log_penalty(f: Tensor, W_dec: Tensor, a: float = 1.0) -> Tensor:
    """Σ_i log(1 + a f_i), a smoothed L0: its slope a / (1 + a f_i) spares large coefficients."""
    return (a * f).log1p().sum(-1)


def norm_penalty(f: Tensor, W_dec: Tensor, a: float = 1.0) -> Tensor:
    """Σ_i f_i ‖d_i‖, the same for f_i / c and c d_i: rows of W_dec need no constraint.

    A Gated SAE needs its decoder frozen both here and in the auxiliary task, or in neither. With
    live norms and a frozen auxiliary task, shrinking d_i lowers the penalty, exp(r_mag) makes up
    for it in f̃, and ReLU(π_gate) is left to grow: the norms go to zero, and every gate opens.
    """
    return (f * rows(W_dec.norm(dim=-1))).sum(-1)


PENALTIES |= {
    "log": log_penalty,
    "norm_live": norm_penalty,
    "norm_frozen": lambda f, W_dec, a=1.0: norm_penalty(f, W_dec.detach()),
}


def two_standard_losses(x, f, pi_gate, W_dec, b_dec) -> tuple[Losses, Losses]:
    """The usual loss of f̃ with its binary gate penalised, and the usual loss of ReLU(π_gate).

    Together they have the gradient of the three terms with aux "unfrozen", since that of the binary
    gate is zero. So L_aux is no trick: it is a second SAE on the same weights (discussion).
    """
    is_open, f_gate = (pi_gate > 0).to(f.dtype), F.relu(pi_gate)  # booleans have no mean
    gated = penalised_losses(x, f, is_open, W_dec, b_dec)
    return gated, penalised_losses(x, f_gate, f_gate, W_dec, b_dec)


class SigmoidGatedSAE(GatedSAE):
    """f̃ = σ(π_gate) ⊙ ReLU(π_mag): this gate has a gradient, which L_incorrect (aux=None) needs.

    It stays alive, but it is not sparse: half-open gates cost little, and exp(r_mag) undoes them.
    """

    architecture = "gated_sigmoid"

    @staticmethod
    def gate(pi_gate: Tensor, pi_mag: Tensor) -> Tensor:
        return torch.sigmoid(pi_gate) * F.relu(pi_mag)

    @property
    def threshold(self) -> Tensor:
        raise ValueError("a SigmoidGatedSAE has no threshold, expected a gate that closes")


class NaturalGatedSAE(GatedSAE):
    """b_mag = exp(r_mag) b_gate, hence θ = 0: f̃ = exp(r_mag) ReLU(π_gate) turns on without a jump.

    Also known as y = x̂(t ⊙ f), with f = ReLU(π_gate) and a learned scale t (discussion).
    """

    architecture = "gated_natural"
    latent_vectors = {"b_gate": 0.0}
    options = GatedSAE.options | {"tied": (True,)}  # b_mag is made of r_mag

    @property
    def b_mag(self) -> Tensor:
        return self.r_mag.exp() * self.b_gate


def soft_cutoff(y: Tensor, t: Tensor, s: float) -> Tensor:
    """(y + √(y² + s²)) (1 + (y + t) / √((y + t)² + s²)) / 4, for s → 0: y 1[y > max(0, -t)].

    Smooth, so that t has a gradient; but then nothing is exactly zero (but for rounding).
    """
    z, s = y + t, y.new_full((), s)
    return (y + torch.hypot(y, s)) * (1 + z / torch.hypot(z, s)) / 4


class SoftCutoffSAE(StandardSAE):
    """f = soft_cutoff(π, t, s) in place of ReLU(π), with t learned for each latent. Option: s."""

    architecture = "soft_cutoff"
    latent_vectors = {"b_enc": 0.0, "t": 0.0}
    options = SAE.options | {"s": 0.1}

    def encode(self, x: Tensor) -> Tensor:
        return soft_cutoff(self.project(x) + rows(self.b_enc), rows(self.t), self.s)

    @property
    def threshold(self) -> Tensor:
        return -self.t


def heaviside(pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[π > θ] with a pseudo-gradient for θ alone, -1[|π - θ| < ε/2] / ε (arXiv 2407.14435).

    The true gradient is zero but for a spike at θ; a window of width ε = bandwidth catches those π
    near it. θ is a row, (..., 1, d_sae).
    """
    ramp = ((pi.detach() - theta) / bandwidth + 0.5).clamp(0, 1)
    return (pi > theta) + (ramp - ramp.detach())


class JumpReLUSAE(SAE):
    """f = jump_relu(π, θ), where the field went next (arXiv 2407.14435): θ is trained on L0 itself.

    loss = E‖x - x̂(f)‖² + λ E‖f‖₀, with the gradients of `heaviside` for θ = threshold.
    Option: bandwidth, ε: small beside π, and so large that a batch has some π within it of θ.
    """

    architecture = "jumprelu"
    latent_vectors = {"b_enc": 0.0, "threshold": 0.1}
    options = SAE.options | {"penalty": ("l0",), "bandwidth": 0.1}

    def encode(self, x: Tensor) -> Tensor:
        return jump_relu(self.project(x) + rows(self.b_enc), self.threshold)

    def loss_terms(self, x: Tensor) -> Losses:
        pi, theta = self.project(x) + rows(self.b_enc), rows(self.threshold)
        # max(θ, 0), but for the gradient, or a θ that fell below 0 could never come back.
        is_on = heaviside(pi, theta + F.relu(-theta.detach()), self.bandwidth)
        # The second term is zero. Its gradient is that of a step of height θ: θ ∂1[π > θ]/∂θ.
        f = pi * is_on.detach() + F.relu(theta.detach()) * (is_on - is_on.detach())
        return penalised_losses(x, f, is_on, self.W_dec, self.b_dec)


def rescale_and_shift(sae: StandardSAE, refit_decoder: bool = False) -> GatedSAE:
    """A trained Standard SAE whose coefficients can be corrected: train the result with l1=0.

    No latent fires where it did not before. f̃ = 1[f > 0] ⊙ ReLU(exp(r_mag) ⊙ z + b_mag) learns a
    scale and a shift per latent, without penalty (discussion); with `refit_decoder`, W_dec too.
    """
    if type(sae) is not StandardSAE:
        raise TypeError(f"sae is a {type(sae).__name__}, expected a StandardSAE")
    new = to_gated(sae, aux=None)
    for parameter in (new.W_enc, new.b_gate, new.b_dec):
        parameter.requires_grad_(False)
    new.W_dec.requires_grad_(refit_decoder)
    return new


# -- 8 · Metrics -----------------------------------------------------------------------------------
# Three numbers hold all there is to say about scale: how long x is, how long x̂ is, and how well
# they point the same way.


@dataclass(frozen=True, eq=False)
class Moments:
    """E‖x‖², E‖x̂‖², E[x̂·x], each of shape `stack`, and the measures of scale made from them.

    gamma            γ = argmin over g of E‖x̂/g - x‖², the relative reconstruction bias, as
                     corrected in the discussion. Below 1, x̂ is too short: 1/γ times as long is
                     better. At 1 the error is orthogonal to x̂: no rescaling makes it smaller
    factor_on_x_hat  argmin over g of E‖g x̂ - x‖² = 1/γ, but *not* 1/factor_on_x
    factor_on_x      argmin over g of E‖x̂ - g x‖², S. Marks's reading (discussion)
    cosine_squared   the product of the two: ≤ 1, and 1 only if x and x̂ are collinear. Nearly
                     perpendicular ones send both factors to 0: they cannot be reciprocals
    norm_ratio       not the bias: at γ = 1 it is cosine_squared, < 1 unless x̂ is perfect
    gamma_v1         eq. 10 of the first preprint, right only at γ = 1. Reconstructed from its value
                     1/√3 at x = 1, x̂ = 1/2, and from the authors' explanation that the unoptimised
                     loss had slipped into the derivation. A negative denominator counts as 0

    All are ratios of means. Means of ratios would let the rows nearest to zero decide. Where a
    denominator is 0 the ratio is NaN, and a RuntimeWarning says so.
    """

    x_sq: Tensor
    x_hat_sq: Tensor
    dot: Tensor

    gamma = property(lambda m: _ratio(m.x_hat_sq, m.dot, "E‖x̂‖² / E[x̂·x]"))
    factor_on_x_hat = property(lambda m: _ratio(m.dot, m.x_hat_sq, "E[x̂·x] / E‖x̂‖²"))
    factor_on_x = property(lambda m: _ratio(m.dot, m.x_sq, "E[x̂·x] / E‖x‖²"))
    cosine_squared = property(lambda m: m.factor_on_x_hat * m.factor_on_x)
    norm_ratio = property(lambda m: _ratio(m.x_hat_sq, m.x_sq, "E‖x̂‖² / E‖x‖²"))

    @property
    def gamma_v1(self) -> Tensor:
        explained = (2 * self.dot - self.x_hat_sq).clamp_min(0)  # E‖x‖² - E‖x - x̂‖²
        return _ratio(self.x_hat_sq, explained, "E‖x̂‖² / (E‖x‖² - E‖x - x̂‖²)").sqrt()

    @classmethod
    def from_norms(cls, x_sq: Tensor, x_hat_sq: Tensor, error_sq: Tensor) -> "Moments":
        """From three numbers most runs log: E[x̂·x] = (E‖x̂‖² + E‖x‖² - E‖x - x̂‖²) / 2."""
        x_sq, x_hat_sq, error_sq = map(torch.as_tensor, (x_sq, x_hat_sq, error_sq))
        return cls(x_sq, x_hat_sq, (x_hat_sq + x_sq - error_sq) / 2)


def _ratio(a: Tensor, b: Tensor, formula: str) -> Tensor:
    ratio = torch.where(b == 0, torch.nan, a / b)
    if not ratio.isfinite().all():
        message = f"{formula} is undefined, or not finite"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return ratio


def moments(x: Tensor, x_hat: Tensor) -> Moments:
    """Of (..., batch, d_in) twice; a stack of x_hat may share one x."""
    if x.shape != x_hat.shape[-x.ndim :] or x.numel() == 0:
        shapes = f"x is {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}"
        raise ValueError(
            f"{shapes}, expected one (..., batch, d_in); a stack's x_hat may have more"
        )
    # Squares of half-precision numbers overflow at 256.
    x, x_hat = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (x, x_hat))
    dot = (x * x_hat).sum(-1).mean(-1)
    x_sq, x_hat_sq = (v.square().sum(-1).mean(-1) for v in (x, x_hat))
    return Moments(x_sq.expand_as(dot), x_hat_sq, dot)


def relative_reconstruction_bias(x: Tensor, x_hat: Tensor) -> Tensor:
    """γ of (..., batch, d_in) twice -> (...); see `Moments.gamma`. ValueError where undefined."""
    m = moments(x, x_hat)
    if not (m.dot.isfinite() & m.x_hat_sq.isfinite() & (m.dot != 0)).all():
        raise ValueError(f"γ = E‖x̂‖² / E[x̂·x] is undefined for {m}, expected E[x̂·x] ≠ 0")
    return m.gamma


@dataclass(frozen=True, eq=False)
class Metrics(Moments):
    """What `evaluate` finds: all of `Moments`, and these, of shape `stack` unless said otherwise.

    fvu            fraction of variance unexplained
    l0             mean number of latents that fire on a row
    dead_fraction  share of latents that never fired
    """

    n_rows: int
    error: Tensor  # E‖x - x̂‖²
    variance: Tensor  # E‖x - E x‖²
    l1_norm: Tensor  # E‖f‖₁
    firing_frequency: Tensor  # (*stack, d_sae): share of rows on which each latent fired

    fvu = property(lambda m: _ratio(m.error, m.variance, "E‖x - x̂‖² / E‖x - E x‖²"))
    l0 = property(lambda m: m.firing_frequency.sum(-1))
    dead_fraction = property(lambda m: (m.firing_frequency == 0).to(m.error).mean(-1))


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor], sparse: bool | None = None, mesh=None) -> Metrics:
    """Metrics over any number of batches, of any sizes, in constant memory.

    Ratios of means over the whole stream: how it was cut into batches changes nothing but rounding.
    Sums are float64 (MPS: float32). A NaN or infinity raises ValueError, with the batch's number.
    `sparse`, `mesh`: see `Trainer`. Over a mesh, all processes get the metrics of all rows.
    """
    n_rows, origin, sums, density = 0, None, {}, 1.0  # density: share of latents that fire on a row
    for x in stream(sae, batches, whole=True):
        x_hat, f_sum, fires = reconstruct(sae, x, is_sparse(sae, x, density, sparse))
        x, n = x.to(x_hat.dtype), x.shape[-2]
        density = fires.mean().item() / n
        # Centred near the data: far from the origin, E‖x‖² - ‖E x‖² would cancel to nothing.
        origin = average(x[..., :1, :].clone(), mesh) if origin is None else origin
        means = vars(moments(x, x_hat)) | dict(
            error=squared_error(x, x_hat),
            offset=(x - origin).mean(-2),
            variance=squared_error(x, origin),
            l1_norm=f_sum.sum(-1) / n,
            firing_frequency=fires / n,
        )
        sums = {name: sums.get(name, 0) + n * mean for name, mean in means.items()}
        n_rows += n
    n_each = average(sums["error"].new_tensor(n_rows), mesh)
    mean = {name: average(total, mesh) / n_each for name, total in sums.items()}
    variance = mean["variance"] - mean.pop("offset").square().sum(-1)
    mean["variance"] = variance.expand_as(mean["error"])
    return Metrics(n_rows=n_rows if mesh is None else round(n_each.item() * mesh.size(0)), **mean)


# -- 9 · Training ----------------------------------------------------------------------------------
# One loop for every variant, and for whole stacks: no parameter is shared by two members, so the
# gradient of the sum of their losses is each one's own, and Adam works element by element.
#
# Rows of W_dec have norm 1, or the penalty could be dodged: with d_i twice as long, half of f_i
# gives the same x̂ at half the price. Each step removes the gradient's radial part, which would only
# swell Adam's second moment; then steps; then renormalises: tangential steps leave the sphere too.
#
# On one device, without a mesh, `average`, `whole`, `share_of` and `like` give back what they get,
# and `self.losses(x, sparse)` is `sae.losses(x)`, or its equal from section 11.


@torch.no_grad()
def step_on_unit_norm(optimizer: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """grad d_i ← grad d_i - (grad d_i · d_i) d_i; a step; d_i ← d_i / ‖d_i‖, 0 for 0."""
    rows_at_once = 256 if W_dec.device.type == "cpu" else W_dec.numel()  # 256 stay in a CPU's cache
    grads, units = (share_of(v).flatten(0, -2).split(rows_at_once) for v in (W_dec.grad, W_dec))
    for grad, d in zip(grads, units, strict=True):
        grad.addcmul_((grad * d).sum(-1, keepdim=True), d, value=-1)
    optimizer.step()
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)


class Record(NamedTuple):
    """What training reports of a step."""

    step: int  # counted from 1
    lr: float  # learning rate of this step
    l1: Tensor  # λ of this step
    losses: Losses  # before this step, on its batch
    metrics: Metrics | None = None  # after it, on the same batch


class Trainer:
    """Adam on an SAE, in place, and all else that the next step depends on.

    l1         λ, one number, or one for each member of a stack (shape `stack`)
    steps      how many there will be
    lr, betas  of Adam: the paper's, for language models; toy data wants an lr of 1e-2
    lr_warmup, l1_warmup, lr_decay
               shares of the steps in which lr and λ rise linearly, and in which lr falls at the end
    resample_every
               after every so many steps but the last, `resample` what has not fired in them, and
               so had no gradient in W_dec
    sparse     whether to take the path of section 11. None: wherever it is faster (measured on
               CPUs). It changes no result beyond rounding
    autocast   say torch.bfloat16: products in it, on the dense path unless `sparse` is True, which
               keeps float32. Parameters, sums and losses are float32 in any case
    device     the SAE and each batch go there. None: where the SAE is, but from a CPU to the
               accelerator if there is one
    mesh       a torch DeviceMesh, ("data", "model"), to train on many devices: see the section of
               that name. Each process gives its own rows; all report the losses of all rows

    A decoder from elsewhere, not of unit norm, is folded first: x̂ stays. A half-precision SAE is a
    TypeError: its rounding swallows the steps. Where x lies far from the origin, as in language
    models, let b_dec start at its mean: at this lr it would be long on its way there.
    """

    def __init__(
        self,
        sae: SAE,
        *,
        l1: float | Tensor,
        steps: int,
        lr: float = 3e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        lr_warmup: float = 0.1,
        l1_warmup: float = 0.1,
        lr_decay: float = 0.2,
        resample_every: int | None = None,
        sparse: bool | None = None,
        autocast: torch.dtype | None = None,
        device: torch.device | str | None = None,
        mesh=None,
    ):
        self.sae, self.steps, self.autocast = sae, steps, autocast
        self.sparse = False if sparse is None and autocast else sparse
        self.lr, self.shares = lr, (lr_warmup, l1_warmup, lr_decay)
        self.resample_every, self.mesh = resample_every, mesh
        check_schedule(self, l1)
        if not sae.W_dec.is_meta:  # there, on a mesh alone, it has no numbers yet
            on_mesh = getattr(mesh, "device_type", None)
            sae.to(device or on_mesh or default_device(sae.W_dec.device))
            if sae.unit_norm:
                fold_decoder_norms(sae)
        self.losses = spread(sae, mesh)  # of sae; without a mesh, nothing is spread
        self.l1 = torch.as_tensor(l1).detach().clone().to(sae.W_enc.device, sae.W_enc.dtype)
        self.optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, fused=True)
        self.done, self.density = 0, 1.0  # steps taken; the share of latents that fire on a row
        # Which latents have not fired since the last resampling:
        self.silent = torch.ones(sae.W_dec.shape[:-1], dtype=torch.bool, device=sae.W_dec.device)
        self.broken = self.silent.new_zeros(())  # whether a loss was not finite
        self.generator = torch.Generator().manual_seed(0)

    def step(self, x: Tensor, wait: bool = False) -> Record:
        """One step, on a batch as in `SAE.losses`, and its Record, but for the metrics.

        On a GPU the host runs ahead of the device, and to ask for a value is to wait for it. So
        there the loss is looked at only if told to `wait`, or where latents are resampled, and the
        path chosen anew only then.
        """
        sae, step, (lr_warmup, l1_warmup, lr_decay) = self.sae, self.done + 1, self.shares
        if step > self.steps:
            raise ValueError(f"all {self.steps} steps are done")

        def ramp(n: int, share: float) -> float:
            return min(1.0, n / max(1.0, share * self.steps))

        lr = self.lr * min(ramp(step, lr_warmup), ramp(self.steps + 1 - step, lr_decay))
        l1 = self.l1 * ramp(step, l1_warmup)
        resamples = self.resample_every and step % self.resample_every == 0 and step < self.steps
        (x,) = stream(sae, [x])
        on_cpu = x.device.type == "cpu"
        looks = step % 20 == 0 if on_cpu else wait
        if looks:  # at a few rows: it costs next to nothing
            few = sae.encode(like(x[..., :32, :], sae.b_dec))
            self.density = average(whole((few > 0).float().mean()), self.mesh).item()
        sparse = is_sparse(sae, x, self.density, self.sparse)
        self.optimizer.zero_grad()
        amp = torch.autocast(x.device.type, self.autocast, enabled=self.autocast is not None)
        with amp, torch.enable_grad():  # gradients also where the caller has switched them off
            losses = self.losses(x, sparse)
            total = losses.total(l1)
        self.broken |= ~total.isfinite().all()
        if wait or resamples or on_cpu:
            check_finite(self.broken, total, x, step, self.mesh)
        self.optimizer.found_inf = self.broken.float()  # if 1, fused Adam takes no step
        total.backward(torch.ones_like(total))
        average_gradients(sae, self.mesh)
        if self.resample_every:  # a latent that fires on no row leaves its d_i without a gradient
            self.silent &= whole((sae.W_dec.grad == 0).all(-1))
        self.optimizer.param_groups[0]["lr"] = lr
        if sae.unit_norm:
            step_on_unit_norm(self.optimizer, sae.W_dec)
        else:
            self.optimizer.step()
        if resamples:
            x = torch.cat([v.to(x.device) for v in gather(x, self.mesh)], -2)
            resample(sae, self.silent, x, self.generator, self.optimizer, sparse)
            self.silent.fill_(True)
            self.density = 1.0  # those revived fire often
        self.done = step
        return Record(step, lr, l1, Losses(*(term.detach() for term in losses)))

    def run(self, batches: Iterable[Tensor], log_every: int) -> Iterator[Record]:
        """The steps that are left, with metrics every `log_every` steps: see `train`."""
        for x in itertools.islice(stream(self.sae, batches), self.steps - self.done):
            logs = self.done + 1 in (1, self.steps) or (self.done + 1) % log_every == 0
            record = self.step(x, wait=logs)
            if logs:
                sparse = is_sparse(self.sae, x, self.density, self.sparse)
                record = record._replace(metrics=evaluate(self.sae, [x], sparse, self.mesh))
            yield record
        if self.done < self.steps:
            ended = f"batches ended after {self.done} of {self.steps} steps"
            raise ValueError(f"{ended}; the SAE keeps these")


def train(
    sae: SAE, batches: Iterable[Tensor], *, log_every: int = 100, **options
) -> Iterator[Record]:
    """Train in place; yields a Record at step 1, every `log_every` steps, and the last.

    `options` are those of `Trainer`: l1 and steps at least. Checks them and moves the SAE at once.
    Training itself runs as the records are iterated, takes exactly `steps` batches (batch, d_in),
    and stops if the iteration does.

    NaN or infinity in a batch or a loss, or too few batches, raise ValueError with the step, and
    leave the SAE as before that step.
    """
    check_positive("log_every", log_every)
    run = Trainer(sae, **options).run(batches, log_every)
    return (record for record in run if record.metrics)


# -- 10 · On a real model --------------------------------------------------------------------------
# Activations come from a hook on any module; x̂ goes back in by another.


def harvest(model: nn.Module, module: nn.Module, inputs: Iterable) -> Iterator[Tensor]:
    """What `module` puts out as the model reads each of `inputs`: (tokens, d), detached.

    An input is a tensor, a tuple of arguments, or a dict of keyword arguments, as tokenizers give;
    where its "attention_mask" is 0 there is padding, which is left out. Dtype and device stay. The
    model runs no further than the module's first call. ValueError if it never calls it.
    """

    class Enough(Exception):
        pass

    def take(_, args, output):
        raise Enough(hidden(module, output))

    for number, given in enumerate(inputs):
        args = given if isinstance(given, tuple) else (given,)
        kwargs, args = (given, ()) if isinstance(given, Mapping) else ({}, args)
        handle = module.register_forward_hook(take)
        try:
            with torch.no_grad():
                model(*args, **kwargs)
        except Enough as stop:
            (x,) = stop.args
        else:
            raise ValueError(f"input {number}: the model never called {type(module).__name__}")
        finally:
            handle.remove()
        mask = kwargs.get("attention_mask")
        yield (x.flatten(0, -2) if mask is None else x[mask.bool().to(x.device)]).detach()


def hidden(module: nn.Module, output) -> Tensor:
    """A module's output, or the first of a tuple, if that is a tensor (..., d) of floats."""
    x = output[0] if isinstance(output, tuple | list) and len(output) else output
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{type(module).__name__} put out {got}, expected floats (..., tokens, d)")
    return x


def shuffle(batches: Iterable[Tensor], batch: int, held: int, seed: int = 0) -> Iterator[Tensor]:
    """The rows of all `batches`, each once, `batch` at a time, in random order as far as `held` go.

    Rows of one text come together and are much alike. At most `held` are kept (and what is read
    last; twice that while they are permuted): whenever so many are there, half are given out.
    """
    check_positive("batch", batch), check_positive("held", held)
    generator, pool, n = torch.Generator().manual_seed(seed), [], 0
    for x in itertools.chain(batches, [None]):
        if x is not None:
            pool.append(x)
            n += len(x)
            if n < max(held, 2 * batch):
                continue
        if n == 0:
            return
        order, x_held = torch.randperm(n, generator=generator), torch.cat(pool)
        pool.clear()
        x_held = x_held[order.to(x_held.device)]
        out = n if x is None else max(batch, (n - held // 2) // batch * batch)
        yield from x_held[:out].split(batch)
        pool, n = [x_held[out:].clone()], n - out


@contextmanager
def splice(module: nn.Module, put: SAE | str | Tensor) -> Iterator[None]:
    """Within, `put` stands in for the module's output x: an SAE's x̂, "zero", or a tensor (d,), say
    the mean of x. The hook is gone afterwards, whatever happened.
    """

    def replace(_, args, output):
        x = hidden(module, output)
        if isinstance(put, SAE):
            new = put(x.to(put.W_enc.dtype))
        else:
            new = (x.new_zeros(()) if isinstance(put, str) else put).expand_as(x)
        new = new.to(x)
        if not isinstance(output, tuple | list):
            return new
        make = getattr(type(output), "_make", type(output))  # a namedtuple has its own
        return make([new, *output[1:]])

    single = isinstance(put, Tensor) or (isinstance(put, SAE) and not put.stack)
    if not single and not (isinstance(put, str) and put == "zero"):
        raise ValueError(f"put is {put!r}, expected a single SAE, 'zero' or a tensor")
    handle = module.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


# What does splicing x̂ in for x cost, and which latents matter to the output? Gradients answer the
# second cheaply, but cannot see a jump. For θ ≥ 0, JumpReLU_θ(z) = z 1[z > θ] and ReLU(z - θ) have
# one gradient, 1[z > θ], and so every attribution made of gradients is equal for both. Yet patching
# z from 0 gives z in the one and z - θ in the other, for z > θ. Integrated gradients say z - θ for
# both: complete for the ReLU, and short by exactly the jump θ for the other.


def loss_recovered(ce_sae: Tensor, ce_clean: Tensor, ce_ablated: Tensor) -> Tensor:
    """(CE_ablated - CE_sae) / (CE_ablated - CE_clean), of floats or tensors: 1 is as good as x.

    "Ablated" has 0, or the mean of x, for x. That choice never changes which of two SAEs is better:
    the score is affine and falling in CE_sae. But zeros mostly break the model more than the mean:
    a weak baseline, which inflates it. ValueError unless ablating hurts: the order would turn.
    """
    gap = ce_ablated - ce_clean
    if not torch.as_tensor((gap > 0) & (gap < math.inf)).all():
        raise ValueError(f"ce_ablated - ce_clean is {gap}, expected positive and finite")
    return (ce_ablated - ce_sae) / gap


def compute_multiple(compute: Tensor, loss: Tensor, ce_sae: Tensor, ce_clean: Tensor) -> Tensor:
    """C(CE_sae) / C(CE_clean), where log L = a - b log C(L): the share of the compute that trains a
    model as good as the spliced one, 1 without a hit. Of floats or tensors; float64.

    a, b: least squares over smaller models, (n,) twice; a floor of the loss makes the share too
    large. ValueError unless all is positive, two computes differ, and the curve falls.
    """
    args = dict(compute=compute, loss=loss, ce_sae=ce_sae, ce_clean=ce_clean)
    C, L, sae, clean = (torch.as_tensor(v, dtype=torch.float64) for v in args.values())
    table = C.ndim == 1 and C.shape == L.shape and len(C.log().unique()) > 1
    if not (table and all(((v > 0) & v.isfinite()).all() for v in (C, L, sae, clean))):
        raise ValueError(f"got {args}, expected n > 1 distinct computes, n losses, all positive")
    dc, dl = (v.log() - v.log().mean() for v in (C, L))
    b = -(dc @ dl) / (dc @ dc)
    if b < 1e-12:  # flat, to rounding
        raise ValueError(f"loss falls as compute^-b with b = {b:.3g}, expected b > 0")
    return (clean / sae) ** (1 / b)  # C(L) = (eᵃ / L)^(1/b), and a cancels


def _values(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    if (value := fn(z)).shape != z.shape[:-1]:
        raise ValueError(f"fn gave {tuple(value.shape)}, expected {tuple(z.shape[:-1])}")
    return value


@torch.enable_grad()
def _gradient(fn: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.detach().requires_grad_()
    # The empty sum ties a bare step, which has no graph, to z: gradient 0 and no error.
    return torch.autograd.grad(_values(fn, z).sum() + z[..., :0].sum(), z)[0]


def integrated_gradients(fn: Callable, z: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """(z - z₀) ⊙ ∫₀¹ ∇fn(z₀ + t (z - z₀)) dt by the midpoint rule, (..., d), for z₀ = baseline.

    fn: (..., d) -> (...), row by row. Complete where fn is continuous: the sum over d tends to
    fn(z) - fn(z₀) with more steps. A ReLU's kink may cost its coordinate |z - z₀| / (2 steps).
    """
    check_positive("steps", steps)
    path = (baseline + (k + 0.5) / steps * (z - baseline) for k in range(steps))
    return (z - baseline).detach() * sum(_gradient(fn, point) for point in path) / steps


def attribution_patching(fn: Callable, z: Tensor, z_patch: Tensor) -> Tensor:
    """∇fn(z) ⊙ (z_patch - z), (..., d): every patch's effect to first order, in one backward."""
    return _gradient(fn, z) * (z_patch - z).detach()


@torch.no_grad()
def activation_patching(fn: Callable, z: Tensor, z_patch: Tensor) -> Tensor:
    """fn(z with z_patch in coordinate i) - fn(z) for each i, (..., d): the effect; d + 1 calls."""
    at = torch.eye(z.shape[-1], dtype=torch.bool, device=z.device)
    return torch.stack([fn(torch.where(i, z_patch, z)) for i in at], -1) - _values(fn, z)[..., None]


# -- 11 · The fast exact path (skip on first reading) ----------------------------------------------
# Once trained, a row opens a few gates in a thousand, and outside that support, {π_gate > 0}, every
# term of the loss and every gradient is exactly zero. For s with a number at each entry (row,
# latent) of the support, and S the sparse matrix of them, all that is left are three products,
#
#     S C   (batch, d_in)        Sᵀ A   (d_sae, d_in)        A Cᵀ at the support   (nnz,)
#
# and the gradient of each is made of the other two: x̂ is of the first kind, z of the third. Only to
# find the support takes a dense product, which may be rough, and is not kept. Nothing is
# approximated, but sums round otherwise. A stack is one block-diagonal S.

BLOCK = 2**21  # entries of the dense product that exist at once
bag = partial(F.embedding_bag, mode="sum", include_last_offset=True)


class Support:
    """Some entries (row, latent) of a (*stack, batch, d_sae) tensor, and products with them.

    Sorted by latent, then by row; both are numbered through the stack. A is (*stack, batch, d_in),
    C (*stack, d_sae, d_in), s (nnz,). The last two methods alone have gradients: see `Known`.
    """

    def __init__(self, latent: Tensor, row: Tensor, x_shape: torch.Size, b_shape: torch.Size):
        self.latent, self.row, self.x_shape, self.b_shape = latent, row, x_shape, b_shape
        self.latent_starts = self._starts(latent, b_shape.numel())

    @staticmethod
    def _starts(index: Tensor, n: int) -> Tensor:
        return torch.searchsorted(index, torch.arange(n + 1, device=index.device))

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order by row, the latents in it, and where each row starts."""
        order = self.row.int().sort(stable=True).indices
        return order, self.latent[order], self._starts(self.row[order], self.x_shape[:-1].numel())

    @torch.no_grad()
    def to_rows(self, s: Tensor, C: Tensor) -> Tensor:
        """S C: (*stack, batch, d_in)."""
        order, latent, starts = self.by_row
        return bag(latent, C.flatten(0, -2), starts, per_sample_weights=s[order]).view(self.x_shape)

    @torch.no_grad()
    def to_latents(self, s: Tensor, A: Tensor) -> Tensor:
        """Sᵀ A: (*stack, d_sae, d_in)."""
        out = bag(self.row, A.flatten(0, -2), self.latent_starts, per_sample_weights=s)
        return out.view(*self.b_shape, -1)

    @torch.no_grad()
    def products(self, A: Tensor, C: Tensor) -> Tensor:
        """A Cᵀ at the support: (nnz,)."""
        A, C = A.flatten(0, -2), C.flatten(0, -2)
        S = csr()(self.latent_starts, self.row, A.new_zeros(len(self.row)), (len(C), len(A)))
        return torch.sparse.sampled_addmm(S, C, A.mT, beta=0).values()

    def per_latent(self, s: Tensor) -> Tensor:
        """Sums over rows: (nnz,) -> (*stack, d_sae)."""
        return s.new_zeros(self.b_shape.numel()).index_add(0, self.latent, s).view(self.b_shape)

    def per_entry(self, v: Tensor) -> Tensor:
        """v of each entry's latent: (*stack, d_sae) -> (nnz,)."""
        return v.flatten().index_select(0, self.latent)


@cache
def csr() -> Callable:
    """torch.sparse_csr_tensor, which warns once in a process that it is in beta: here, unheard."""
    make = partial(torch.sparse_csr_tensor, check_invariants=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make([0, 0], [], [], (1, 1))
    return make


class Known(torch.autograd.Function):
    """A value with known gradients: `gradients(grad)` is one for each of `inputs`."""

    @staticmethod
    def forward(ctx, value: Tensor, gradients: Callable, *inputs: Tensor) -> Tensor:
        ctx.gradients = gradients
        ctx.save_for_backward(*inputs)  # so that a change in between is noticed
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        _ = ctx.saved_tensors
        return None, None, *ctx.gradients(grad)


@torch.no_grad()
def find_support(x: Tensor, W_enc: Tensor, b: Tensor) -> tuple[Support, Tensor]:
    """Where x W_enc + b > 0, and x W_enc there, (nnz,)."""
    can = getattr(torch.cpu, "get_capabilities", dict)() if x.device.type == "cpu" else {}
    dtypes = [x.dtype]
    if x.shape[-1] >= 256 and (can.get("amx_bf16") or can.get("avx512_bf16")):
        dtypes = [torch.bfloat16, x.dtype]  # faster, but not where the margins let too many through
    for dtype in dtypes:
        rough = candidates(x, W_enc.mT, b, dtype)
        if len(rough.row) < x.shape[:-1].numel() * b.shape[-1] / 32:
            break
    z = rough.products(x, W_enc.mT)
    keep = (~(z <= -rough.per_entry(b))).nonzero().view(-1)  # NaN stays: the loss will show it
    return Support(rough.latent[keep], rough.row[keep], x.shape, b.shape), z[keep]


def candidates(x: Tensor, C: Tensor, b: Tensor, dtype: torch.dtype) -> Support:
    """Where x Cᵀ + b > 0, and at some entries more, from a product in `dtype`.

    Rounding moves an entry by at most eps ‖x‖ ‖c‖ (Cauchy-Schwarz), for c the latent's row of C. So
    none is missed where [x, ‖x‖, 1] · [c, eps ‖c‖, b + eps |b|] > 0 is asked instead.
    """
    (batch, d_in), d_sae = x.shape[-2:], b.shape[-1]
    eps = 1.05 * rounding(dtype)  # of x and c; and of the sum, in float32 or better:
    eps += d_in * torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    A = torch.cat([x, x.norm(dim=-1, keepdim=True), torch.ones_like(x[..., :1])], -1).to(dtype)
    A, C, b = A.view(-1, batch, d_in + 2), C.reshape(-1, d_sae, d_in), b.reshape(-1, d_sae, 1)
    most = BLOCK if x.device.type == "cpu" else 16 * BLOCK
    width, found = max(1, min(d_sae, most // batch)), []
    buffer = A.new_empty(width, batch)  # one for all: fresh memory costs as much as the product
    for member, first in itertools.product(range(len(A)), range(0, d_sae, width)):
        c, b_c = (v[member, first : first + width] for v in (C, b))
        c = torch.cat([c, eps * c.norm(dim=-1, keepdim=True), b_c + eps * b_c.abs()], -1).to(dtype)
        pi = torch.mm(c, A[member].mT, out=buffer[: len(c)])
        found.append((~(pi <= 0)).view(-1).nonzero() + (member * d_sae + first) * batch)
    flat = torch.cat(found).view(-1)
    latent = flat // batch
    return Support(latent, flat % batch + latent // d_sae * batch, x.shape, b.shape[:-1])


def rounding(dtype: torch.dtype) -> float:
    """eps of the factors of a product: by torch's switches, a float32 may be rounded to less."""
    try:
        exact = dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by the newer switches, of which this function knows nothing
        exact = False
    return torch.finfo(dtype if exact else torch.bfloat16).eps


def sparse_paths(sae: SAE, x: Tensor) -> tuple[Support, Tensor, Tensor]:
    """The support of a Standard or a tied Gated SAE, and there ReLU(π_gate) and f, (nnz,) both."""
    gated, centred = isinstance(sae, GatedSAE), (x - rows(sae.b_dec)).detach()
    b = sae.b_gate if gated else sae.b_enc
    support, z = find_support(centred, sae.W_enc, b)

    def gradients(grad: Tensor) -> tuple[Tensor, Tensor]:  # of b_dec and W_enc
        b_grad = sae.W_enc.detach() @ support.per_latent(grad).unsqueeze(-1)
        W_grad = support.to_latents(grad, centred).mT if sae.W_enc.requires_grad else None
        return -b_grad.squeeze(-1), W_grad

    z = Known.apply(z, gradients, sae.b_dec, sae.W_enc)
    f = f_gate = F.relu(z + support.per_entry(b))
    if gated:
        f = F.relu(support.per_entry(sae.r_mag.exp()) * z + support.per_entry(sae.b_mag))
    return support, f_gate, f


def sparse_losses(sae: SAE, x: Tensor) -> Losses:
    """`sae.losses(x)`, to rounding, in the SAE's own dtype. x gets no gradient."""
    check_rows(sae, x, only_batches=True)
    x, own = x.detach(), own_latents(sae)
    support, f_gate, f = sparse_paths(own, x)

    def error(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
        def gradients(grad: Tensor) -> tuple[Tensor, Tensor | None]:  # of f and W_dec
            W_grad = support.to_latents(f, grad) if W_dec.requires_grad else None
            return support.products(grad, W_dec), W_grad

        x_hat = Known.apply(support.to_rows(f, W_dec), gradients, f, W_dec)
        return squared_error(x, over_latents(x_hat, sae) + rows(b_dec))

    W_dec, b_dec = own.W_dec, whole(sae.b_dec)
    reconstruct = error(f, W_dec, b_dec)
    aux = torch.zeros_like(reconstruct)
    if getattr(sae, "aux", None) == "frozen":
        aux = error(f_gate, W_dec.detach(), b_dec.detach())
    elif getattr(sae, "aux", None) == "unfrozen":
        aux = error(f_gate, W_dec, b_dec)
    # The penalty sees each entry as an SAE of one latent, whose d_i has one coordinate, its norm.
    one, by_norm = f_gate.view(-1, 1, 1), sae.penalty.startswith("norm")
    norm = support.per_entry(W_dec.norm(dim=-1)).view(-1, 1, 1) if by_norm else one
    sparsity = support.per_latent(sae.penalise(one, norm).view(-1)).sum(-1) / x.shape[-2]
    sparsity = over_latents(sparsity, sae)
    return sae.normalized(Losses(reconstruct, sparsity, aux), x)


def is_sparse(sae: SAE, x: Tensor, density: float, sparse: bool | None) -> bool:
    """Whether to take this path: as asked, or where it was measured to be faster."""
    able = type(sae) in (StandardSAE, GatedSAE, NaturalGatedSAE) and getattr(sae, "tied", True)
    able = able and x.device.type in ("cpu", "cuda") and x.dtype in (torch.float32, torch.float64)
    if sparse and not able:
        wanted = "a Standard or a tied Gated SAE, in float32 or float64, on CPU or CUDA"
        raise ValueError(f"sparse is True for {sae} and {x.dtype} on {x.device}, expected {wanted}")
    many = x.shape[-2] * sae.b_dec[..., 0].numel() * sae.d_sae > 2**17
    return able and many and density < 1 / 16 if sparse is None else sparse


def reconstruct(sae: SAE, x: Tensor, sparse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """x̂, and of each latent over the rows Σ f and how often it fires; float64 (MPS: float32)."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    if sparse:
        own, latents = own_latents(sae), sae.W_dec[..., 0]
        support, _, f = sparse_paths(own, x)
        x_hat = over_latents(support.to_rows(f, own.W_dec), sae) + rows(whole(sae.b_dec))
        sums = (support.per_latent(s.to(wide)) for s in (f, f > 0))
        return x_hat.to(wide), *(whole(s, latents) for s in sums)
    f = sae.encode(like(x, sae.b_dec))
    x_hat = whole(sae.decode(f))
    return x_hat.to(wide), *(whole(s.sum(-2, dtype=wide)) for s in (f, f > 0))


# -- On many devices -------------------------------------------------------------------------------
# The processes of a mesh ("data", "model") of devices do together what one would. Along "data",
# process k has n_k of a batch's n rows; along "model", process K a share of the latents, and the
# same rows as its neighbours. What belongs to one latent stays with it, unit norms and Adam too.
# What crosses are sums over all rows or over all latents:
#
#     E = Σ_k n_k/n E_k        x̂ = Σ_K f_K W_dec_K + b_dec        penalty(f) = Σ_K penalty(f_K)
#
# So along "data": the losses and every gradient, by DistributedDataParallel where each process has
# all latents. Along "model": x̂, the penalties, and b_dec's gradient as x - b_dec. Parameters there
# are DTensors, on which the losses run as they stand; section 11 sums by hand. (What one process
# alone refuses, say a batch of another shape, leaves the others waiting: torchrun ends them.)


def average(t: Tensor, mesh) -> Tensor:
    """The mean over "data" of each process's t, in place."""
    if mesh is not None:
        torch.distributed.all_reduce(t, group=mesh.get_group("data"))
        t /= mesh.size(0)
    return t


def gather(value, mesh) -> list:
    """Each process's value, along "data": a tensor, by way of the CPU, or what can be pickled."""
    if mesh is None:
        return [value]
    values = [None] * mesh.size(0)
    value = value.cpu() if isinstance(value, Tensor) else value
    torch.distributed.all_gather_object(values, value, group=mesh.get_group("data"))
    return values


def with_gradient_of(t: Tensor, value: Tensor) -> Tensor:
    return Known.apply(value, lambda grad: (grad,), t)


class Part(nn.Module):
    """The losses of all rows, with gradients of this process's: their mean is that of all rows."""

    def __init__(self, sae: SAE, mesh):
        super().__init__()
        self.sae, self.mesh = sae, mesh

    def forward(self, x: Tensor, sparse: bool) -> Losses:
        sae, mesh = self.sae, self.mesh
        losses = sparse_losses(sae, x) if sparse else sae.losses(like(x, sae.b_dec))
        if mesh is None:
            return losses
        n, scale = x.new_full((), x.shape[-2]), 1
        weight = n / average(n.clone(), mesh)
        if sae.normalize:  # by E‖x‖² of all rows instead
            x_sq = x.square().sum(-1).mean(-1)
            scale = positive(x_sq) / positive(average(weight * x_sq, mesh))
        scales = Losses(reconstruct=scale, sparsity=1, aux=scale)
        own = [weight * s * whole(term) for s, term in zip(scales, losses, strict=True)]
        return Losses(*map(with_gradient_of, own, average(torch.stack(own).detach(), mesh)))


def spread(sae: SAE, mesh) -> nn.Module:
    """Lays an SAE out on the mesh, in place; calls give this process's `Part`.

    Where latents are shared out its parameters become DTensors. On the meta device they have no
    numbers: they start here, from a seed for each share, and no process ever holds them all.
    """
    part = Part(sae, mesh)
    if mesh is None or is_shared(sae.W_dec):
        return part
    if (n := mesh.size(1)) == 1:
        options = dict(process_group=mesh.get_group("data"), gradient_as_bucket_view=True)
        return nn.parallel.DistributedDataParallel(part, **options)
    from torch.distributed.tensor import Replicate, Shard

    k, width = mesh.get_local_rank("model"), -(-sae.d_sae // n)
    config = sae.config | dict(d_sae=min(width, sae.d_sae - k * width))
    at = dict(device=mesh.device_type, dtype=sae.W_dec.dtype)
    share = type(sae)(**config, generator=torch.Generator().manual_seed(k), **at)
    for name, p in list(sae.named_parameters()):
        placement = Replicate() if name == "b_dec" else Shard(p.ndim - 1 - (name == "W_dec"))
        new = as_share(share.get_parameter(name).detach(), p, mesh["model"], [placement])
        if not p.is_meta:
            new.copy_(like(p.detach(), new))
        setattr(sae, name, nn.Parameter(new, p.requires_grad))
    return part


def is_shared(t: Tensor) -> bool:
    return hasattr(t, "placements")  # a DTensor, whose class would take a second to import


def as_share(t: Tensor, all_of_it: Tensor, mesh, placements) -> Tensor:
    """The DTensor that has the shape of `all_of_it` and, on this process, holds t."""
    from torch.distributed.tensor import DTensor

    size = dict(shape=all_of_it.shape, stride=all_of_it.stride())
    return DTensor.from_local(t, mesh, placements, run_check=False, **size)


def share_of(t: Tensor) -> Tensor:
    """What this process holds of a DTensor, in place; any other tensor it holds."""
    return t.to_local() if is_shared(t) else t


def whole(t: Tensor, p: Tensor | None = None) -> Tensor:
    """All of a DTensor, on every process; any other tensor is whole.

    Given p: all of what is spread as p is, of which this process holds t.
    """
    if p is not None and is_shared(p):
        t = as_share(t, p, p.device_mesh, p.placements)
    return t.full_tensor() if is_shared(t) else t


def like(t: Tensor, p: Tensor) -> Tensor:
    """The reverse of `whole`: t, which every process has, spread as p is."""
    if not is_shared(p):
        return t
    mesh, (placement,) = p.device_mesh, p.placements
    own = t
    if placement.is_shard():
        own = t.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
    return as_share(own.to(p.device), t, mesh, p.placements)


def own_latents(sae: SAE) -> SAE:
    """An SAE of the latents on this process. Its gradients go to `sae`."""
    if not is_shared(sae.W_dec):
        return sae
    from torch.distributed.tensor import Partial

    own = copy.copy(sae)
    own._parameters = {
        name: p.to_local(grad_placements=[Partial()] if name == "b_dec" else p.placements)
        for name, p in sae.named_parameters()
    }
    return own


def over_latents(t: Tensor, sae: SAE) -> Tensor:
    """The sum over "model" of each process's t, with its gradient."""
    if not is_shared(sae.W_dec):
        return t
    value = t.detach().clone()
    torch.distributed.all_reduce(value, group=sae.W_dec.device_mesh.get_group())
    return with_gradient_of(t, value)


def average_gradients(sae: SAE, mesh) -> None:
    """Those that are DTensors: DistributedDataParallel has seen to all others."""
    for p in sae.parameters():
        if is_shared(p) and p.grad is not None:
            p.grad = p.grad.redistribute(placements=p.placements)  # of b_dec, a sum over "model"
            average(share_of(p.grad), mesh)


def whole_state(state):
    """A state dict, of an SAE or an optimiser, with each DTensor whole, on the CPU: in the first
    process, and None in others, which must take part.
    """
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if not isinstance(state, Tensor) or not is_shared(state):
        return state
    t = whole(state)
    return t.cpu() if is_first() else None


def is_first() -> bool:
    """Whether this process is the one that writes, or the only one."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not several or torch.distributed.get_rank() == 0


@torch.no_grad()
def load_whole_state(trainer: Trainer, sae_state: dict, optimizer_state: dict) -> None:
    """What `whole_state` gave for both, on this or another mesh or on none, into a Trainer."""

    def moment(t: Tensor, p: Tensor) -> Tensor:  # in memory as p: fused Adam looks at no strides
        return torch.empty_like(p).copy_(like(t, p)) if t.ndim else t

    sae, parameters = trainer.sae, list(trainer.sae.parameters())
    sae.load_state_dict({name: like(t, sae.get_parameter(name)) for name, t in sae_state.items()})
    moments = {
        number: {key: moment(t, parameters[number]) for key, t in state.items()}
        for number, state in optimizer_state["state"].items()
    }
    trainer.optimizer.load_state_dict(optimizer_state | dict(state=moments))


# -- 12 · Files and conversions --------------------------------------------------------------------
# The layout is SAELens's, a folder with two files, so that weights travel both ways.

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
VARIANTS = StandardSAE, SigmoidGatedSAE, NaturalGatedSAE, SoftCutoffSAE, JumpReLUSAE
ARCHITECTURES = {kind.architecture: kind for kind in VARIANTS}
ARCHITECTURES |= {"gated": GatedSAE, "gated_untied": GatedSAE}
# What SAELens may do and this file does not: another value is refused.
PREPROCESSING = dict(
    apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none"
)
FIXED = PREPROCESSING | dict(activation_fn="relu", activation_fn_str="relu")


def save(sae: SAE, folder: str | os.PathLike) -> None:
    """Write an SAE to `folder`. SAELens loads a single Standard, tied Gated or JumpReLU SAE.

    If the folder holds an SAE of the same configuration, its weights are replaced; if of another
    one, ValueError. A kill at any moment leaves the old SAE or the new: the config is written while
    there are no weights and never changes under them, and the weights are replaced in one move.
    (One process at a time may save to a folder: of those of a mesh, all call this, and one writes.)
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder, sae = Path(folder), getattr(sae, "_orig_mod", sae)  # torch.compile wraps modules
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to save into")
    given = _describe(sae)
    tensors = whole_state(dict(sae.state_dict()))
    if not is_first():
        return
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    blank = type(sae)(**sae.config, dtype=sae.W_enc.dtype, device="meta")
    _fill(blank, tensors, "the SAE")  # what could not be loaded is not saved
    if (folder / WEIGHTS_FILE).exists():
        held = _describe(_blank(folder))
        check_same(f"{folder} holds another SAE", held, given)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        config = given | PREPROCESSING | dict(device="cpu", metadata={})
        _replace(folder / CONFIG_FILE, lambda new: new.write_text(json.dumps(config, indent=2)))
    try:
        _replace(folder / WEIGHTS_FILE, lambda new: save_file(tensors, new))
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{folder / WEIGHTS_FILE}: {error}") from None


def load(folder: str | os.PathLike, device: torch.device | str = "cpu") -> SAE:
    """The SAE that `save`, or SAELens's `save_model`, wrote to `folder`, in its own dtype.

    Missing or broken files, an architecture or a preprocessing of x unknown here, and weights that
    do not fit the config raise ValueError. Nothing is unpickled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    sae = _blank(folder)
    try:
        # Copies: what load_file returns is the file itself, and would change with it.
        tensors = {name: t.clone() for name, t in load_file(folder / WEIGHTS_FILE).items()}
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {WEIGHTS_FILE}, expected a saved SAE") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: {error}, expected safetensors") from None
    return _fill(sae, tensors, folder).to(device)


# dictionary-learning's names of our parameters, and its matrices are ours transposed.
DICTIONARY_LEARNING = {
    "gated": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "decoder_bias": "b_dec",
        "gate_bias": "b_gate",
        "mag_bias": "b_mag",
        "r_mag": "r_mag",
    },
    "standard": {
        "encoder.weight": "W_enc",
        "decoder.weight": "W_dec",
        "bias": "b_dec",
        "encoder.bias": "b_enc",
    },
}


def from_dictionary_learning(state: Mapping[str, Tensor]) -> SAE:
    """The SAE in a state dict of dictionary-learning's GatedAutoEncoder or AutoEncoder.

    ValueError, with both lists of names and shapes, if it is neither.
    """
    variant = GatedSAE if "r_mag" in state else StandardSAE
    names = DICTIONARY_LEARNING["gated" if variant is GatedSAE else "standard"]
    if set(state) != set(names) or state["encoder.weight"].ndim != 2:
        raise ValueError(f"the state holds {sorted(state)}, expected {sorted(names)}")
    turned = {old: t.mT if t.ndim == 2 else t for old, t in state.items()}
    tensors = {new: turned[old].detach().clone() for old, new in names.items()}
    W_enc = tensors["W_enc"]
    return _fill(variant(*W_enc.shape, dtype=W_enc.dtype, device="meta"), tensors, "the state")


def to_dictionary_learning(sae: SAE) -> dict[str, Tensor]:
    """The state dict of dictionary-learning's GatedAutoEncoder or AutoEncoder with its outputs.

    ValueError unless it is a single Standard or tied Gated SAE.
    """
    if sae.stack or sae.architecture not in DICTIONARY_LEARNING:
        raise ValueError(f"got a {sae}, expected a single Standard or tied Gated SAE")
    names, own = DICTIONARY_LEARNING[sae.architecture], sae.state_dict()
    turned = {name: t.mT if t.ndim == 2 else t for name, t in own.items()}
    return {old: turned[new].detach().contiguous().clone() for old, new in names.items()}


def _describe(sae: SAE) -> dict:
    """All but the values of the weights, as JSON has it."""
    dtype = str(sae.W_enc.dtype).removeprefix("torch.")
    return dict(architecture=sae.architecture, dtype=dtype) | sae.config | dict(stack=[*sae.stack])


def _blank(folder: Path) -> SAE:
    """The SAE that the folder's config describes, on the meta device: it has shapes, no numbers."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
        for key, known in FIXED.items():
            if config.get(key, known) != known:
                raise ValueError(f"{key} is {config[key]!r}, expected {known!r}")
        variant = ARCHITECTURES[config["architecture"]]
        dtype = getattr(torch, config.get("dtype", "float32").removeprefix("torch."))
        options = {key: config[key] for key in variant(1, 1).config if key in config}
        sae = variant(**options, dtype=dtype, device="meta")
        if sae.architecture != config["architecture"]:
            raise ValueError(f"architecture is {config['architecture']!r}, with {options}")
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {CONFIG_FILE}, expected a saved SAE") from None
    except (ValueError, TypeError, LookupError, AttributeError, RuntimeError, OSError) as error:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"{path}: {error!r}, expected the config of one of {known}") from None
    return sae


def _fill(sae: SAE, tensors: Mapping[str, Tensor], source) -> SAE:
    expected = {name: (*p.shape, p.dtype) for name, p in sae.state_dict().items()}
    found = {name: (*t.shape, t.dtype) for name, t in tensors.items()}
    if found != expected:
        raise ValueError(f"{source}: the weights are {found}, expected {expected}")
    tensors = {  # in memory as they start
        name: t.mT.contiguous().mT if name in ("W_enc", "W_mag") else t.contiguous()
        for name, t in tensors.items()
    }
    sae.load_state_dict(tensors, assign=True)
    return sae


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one move: it holds the old content or the new, also after a kill."""
    new = path.with_name(path.name + ".new")
    try:
        write(new)
        with open(new, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)


# Then, conversions.


def to_jumprelu(sae: SAE) -> JumpReLUSAE:
    """The JumpReLU SAE with its outputs (section 6); of a soft cutoff, with its limit for s → 0.

    An untied or a sigmoid gate has none: ValueError.
    """
    if isinstance(sae, GatedSAE):
        theta, b_enc, W_enc = sae.threshold, sae.b_mag, sae.W_enc * rows(sae.r_mag.exp())
    else:
        theta = getattr(sae, "threshold", 0 * sae.b_enc)  # a ReLU has none
        b_enc, W_enc = sae.b_enc, sae.W_enc
    return _converted(JumpReLUSAE, sae, dict(threshold=F.relu(theta), b_enc=b_enc, W_enc=W_enc))


def to_gated(sae: SAE, **options) -> GatedSAE:
    """The Gated SAE with the outputs of `to_jumprelu(sae)`: b_mag = b_enc, b_gate = b_enc - θ.

    `options` are those of GatedSAE; `normalize` is kept unless given.
    """
    sae = to_jumprelu(sae)
    values = dict(b_gate=sae.b_enc - sae.threshold, b_mag=sae.b_enc, W_mag=sae.W_enc)
    return _converted(GatedSAE, sae, values, **options)


def _converted(kind: type[SAE], sae: SAE, values: dict[str, Tensor], **options) -> SAE:
    at = dict(stack=sae.stack, device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    new = kind(sae.d_in, sae.d_sae, **at, **(dict(normalize=sae.normalize) | options))
    values = sae.state_dict() | values
    new.load_state_dict({name: values.get(name, v) for name, v in new.state_dict().items()})
    return new


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """d_i ← d_i / n_i and f_i ← n_i f_i, for n_i = ‖d_i‖: x̂ and the squared errors stay.

    Norms within 1e-3 of 1 are left alone. ValueError where f does not scale with x.
    """
    n = sae.W_dec.norm(dim=-1)
    n = torch.where(n > 0, n, 1)
    if ((n - 1).abs() <= 1e-3).all():
        return
    if isinstance(sae, SigmoidGatedSAE | SoftCutoffSAE):
        span = n.min().item(), n.max().item()
        raise ValueError(f"rows of W_dec have norms {span}, expected 1: f does not scale with x")
    sae.W_dec /= n.unsqueeze(-1)
    for name, parameter in sae.named_parameters():
        if name in ("W_enc", "W_mag"):
            parameter *= rows(n)
        elif name in sae.latent_vectors:
            parameter *= n


# -- 13 · Upkeep -----------------------------------------------------------------------------------
# What the sections above call and need not explain. First, dead latents.


@torch.no_grad()
def resample(
    sae: SAE,
    dead: Tensor,
    x: Tensor,
    generator: torch.Generator,
    optimizer: torch.optim.Optimizer | None = None,
    sparse: bool = False,
) -> None:
    """Restart latents at inputs x (batch, d_in) that are reconstructed badly, as Anthropic does.

    A dead latent gets no gradient and stays dead. Each of `dead` (*stack, d_sae), bool, draws a row
    with probability ∝ its squared error squared; d_i becomes its direction from b_dec, the encoder
    the same at 0.2 of the others' mean norm. All else of the latent restarts, in the optimiser too
    (transformer-circuits.pub/2023/monosemantic-features, "neuron resampling"). There, Adam's second
    moment becomes the mean of the others': from 0, the first step would be 30 times as long.
    """

    def mean_of_living(v: Tensor, is_dead: Tensor) -> Tensor:
        own, living = tuple(range(len(sae.stack) - v.ndim, 0)), (~is_dead).expand_as(v)
        return (v * living).sum(own, keepdim=True) / living.sum(own, keepdim=True).clamp_min(1)

    n, batch = max(1, int(dead.sum(-1).max())), x.shape[-2]
    error = (x - reconstruct(sae, x, sparse)[0].to(x)).square().sum(-1)  # (*stack, batch)
    tiny = torch.finfo(error.dtype).tiny
    weight = F.normalize(error, p=math.inf, dim=-1, eps=tiny).square() + tiny
    # Rows are drawn twice only if they are too few: two equal latents would stay equal for ever.
    weight = weight.view(-1, batch).to(generator.device)
    drawn = torch.multinomial(weight, n, n > batch, generator=generator).to(x.device)
    nth = (dead.cumsum(-1) - 1).clamp_min(0)  # the nth dead latent gets the nth row drawn
    drawn = drawn.view(*sae.stack, n).gather(-1, nth)
    dead, drawn = (like(v, sae.W_dec[..., 0]) for v in (dead, drawn))
    centred = like(x, sae.b_dec) - rows(sae.b_dec)
    d = F.normalize(centred.take_along_dim(drawn.unsqueeze(-1), -2), dim=-1)  # as W_dec
    size = 0.2 * mean_of_living(sae.W_enc.norm(dim=-2), dead).unsqueeze(-1)
    W_enc = (torch.where(size > 0, size, 0.2) * d).mT
    start = sae.latent_vectors | dict(W_dec=d, W_enc=W_enc, W_mag=W_enc)
    masks = dict(W_dec=dead.unsqueeze(-1), W_enc=rows(dead), W_mag=rows(dead))
    for name, parameter in sae.named_parameters():
        if name == "b_dec" or not parameter.requires_grad:
            continue
        is_dead = masks.get(name, dead)
        parameter.copy_(torch.where(is_dead, start.get(name, 0.0), parameter))
        for key, moment in (optimizer.state[parameter] if optimizer else {}).items():
            if key != "step":
                fresh = mean_of_living(moment, is_dead) if key == "exp_avg_sq" else 0.0
                moment.copy_(torch.where(is_dead, fresh, moment))


def default_device(given: torch.device | str = "cpu") -> torch.device:
    """The accelerator if there is one, unless another device was given."""
    given = torch.device(given)
    found = torch.accelerator.current_accelerator(check_available=True)
    return found if found and given.type == "cpu" else given


# Then, what is refused. Each error says what came and what was expected.


def check_positive(name: str, value: int) -> int:
    """The value as an int, if it is one and at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")
    return operator.index(value)


def check_config(sae: SAE, d_in: int, d_sae: int, stack, dtype, options: dict) -> dict:
    """All that `sae.config` will hold: sizes, and a value for each of `sae.options`."""
    config = dict(d_in=check_positive("d_in", d_in), d_sae=check_positive("d_sae", d_sae))
    stack = (stack,) if hasattr(stack, "__index__") else stack
    config["stack"] = tuple(check_positive("a dimension of stack", n) for n in stack)
    for name, allowed in sae.options.items():
        number = isinstance(allowed, float)
        value = options.pop(name, allowed if number else next(iter(allowed)))
        config[name] = float(value) if isinstance(value, Real) and number else value
        if number and not (isinstance(value, Real) and 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r}, expected a positive number")
        if not number and not any(value == v and type(value) is type(v) for v in allowed):
            raise ValueError(f"{name} is {value!r}, expected one of {list(allowed)}")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected a floating-point dtype")
    if options:
        raise TypeError(f"{type(sae).__name__} got {options}, expected of {list(sae.options)}")
    if (pair := (config.get("aux"), config["penalty"])) in (
        ("frozen", "norm_live"),
        ("unfrozen", "norm_frozen"),
    ):
        message = f"aux={pair[0]!r} with penalty={pair[1]!r}: see norm_penalty"
        warnings.warn(message, stacklevel=4)  # where the SAE was made
    return config


def check_rows(sae: SAE, x: Tensor, only_batches: bool = False) -> None:
    """x is (..., batch, d_in), in the SAE's dtype; for a stack or `only_batches` as in `SAE`."""
    if not isinstance(x, Tensor) or x.dtype != sae.W_enc.dtype:
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x is {kind}, expected {sae.W_enc.dtype} like the SAE")
    if x.ndim < 2 or x.shape[-1] != sae.d_in or x.numel() == 0:
        raise ValueError(f"x is {tuple(x.shape)}, expected (..., batch ≥ 1, {sae.d_in})")
    if (sae.stack or only_batches) and x.shape[:-2] not in ((), sae.stack):
        own = f" or (*{sae.stack}, batch, {sae.d_in})" if sae.stack else ""
        raise ValueError(f"x is {tuple(x.shape)}, expected (batch, {sae.d_in}){own}")


def stream(sae: SAE, batches: Iterable[Tensor], whole: bool = False) -> Iterator[Tensor]:
    """Each batch, checked, on the SAE's device and in its dtype. Errors number them from 0.

    `whole`: there is at least one, and all are finite.
    """
    if isinstance(batches, Tensor):
        raise TypeError("batches is one tensor, expected an iterable of them: x.split(512), or [x]")
    number = -1
    for number, x in enumerate(batches):
        if isinstance(x, Tensor) and x.is_floating_point():
            # Detached: the model that made x is not being trained.
            x = x.detach().to(sae.W_enc.device).to(sae.W_enc.dtype)  # in this order: fewer bytes
        try:
            check_rows(sae, x, only_batches=True)
            if whole and not x.isfinite().all():
                raise ValueError(bad_rows(x))
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number}: {error}") from None
        yield x
    if whole and number < 0:
        raise ValueError("batches is empty, expected at least one batch")


def check_same(what: str, held: dict, given: dict) -> None:
    differ = {k: (held.get(k), given.get(k)) for k in held | given if held.get(k) != given.get(k)}
    if differ:
        raise ValueError(f"{what}; (held, given) differ in {differ}")


def bad_rows(x: Tensor, start: int = 0) -> str:
    bad = (~x.isfinite()).any(-1).flatten().nonzero().flatten()
    first = start + int(bad[0])
    return f"NaN or infinity in {len(bad)} of {x[..., 0].numel()} rows, first in row {first}"


def check_schedule(trainer: Trainer, l1: float | Tensor) -> None:
    """The arguments of `Trainer`."""
    check_positive("steps", trainer.steps)
    if trainer.resample_every is not None:
        check_positive("resample_every", trainer.resample_every)
        if not trainer.sae.W_dec.requires_grad:
            raise ValueError("W_dec is frozen, expected resample_every=None or a trained W_dec")
    if not (isinstance(trainer.lr, Real) and 0 < trainer.lr < math.inf):
        raise ValueError(f"lr is {trainer.lr}, expected a positive number")
    sae, shares = trainer.sae, trainer.shares
    if torch.is_inference_mode_enabled() or not any(p.requires_grad for p in sae.parameters()):
        raise ValueError("got no gradients (inference mode, or all is frozen), expected some")
    if not all(0 <= share <= 1 for share in shares):
        names = "lr_warmup, l1_warmup, lr_decay"
        raise ValueError(f"{names} are {shares}, expected shares in [0, 1]")
    if torch.finfo(sae.W_enc.dtype).bits < 32:
        raise TypeError(f"the SAE is {sae.W_enc.dtype}, expected float32: train, then convert")
    if (mesh := trainer.mesh) is not None and mesh.mesh_dim_names != ("data", "model"):
        raise ValueError(f"mesh has dimensions {mesh.mesh_dim_names}, expected ('data', 'model')")
    n = 1 if mesh is None else mesh.size(1)
    if sae.d_sae <= (n - 1) * -(-sae.d_sae // n):
        raise ValueError(f"d_sae is {sae.d_sae}, expected a share for each of {n} processes")
    if sae.W_dec.is_meta and n == 1:
        raise ValueError("the SAE is on the meta device, expected a mesh that shares latents out")
    l1 = torch.as_tensor(l1)
    if l1.shape not in ((), sae.stack) or not ((l1 >= 0) & l1.isfinite()).all():
        wanted = f"finite and ≥ 0, of shape () or {sae.stack}"
        raise ValueError(f"l1 is {l1.tolist()}, expected {wanted}")


def check_finite(broken: Tensor, total: Tensor, x: Tensor, step: int, mesh) -> None:
    """A loss that is no number would make every parameter none."""
    if broken:
        found = gather("" if x.isfinite().all() else bad_rows(x), mesh)
        if mesh is not None:
            found = [f"data process {k}: {bad}" for k, bad in enumerate(found) if bad]
        cause = next(filter(None, found), f"the loss is {total.tolist()}")
        if total.isfinite().all():  # on a GPU, where not every step is looked at
            cause = "an earlier loss, since the last record, was not finite"
        broken.zero_()  # it was told: the next batch may be better
        raise ValueError(f"step {step}: {cause}; the SAE is as it was before this step")


# -- 14 · The command line -------------------------------------------------------------------------
# `python gated_sae.py train --help`. Activations come from files of any size. A run that stopped
# goes on where it was, on a CPU to the bit: its batches are a function of seed and step.

HELD = 2**28  # bytes of activations that are shuffled in memory at once
CHECKPOINT_FILE, LOG_FILE = "checkpoint.pt", "log.jsonl"


class Activations:
    """Rows (n, d_in) of floats in a .npy or .safetensors file, or in a folder of such shards.

    Only what is needed is read, and mapped for no longer. ValueError, which names the file, if one
    is cut off, unlike the others, no 2-D array of floats (nothing is unpickled), or has a NaN.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = path = Path(path)
        found = sorted(path.iterdir()) if path.is_dir() else [path]
        kinds = ".npy", ".safetensors"
        self.files = [f for f in found if f.suffix in kinds and not f.name.startswith(".")]
        if not self.files:
            raise ValueError(f"{path} is or holds no .npy or .safetensors file")
        self.lengths, alike = [], {}
        for file in self.files:
            (n, d_in), dtype, _ = _open_rows(file)
            self.lengths.append(n)
            alike.setdefault((d_in, dtype), str(file))
        if len(alike) > 1:
            raise ValueError(f"shards differ in width or dtype: {alike}, expected all alike")
        ((self.d_in, self.dtype),) = alike

    def __len__(self) -> int:
        return sum(self.lengths)

    def describe(self) -> str:
        return f"{len(self)} rows of {self.d_in} {self.dtype} in {len(self.files)} files"

    def read(self, file: int, first: int, last: int) -> Tensor:
        """Some rows of one file."""
        *_, read = _open_rows(self.files[file])
        x = read(first, last)
        if not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"{self.files[file]}, from row {first} on: {bad_rows(x, first)}")
        return x

    def in_order(self, batch: int) -> Iterator[Tensor]:
        """Every row once, (≤ batch, d_in) at a time."""
        for file, n in enumerate(self.lengths):
            for first in range(0, n, batch):
                yield self.read(file, first, min(first + batch, n))

    def batches(self, batch: int, seed: int = 0, start: int = 0) -> Iterator[Tensor]:
        """Batches (batch, d_in) without end, from number `start` on.

        In each epoch the files are cut into blocks, which are shuffled; then the rows within as
        many as HELD bytes take, a window. While one is given out, a thread reads the next. What
        fills no batch at the end of an epoch is left out.
        """
        import numpy as np

        per_epoch = len(self) // check_positive("batch", batch)
        if not per_epoch:
            raise ValueError(f"{self.path} has {len(self)} rows, expected a batch of {batch}")
        size = max(64, len(self) // 2**20)  # of a block
        cuts = ((i, n, a) for i, n in enumerate(self.lengths) for a in range(0, n, size))
        blocks = np.array([(i, a, min(size, n - a)) for i, n, a in cuts])
        n_held = max(1, HELD // (batch * self.d_in * self.dtype.itemsize))  # batches of a window
        n_windows = -(-per_epoch // n_held)

        @lru_cache(maxsize=1)
        def shuffled(epoch: int) -> tuple:
            order = np.random.default_rng([seed, epoch]).permutation(len(blocks))
            return blocks[order], blocks[order, 2].cumsum()

        def read(number: int) -> Tensor:
            epoch, window = divmod(number, n_windows)
            (order, ends), first = shuffled(epoch), window * n_held * batch
            last = min((window + 1) * n_held, per_epoch) * batch
            x = torch.empty(last - first, self.d_in, dtype=self.dtype)
            inside = (ends > first) & (ends - order[:, 2] < last)
            for (file, a, n), end in zip(order[inside], ends[inside], strict=True):
                lo, hi = max(first, end - n), min(last, end)
                x[lo - first : hi - first] = self.read(file, a + lo - end + n, a + hi - end + n)
            rng = np.random.default_rng([seed, epoch, 1 + window])
            return x[torch.from_numpy(rng.permutation(last - first))]

        epoch, number = divmod(start, per_epoch)
        window, skip = epoch * n_windows + number // n_held, number % n_held
        reader = ThreadPoolExecutor(1)
        try:
            coming = reader.submit(read, window)
            while True:
                x, window = coming.result(), window + 1
                coming = reader.submit(read, window)
                yield from x.split(batch)[skip:]
                skip = 0
        finally:
            reader.shutdown(wait=False, cancel_futures=True)


def _open_rows(file: Path) -> tuple[tuple[int, int], torch.dtype, Callable[[int, int], Tensor]]:
    """Shape and dtype of the array in a file, and a function that reads rows from first to last."""
    import numpy as np
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".npy":
            array = np.load(file, mmap_mode="r", allow_pickle=False)
            native = array.dtype.newbyteorder("=")
            shape, dtype = array.shape, torch.from_numpy(np.empty(0, native)).dtype

            def read(first: int, last: int) -> Tensor:
                return torch.from_numpy(np.array(array[first:last], native))
        else:
            with safe_open(file, "pt") as tensors:
                (name,) = tensors.keys()
                array = tensors.get_slice(name)
            shape, dtype = array.get_shape(), array[:0].dtype

            def read(first: int, last: int) -> Tensor:
                return array[first:last]

        floats = torch.float16, torch.bfloat16, torch.float32, torch.float64
        if len(shape) != 2 or not all(shape) or dtype not in floats:
            raise ValueError(f"{dtype} {tuple(shape)}")
    except (
        ValueError,
        TypeError,
        AttributeError,
        OSError,
        EOFError,
        SafetensorError,
        IndexError,
        OverflowError,
    ) as error:
        raise ValueError(f"{file}: {error}, expected one array (rows, d_in) of floats") from None
    return tuple(shape), dtype, read


def save_checkpoint(trainer: Trainer, folder: str | os.PathLike, run: dict) -> None:
    """All that the next step depends on, and the SAE as `save` writes it. On a mesh, all call it.

    `run` holds what else defines the run, numbers and strings. A kill at any moment, or a full
    disk, leaves the last checkpoint.
    """
    if trainer.broken:
        raise ValueError("a loss was not finite since the last record, expected none to save")
    state = dict(
        run=run,
        sae=whole_state(dict(trainer.sae.state_dict())),
        optimizer=whole_state(trainer.optimizer.state_dict()),
        done=trainer.done,
        density=trainer.density,
        silent=trainer.silent,
        generator=trainer.generator.get_state(),
    )
    if is_first():
        if (Path(folder) / WEIGHTS_FILE).exists():  # as in `save`, before anything is replaced
            held = _describe(_blank(Path(folder)))
            check_same(f"{folder} holds another SAE", held, _describe(trainer.sae))
        Path(folder).mkdir(parents=True, exist_ok=True)
        _replace(Path(folder) / CHECKPOINT_FILE, lambda new: torch.save(state, new))
    save(trainer.sae, folder)


def load_checkpoint(trainer: Trainer, folder: str | os.PathLike, run: dict) -> None:
    """Brings a Trainer made alike, on whatever devices, to where `save_checkpoint` was.

    ValueError if `run` differs.
    """
    path = Path(folder) / CHECKPOINT_FILE
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = "run", "sae", "optimizer", "done", "density", "silent", "generator"
        held, tensors, *_ = (state[name] for name in wanted)
        sizes = {name: tuple(t.shape) for name, t in tensors.items()}
    except (
        OSError,
        EOFError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{path}: {error}, expected a checkpoint") from None
    check_same(f"{path} is of another run", held, run)
    own = {name: tuple(p.shape) for name, p in trainer.sae.named_parameters()}
    check_same(f"{path} is of another SAE", sizes, own)
    load_whole_state(trainer, state["sae"], state["optimizer"])
    trainer.done, trainer.density = state["done"], state["density"]
    trainer.silent.copy_(state["silent"])
    trainer.generator.set_state(state["generator"])


def run_train(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    out = Path(args.out)
    resumes = args.resume and (out / CHECKPOINT_FILE).exists()
    if out.is_dir():  # with --resume, it may hold what a kill left behind before any checkpoint
        taken = (out / WEIGHTS_FILE).exists() if args.resume else any(out.iterdir())
    else:
        taken = out.exists()
    if taken and not resumes:
        raise ValueError(f"{out} exists, expected a new folder, or --resume and one with its run")
    data = Activations(args.activations)
    steps = args.steps or max(1, len(data) // args.batch)
    mesh = mesh_of_torchrun(args.device, args.shards)
    trainer = Trainer(
        ARCHITECTURES[args.variant](
            data.d_in,
            args.d_sae,
            generator=torch.Generator().manual_seed(args.seed),
            dtype=torch.float64 if args.dtype == "float64" else torch.float32,
            **({"tied": False} if args.variant == "gated_untied" else {}),
        ),
        l1=args.l1,
        steps=steps,
        lr=args.lr,
        resample_every=args.resample_every,
        autocast=torch.bfloat16 if args.dtype == "bfloat16" else None,
        device=args.device if mesh is None else None,
        mesh=mesh,
    )
    given = "variant", "d_sae", "l1", "batch", "lr", "resample_every", "dtype", "seed"
    run = {name: getattr(args, name) for name in given} | dict(steps=steps, data=data.describe())
    if resumes:
        load_checkpoint(trainer, out, run)
        save(trainer.sae, out)  # if the last run ended between the two files
    else:
        # Data may lie far from the origin, and b_dec would be long on its way there.
        mean = next(data.batches(args.batch, args.seed)).double().mean(0)
        share_of(trainer.sae.b_dec.data).copy_(mean)
    batches, stops = data.batches(args.batch, args.seed, trainer.done), []
    if mesh is not None:  # each process reads all rows, and keeps its own
        batches = (x.tensor_split(mesh.size(0))[mesh.get_local_rank("data")] for x in batches)
    off = not is_first()
    bar = tqdm(total=steps, initial=trainer.done, desc=args.variant, unit="step", disable=off)
    with stopping(stops.append), bar:
        for record in trainer.run(batches, args.log_every):
            bar.update()
            stop = all_agree(stops, mesh, record.step)
            if (m := record.metrics) and is_first():
                shown = dict(loss=record.losses.total(record.l1), L0=m.l0, FVU=m.fvu, gamma=m.gamma)
                shown = {name: float(f"{value:.4g}") for name, value in shown.items()}
                bar.set_postfix(shown)
                out.mkdir(parents=True, exist_ok=True)
                with open(out / LOG_FILE, "a") as log:  # steps taken twice are there twice
                    print(json.dumps({"step": record.step} | shown), file=log)
            # After step 1, too: a disk that will not do should say so at once.
            if stop or record.step in (1, steps) or record.step % args.checkpoint_every == 0:
                save_checkpoint(trainer, out, run)
            if stop and record.step < steps:
                raise ValueError(f"stopped after step {record.step} of {steps}; --resume goes on")


def mesh_of_torchrun(device: str | None, shards: int):
    """The mesh of all processes that torchrun started, with `shards` along "model"; else None."""
    if not (world := os.environ.get("WORLD_SIZE", "1")).isdecimal() or (n := int(world)) < 1:
        raise ValueError(f"WORLD_SIZE is {world!r}, expected a positive integer")
    if n % shards:
        raise ValueError(f"--shards is {shards} for {n} processes, expected one that divides them")
    if n == 1:
        return None
    kind = torch.device(device or default_device()).type
    return torch.distributed.init_device_mesh(
        kind, (n // shards, shards), mesh_dim_names=("data", "model")
    )


def all_agree(stops: list, mesh, step: int) -> bool:
    """Whether to stop. A signal reaches processes at different steps: every tenth they ask."""
    if mesh is None:
        return bool(stops)
    if step % 10:
        return False
    stop = torch.tensor(float(bool(stops)), device=mesh.device_type)
    torch.distributed.all_reduce(stop, torch.distributed.ReduceOp.MAX)
    return stop.item() > 0


@contextmanager
def stopping(stop: Callable[[int], object]) -> Iterator[None]:
    """Within, SIGINT and SIGTERM only call `stop`, the first time."""

    def once(number: int, frame) -> None:
        stop(number)
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, once)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_eval(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    data = Activations(args.activations)
    device = args.device or default_device()
    n_batches = sum(-(-n // args.batch) for n in data.lengths)
    if (sae := load(args.sae, device)).stack:
        raise ValueError(f"{args.sae} holds a stack of shape {sae.stack}, expected a single SAE")
    m = evaluate(sae, tqdm(data.in_order(args.batch), total=n_batches))
    names = "l0", "fvu", "gamma", "cosine_squared", "norm_ratio", "l1_norm", "dead_fraction"
    with warnings.catch_warnings():  # of a ratio without a value: it is shown as such
        warnings.simplefilter("ignore", RuntimeWarning)
        found = {"rows": m.n_rows} | {name: getattr(m, name).item() for name in names}
    if args.json:
        print(json.dumps({k: v if math.isfinite(v) else None for k, v in found.items()}))
    else:
        print("\n".join(f"{name:14}{value:14.6g}" for name, value in found.items()))


def parser() -> argparse.ArgumentParser:
    """The command line, and what `--help` says of it."""

    def number(kind: type, least: float) -> Callable:
        def parse(text: str) -> float:
            if not least <= (value := kind(text)) < math.inf:
                raise ValueError
            return value

        parse.__name__ = f"{kind.__name__} ≥ {least:g}"  # argparse: "invalid int ≥ 1 value"
        return parse

    layout = dict(formatter_class=argparse.RawDescriptionHelpFormatter)
    top = argparse.ArgumentParser(description=HELP, **layout)
    commands = top.add_subparsers(dest="command", required=True)
    about = "train an SAE on activations, and save it"
    add = commands.add_parser("train", help=about, description=TRAIN_HELP, **layout).add_argument
    add("activations", help="a .npy or .safetensors file (rows, d_in), or a folder of them")
    add("--out", required=True, help="folder of the run: weights, configuration, checkpoint")
    add("--d-sae", required=True, type=number(int, 1), help="number of latents, say 8 d_in")
    add("--l1", required=True, type=number(float, 0), help="λ: larger means fewer latents (L0)")
    add("--variant", default="gated", choices=sorted(ARCHITECTURES), help="default: gated")
    add("--steps", type=number(int, 1), help="default: as many as read each row once")
    add("--batch", default=4096, type=number(int, 1), help="rows of a step; default: 4096")
    add("--lr", default=3e-4, type=number(float, 1e-12), help="default: 3e-4; toy data: 1e-2")
    add("--resample-every", type=number(int, 1), help="restart latents that died, every N steps")
    add("--seed", default=0, type=number(int, 0), help="of first weights and order; default: 0")
    add("--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help=DTYPE_HELP)
    add("--device", help="cpu, cuda, cuda:1, mps; default: the accelerator if there is one")
    add("--shards", default=1, type=number(int, 1), help=SHARDS_HELP)
    add("--log-every", default=100, type=number(int, 1), help="steps; default: 100")
    add("--checkpoint-every", default=1000, type=number(int, 1), help="steps; default: 1000")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    about = "measure a saved SAE on activations"
    add = commands.add_parser("eval", help=about, description=EVAL_HELP, **layout).add_argument
    add("sae", help="folder of the SAE; those of SAELens will do")
    add("activations", help="a .npy or .safetensors file (rows, d_in), or a folder of them")
    add("--batch", default=4096, type=number(int, 1), help="rows at a time; default: 4096")
    add("--device", help="as in train")
    add("--json", action="store_true", help="one line of JSON in place of the table")
    return top


HELP = """Train and measure Gated Sparse Autoencoders on your own activations.

  python gated_sae.py train activations.npy --d-sae 16384 --l1 1 --out runs/a
  python gated_sae.py eval runs/a activations.npy

A run writes SAELens's two files to its folder, and a checkpoint to go on from. Exit status: 0; 1 if
the work failed or was stopped; 2 if the command makes no sense."""
TRAIN_HELP = """Train an SAE on activations, read from disk as needed and shuffled by the seed.

The bar shows, on the latest batch: loss; L0, how many latents fire on a row; FVU, the fraction of
variance that is not explained; gamma, how long reconstructions are beside the best length (1 is
unbiased). Find λ by a few short runs: raise --l1 until L0 is as low as you like, and no further,
for FVU rises. λ goes with the scale of x, and the default --lr with rows scaled to E‖x‖² = d_in or
so. b_dec starts at the mean of the first batch.

Under torchrun (torchrun --nproc-per-node 8 gated_sae.py train ...) the processes share each batch,
or, with --shards, the latents, and end where one would, to rounding.

Ctrl-C, SIGTERM, or a crash: the same command with --resume goes on from the last checkpoint, and on
a CPU ends with the very bits of a run that was never stopped."""
EVAL_HELP = """Measure an SAE on all rows: means over the whole file, in one pass.

l0: latents that fire on a row. fvu: fraction of variance unexplained. gamma: length of
reconstructions beside the best one, 1 is unbiased, below 1 too short (shrinkage). cosine_squared: 1
would be perfect directions. norm_ratio: E‖x̂‖² / E‖x‖². l1_norm: E‖f‖₁. dead_fraction: latents that
never fired."""
SHARDS_HELP = "under torchrun: how many processes share the latents; default: 1, all hold all"
DTYPE_HELP = "of the weights, default: float32; bfloat16: float32 weights, products in bfloat16"


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    try:
        (run_train if args.command == "train" else run_eval)(args)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
