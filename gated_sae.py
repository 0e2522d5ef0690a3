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

Map.  2 the standard SAE and its shrinkage · 3 gating · 4 why its gradient vanishes · 5 the
auxiliary task · 6 weight tying · 7 alternatives · 8 metrics · 9 training · 10 on a real model ·
11 files · 12 the fast exact path. Each section runs without those that follow it.

Departures from the paper: W_enc starts along W_dec, a tenth as long, and biases fit the first batch
(`start`); λ warms up; lr and betas (`Trainer`), and how latents that never fire restart; the untied
variant has no r_mag, since W_mag has scales of its own.
"""

import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, InitVar, dataclass, field, fields
from functools import cached_property, partial
from numbers import Integral, Real
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# -- 2 · The standard SAE and its shrinkage --------------------------------------------------------
#     f = ReLU((x - b_dec) W_enc + b_enc)        x̂ = f W_dec + b_dec        E‖x - x̂‖² + λ E‖f‖₁
#
# The dictionary has more directions than x has dimensions, so many sums give the same x; L1 asks
# for a short one. But it charges in the wrong currency: by size, where we meant to charge for use.


def shrink(a: Tensor, l1: float) -> Tensor:
    """argmin over f ≥ 0 of (a - f)² + λ f  =  max(0, a - λ/2): what L1 does to one coefficient a.

    The derivative -2 (a - f) + λ is zero at f = a - λ/2. Small coefficients go to zero, which is
    what the penalty is for. Others come out λ/2 too small, which nobody asked for: shrinkage."""
    return F.relu(a - l1 / 2)


def as_row(v: Tensor) -> Tensor:
    """A vector per SAE as a row that broadcasts over its batch: (..., n) -> (..., 1, n)."""
    return v.unsqueeze(-2)


def squared_error(x: Tensor, x_hat: Tensor) -> Tensor:
    """E‖x - x̂‖²: (..., batch, d_in) twice -> (...)."""
    return (x - x_hat).square().sum(-1).mean(-1)


class Losses(NamedTuple):
    """The terms of a loss, each of shape `stack`. A term that a variant lacks is zero."""

    reconstruct: Tensor
    sparsity: Tensor
    aux: Tensor

    def total(self, l1: float | Tensor) -> Tensor:
        """reconstruct + λ sparsity + aux, of shape `stack`, for λ a number or of shape `stack`."""
        return self.reconstruct + l1 * self.sparsity + self.aux


# What a coefficient f ≥ 0 is charged, 0 at 0, given ‖d‖: by elements. Section 7; add your own.
PENALTIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l1": lambda f, norm: f,
    "log": lambda f, norm: f.log1p(),
    "norm_live": lambda f, norm: f * norm,
    "norm_frozen": lambda f, norm: f * norm.detach(),
}


def penalised_losses(x, f, charged, W_dec, b_dec, penalty="l1") -> Losses:
    """E‖x - x̂(f)‖² + λ E Σ_i penalty(charged_i, ‖d_i‖), for f, charged ≥ 0, (..., batch, d_sae).

    A standard SAE is charged for f itself, f_i each (§2.2 of the paper), and that shrinks f."""
    reconstruct = squared_error(x, f @ W_dec + as_row(b_dec))
    charge = PENALTIES[penalty](charged, as_row(W_dec.norm(dim=-1)))
    return Losses(reconstruct, charge.sum(-1).mean(-1), torch.zeros_like(reconstruct))


def expect(holds: bool, otherwise: str, error: type[Exception] = ValueError) -> None:
    """Raise an error that says what came and what was expected, unless a condition holds."""
    if not holds:
        raise error(otherwise)


def expect_type(name: str, value: object, types) -> None:
    """TypeError unless a value is of a type, or of one of a union."""
    fits = isinstance(value, types) and not isinstance(value, bool)
    expect(fits, f"{name} is {value!r}, expected {types}", TypeError)


def positive(name: str, value: float, kind: type = int) -> float:
    """The value as an int, or a float if that is the kind; it is one, finite and above 0."""
    ok = isinstance(value, Integral if kind is int else Real) and value is not True
    expect(ok and 0 < value < math.inf, f"{name} is {value!r}, expected a positive {kind.__name__}")
    return kind(value)


@dataclass(eq=False)
class SAE(nn.Module):
    """What all variants share. Each adds `encode`, x -> f ≥ 0, and `losses`, x -> Losses.

    x is (batch, d_in), shared by a whole stack, or (*stack, batch, d_in); for a single SAE it may
    have more dimensions. Wrong shapes raise ValueError, wrong dtypes TypeError."""

    d_in: int
    d_sae: int
    _: KW_ONLY
    penalty: str = "l1"  # what a coefficient is charged: one of PENALTIES
    stack: int | tuple[int, ...] = ()  # leading dimensions: (12,) is twelve independent SAEs
    # What draws the dictionary. None is seed 0: two SAEs start alike unless given two generators.
    generator: InitVar[torch.Generator | None] = None
    device: InitVar[torch.device | str | None] = None
    dtype: InitVar[torch.dtype | None] = None
    latent_vectors = {}  # parameters of (*stack, d_sae) that scale with f, and where they start
    opener = "b_enc"  # the one that decides which latents fire

    def __post_init__(self, generator, device, dtype):
        super().__init__()
        self.d_in, self.d_sae = positive("d_in", self.d_in), positive("d_sae", self.d_sae)
        expect_type("stack", self.stack, Integral | tuple | list)
        expect_type("generator", generator, torch.Generator | None)
        stack = (self.stack,) if isinstance(self.stack, Integral) else self.stack
        self.stack = tuple(positive("a dimension of stack", n) for n in stack)
        for option in fields(self):
            if option.type is float:
                setattr(self, option.name, positive(option.name, getattr(self, option.name), float))
        floats = getattr(dtype, "is_floating_point", dtype is None)
        known = [*PENALTIES]
        expect(self.penalty in known, f"penalty is {self.penalty!r}, expected one of {known}")
        expect(floats, f"dtype is {dtype!r}, expected a floating-point dtype", TypeError)
        W_dec = torch.empty(*self.stack, self.d_sae, self.d_in, device=device, dtype=dtype)
        if not W_dec.is_meta:  # there, shapes are all there is: see `load`
            generator = generator or torch.Generator().manual_seed(0)
            at = dict(generator=generator, device=generator.device, dtype=W_dec.dtype)
            W_dec.copy_(F.normalize(torch.randn(W_dec.shape, **at), dim=-1))
        self.W_dec = nn.Parameter(W_dec)
        # The encoder starts out looking along the directions it decodes to (discussion), a tenth as
        # long. At full length, with half of all gates open, x̂ is some d_sae / (2 d_in) times x.
        self.W_enc = nn.Parameter((0.1 * W_dec.mT).contiguous())
        self.b_dec = nn.Parameter(W_dec.new_zeros(*self.stack, self.d_in))
        for name, start in self.latent_vectors.items():
            setattr(self, name, nn.Parameter(W_dec.new_full(W_dec.shape[:-1], start)))

    @property
    def config(self) -> dict:
        """The constructor's arguments: `type(sae)(**sae.config)` is an untrained SAE like this."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.init}

    def project(self, x: Tensor) -> Tensor:
        """(x - b_dec) W_enc, the encoder's one product: (..., d_in) -> (..., d_sae)."""
        check_rows(self, x)
        return (x - as_row(self.b_dec)) @ self.W_enc

    def decode(self, f: Tensor) -> Tensor:
        """x̂(f) = f W_dec + b_dec: (..., batch, d_sae) -> (..., batch, d_in)."""
        return f @ self.W_dec + as_row(self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """x̂: (..., batch, d_in) -> the same, with `stack` in front where x was shared."""
        return self.decode(self.encode(x))


del SAE.generator, SAE.device, SAE.dtype  # class attributes, which InitVars leave behind


def check_rows(sae: SAE, x: Tensor, name: str = "x", only_batches: bool = False) -> None:
    """x is as `SAE` says; if `only_batches`, a single SAE takes (batch, d_in) alone."""
    is_like = isinstance(x, Tensor) and x.dtype == sae.W_dec.dtype
    fits = is_like and x.ndim > 1 and x.shape[-1] == sae.d_in and x.numel() > 0
    if not fits or not (x.shape[:-2] in ((), sae.stack) or not (sae.stack or only_batches)):
        came = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        members = f" or (*{sae.stack}, batch, {sae.d_in})" if sae.stack else ""
        wanted = f"{sae.W_dec.dtype} (batch ≥ 1, {sae.d_in}){members}"
        raise (ValueError if is_like else TypeError)(f"{name} is {came}, expected {wanted}")


def unwrapped(sae: nn.Module) -> SAE:
    """The SAE itself, out of torch.compile(sae), DataParallel and the like; or TypeError."""
    while not isinstance(sae, SAE):
        inner = getattr(sae, "_orig_mod", getattr(sae, "module", None))
        expect(isinstance(inner, nn.Module), f"sae is {sae!r:.99}, expected an SAE", TypeError)
        sae = inner
    return sae


class StandardSAE(SAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), §2.2 of the paper."""

    latent_vectors = {"b_enc": 0.0}

    def encode(self, x: Tensor) -> Tensor:
        return F.relu(self.project(x) + as_row(self.b_enc))

    def losses(self, x: Tensor) -> Losses:
        f = self.encode(x)
        return penalised_losses(x, f, f, self.W_dec, self.b_dec, self.penalty)


# -- 3 · Gating ------------------------------------------------------------------------------------
# L1 is needed for one bit per latent: does it fire? Section 2 showed what it does to the rest. So
# split the encoder: one path decides *which* latents fire, the other *how strongly*, and only the
# first will be penalised. Each has weights (d_in, d_sae) and biases of its own.
#
#     π_gate = (x - b_dec) W_enc + b_gate             π_mag = (x - b_dec) W_mag + b_mag


def gate(pi_gate: Tensor, pi_mag: Tensor) -> Tensor:
    """f̃ = 1[π_gate > 0] ⊙ ReLU(π_mag), all (..., batch, d_sae); eq. 6, §3.2.1 of the paper.

    The step is flat wherever it is not vertical, so no gradient of f̃ tells a gate to open."""
    return (pi_gate > 0) * F.relu(pi_mag)


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
# every gate is shut, x̂ = b_dec, unless section 9 restarts the dead: resample_every=None does not.


def incorrect_losses(x, f, pi_gate, W_dec, b_dec, penalty="l1") -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁: L_incorrect, §3.2.2 of the paper. It fails.

    What we mean to penalise is the gate itself, 1[π_gate > 0], but a step has no gradient here
    either. ReLU(π_gate) has one, and it reaches the gate. The reconstruction's still does not."""
    return penalised_losses(x, f, F.relu(pi_gate), W_dec, b_dec, penalty)


# -- 5 · The auxiliary task ------------------------------------------------------------------------
# The gate needs a reason to open. So let ReLU(π_gate) reconstruct x as well: that gradient says
# which latents would help. With its penalty this is section 2 over again, shrinkage and all, but
# nobody reads those coefficients as magnitudes: they train the gate, which uses their sign.
#
# Its decoder is a frozen copy, detached; or the auxiliary task would turn the d_i and move b_dec to
# suit the shrunken ReLU(π_gate), at the cost of f̃. b_dec is frozen only as the decoder's bias:
# in π_gate, as x - b_dec, it keeps its gradient.


def gated_losses(x, f, pi_gate, W_dec, b_dec, penalty="l1", frozen=True) -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁ + E‖x - x̂_frozen(ReLU(π_gate))‖², §3.2.2.

    `frozen=False` lets the auxiliary task train the decoder as well, the paper's ablation. That has
    the gradient of two usual losses, of f̃ and of ReLU(π_gate): a second SAE on the same weights."""
    W_aux, b_aux = (W_dec.detach(), b_dec.detach()) if frozen else (W_dec, b_dec)
    aux = squared_error(x, F.relu(pi_gate) @ W_aux + as_row(b_aux))
    return incorrect_losses(x, f, pi_gate, W_dec, b_dec, penalty)._replace(aux=aux)


# -- 6 · Weight tying ------------------------------------------------------------------------------
# A second encoder costs a product and its parameters. But a latent's gate and its magnitude seek
# the same thing: let them look along one direction, and differ in scale and offset (§3.2.1).
#
#     z = (x - b_dec) W_enc          π_gate = z + b_gate          π_mag = exp(r_mag) ⊙ z + b_mag


@dataclass(eq=False, kw_only=True)
class GatedSAE(SAE):
    """The Gated SAE, §3.2 of the paper: tied, with a frozen decoder in the auxiliary task."""

    tied: bool = True  # one encoder, and a scale exp(r_mag) per latent; or False: a W_mag as well
    aux: Literal["frozen", "unfrozen"] | None = "frozen"  # None is L_incorrect: the gates die
    latent_vectors, opener = {"b_gate": 0.0, "b_mag": 0.0}, "b_gate"
    gate = staticmethod(gate)  # section 7 has other gates

    def __post_init__(self, *start):
        super().__post_init__(*start)
        ways = isinstance(self.tied, bool) and self.aux in ("frozen", "unfrozen", None)
        given = f"tied={self.tied!r}, aux={self.aux!r}, penalty={self.penalty!r}"
        expect(ways, f"{given}, expected a bool and 'frozen', 'unfrozen' or None")
        if (self.aux, self.penalty) in (("frozen", "norm_live"), ("unfrozen", "norm_frozen")):
            warnings.warn(f"{given}: see norms in section 7", stacklevel=3)
        if self.tied:
            self.r_mag = nn.Parameter(torch.zeros_like(self.b_gate))
        else:
            self.W_mag = nn.Parameter(self.W_enc.detach().clone())

    def paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """π_gate, π_mag: (..., batch, d_in) -> (..., batch, d_sae) twice."""
        z = self.project(x)
        z_mag = as_row(self.r_mag.exp()) * z if self.tied else (x - as_row(self.b_dec)) @ self.W_mag
        return z + as_row(self.b_gate), z_mag + as_row(self.b_mag)

    def encode(self, x: Tensor) -> Tensor:
        return self.gate(*self.paths(x))

    def losses(self, x: Tensor) -> Losses:
        pi_gate, pi_mag = self.paths(x)
        args = x, self.gate(pi_gate, pi_mag), pi_gate, self.W_dec, self.b_dec, self.penalty
        if self.aux is None:
            return incorrect_losses(*args)
        return gated_losses(*args, frozen=self.aux == "frozen")

    @property
    def threshold(self) -> Tensor:
        """θ = b_mag - exp(r_mag) b_gate, (..., d_sae), with f̃ = jump_relu(π_mag, θ).

        Tied, π_gate > 0 says z > -b_gate, that is π_mag > θ: a JumpReLU. Untied, gate and magnitude
        look along two directions, and no threshold exists: ValueError."""
        expect(self.tied, "this GatedSAE has tied=False and so no threshold, expected tied=True")
        return self.b_mag - self.r_mag.exp() * self.b_gate


def jump_relu(pi: Tensor, theta: Tensor) -> Tensor:
    """π ⊙ 1[π > max(θ, 0)], for π (..., batch, d_sae) and θ (..., d_sae): jumps by max(θ, 0).

    For θ ≤ 0 nothing jumps; at θ = 0, b_mag = exp(r_mag) b_gate, f̃ = exp(r_mag) ReLU(π_gate)."""
    return pi * (pi > as_row(theta).clamp_min(0))


# -- 7 · Alternatives ------------------------------------------------------------------------------
# What the discussion proposed instead, or beside. First, penalties, by their names in PENALTIES:
#
#     log                     Σ_i log(1 + f_i), a smoothed L0: its slope 1 / (1 + f_i) spares large
#                             f_i. For slope a, PENALTIES["log a"] = lambda f, norm: (a * f).log1p()
#     norm_live, norm_frozen  Σ_i f_i ‖d_i‖, the same for f_i / c and c d_i: d_i may have any norm
#
# A Gated SAE needs its decoder frozen both in these norms and in the auxiliary task, or in neither.
# With live norms and a frozen auxiliary task, shrinking d_i lowers the penalty, exp(r_mag) makes up
# for it in f̃, and ReLU(π_gate) is left to grow: the norms go to zero, and every gate opens.


def normalized(losses: Losses, x: Tensor) -> Losses:
    """Squared errors over E‖x‖² of the batch, or 1 if that is 0 (authors, discussion: to carry λ).
    c x then has the errors of x, but c times its sparsity: the same λ weighs c times as much."""
    x_sq = x.square().sum(-1).mean(-1)
    x_sq = torch.where(x_sq > 0, x_sq, 1)
    return losses._replace(reconstruct=losses.reconstruct / x_sq, aux=losses.aux / x_sq)


class SigmoidGatedSAE(GatedSAE):
    """f̃ = σ(π_gate) ⊙ ReLU(π_mag): this gate has a gradient, which L_incorrect (aux=None) needs.

    It stays alive, but it is not sparse: half-open gates cost little, and exp(r_mag) mends them."""

    @staticmethod
    def gate(pi_gate: Tensor, pi_mag: Tensor) -> Tensor:
        return torch.sigmoid(pi_gate) * F.relu(pi_mag)

    threshold = property(lambda sae: expect(False, "a SigmoidGatedSAE has no threshold"))


@dataclass(eq=False, kw_only=True)
class NaturalGatedSAE(GatedSAE):
    """b_mag = exp(r_mag) b_gate, hence θ = 0: f̃ = exp(r_mag) ReLU(π_gate) turns on without a jump.

    Also known as y = x̂(t ⊙ f), with f = ReLU(π_gate) and a learned scale t (discussion)."""

    tied: bool = field(default=True, init=False)  # or there is no r_mag
    latent_vectors = {"b_gate": 0.0}
    b_mag = property(lambda sae: sae.r_mag.exp() * sae.b_gate)


def soft_cutoff(y: Tensor, t: Tensor, s: float) -> Tensor:
    """(y + √(y² + s²)) (1 + (y + t) / √((y + t)² + s²)) / 4, for s → 0: y 1[y > max(0, -t)].

    Smooth, so that t has a gradient; but then nothing is exactly zero (but for rounding)."""
    z, s = y + t, y.new_full((), s)
    return (y + torch.hypot(y, s)) * (1 + z / torch.hypot(z, s)) / 4


@dataclass(eq=False, kw_only=True)
class SoftCutoffSAE(StandardSAE):
    """f = soft_cutoff(π, t, s), for π = (x - b_dec) W_enc + b_enc; t is learned for each latent."""

    s: float = 0.1
    latent_vectors = {"b_enc": 0.0, "t": 0.0}
    threshold = property(lambda sae: -sae.t)  # for s → 0

    def encode(self, x: Tensor) -> Tensor:
        return soft_cutoff(self.project(x) + as_row(self.b_enc), as_row(self.t), self.s)


def heaviside(pi: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """1[π > θ], for θ a row, with a pseudo-gradient for θ alone: -1[|π - θ| < ε/2] / ε.

    The true one is zero but for a spike at θ; a window of width ε catches those π near it."""
    ramp = ((pi.detach() - theta) / bandwidth + 0.5).clamp(0, 1)
    return (pi > theta) + (ramp - ramp.detach())


@dataclass(eq=False, kw_only=True)
class JumpReLUSAE(SAE):
    """f = jump_relu(π, θ), where the field went next (arXiv 2407.14435): θ is trained on L0 itself.

    loss = E‖x - x̂(f)‖² + λ E‖f‖₀, with the gradients of `heaviside` for θ = threshold."""

    bandwidth: float = 0.1  # ε: small beside π, yet so large that some π of a batch are near θ
    penalty: str = field(default="l1", init=False, repr=False)  # of 1[π > θ]: the sum is ‖f‖₀
    latent_vectors = {"b_enc": 0.0, "threshold": 0.1}

    def encode(self, x: Tensor) -> Tensor:
        return jump_relu(self.project(x) + as_row(self.b_enc), self.threshold)

    def losses(self, x: Tensor) -> Losses:
        pi, theta = self.project(x) + as_row(self.b_enc), as_row(self.threshold)
        # In value max(θ, 0), in gradient θ's own: or a θ below 0 could never come back.
        is_on = heaviside(pi, theta + F.relu(-theta.detach()), self.bandwidth)
        # The second term is zero. Its gradient is that of a step of height θ: θ ∂1[π > θ]/∂θ.
        f = pi * is_on.detach() + F.relu(theta.detach()) * (is_on - is_on.detach())
        return penalised_losses(x, f, is_on, self.W_dec, self.b_dec)


def to_jumprelu(sae: SAE) -> JumpReLUSAE:
    """The JumpReLU SAE with the outputs of an SAE (of a soft cutoff, for s → 0), or ValueError."""
    sae = unwrapped(sae)
    if isinstance(sae, GatedSAE):
        theta, b_enc, W_enc = sae.threshold, sae.b_mag, sae.W_enc * as_row(sae.r_mag.exp())
    else:  # a ReLU jumps by 0
        theta, b_enc, W_enc = getattr(sae, "threshold", 0 * sae.b_enc), sae.b_enc, sae.W_enc
    return _converted(JumpReLUSAE, sae, dict(threshold=F.relu(theta), b_enc=b_enc, W_enc=W_enc))


def to_gated(sae: SAE, **options) -> GatedSAE:
    """The Gated SAE, with its options, that has the outputs of `to_jumprelu(sae)`."""
    sae = to_jumprelu(sae)
    values = dict(b_gate=sae.b_enc - sae.threshold, b_mag=sae.b_enc, W_mag=sae.W_enc)
    return _converted(GatedSAE, sae, values, **options)


def rescale_and_shift(sae: StandardSAE, refit_decoder: bool = False) -> GatedSAE:
    """A trained Standard SAE whose coefficients can be corrected: train the result with l1=0.
    No latent fires where it did not before. f̃ = 1[f > 0] ⊙ ReLU(exp(r_mag) ⊙ z + b_mag) learns a
    scale and a shift per latent, without penalty (discussion); with `refit_decoder`, W_dec too."""
    expect(type(sae) is StandardSAE, f"sae is {sae}, expected a StandardSAE", TypeError)
    new = to_gated(sae, aux=None)
    trains = ("r_mag", "b_mag", "W_dec") if refit_decoder else ("r_mag", "b_mag")
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(name in trains)
    return new


def rescaled(sae: SAE, c: float) -> SAE:
    """The same SAE for activations c times as long: its x̂(c x) is c times this one's x̂(x); so is f.
    So are biases, thresholds, widths: all that is a length. Train on rows with E‖x - E x‖² = d_in
    (`variance` finds it), where λ and lr mean the same on any data; then rescale the SAE."""
    sae, c = unwrapped(sae), positive("c", c, float)
    old = sae.state_dict()
    values = {name: c * old[name] for name in ("b_dec", *sae.latent_vectors)}
    if isinstance(sae, SigmoidGatedSAE):  # what σ takes must stay
        values |= dict(b_gate=old["b_gate"], W_enc=old["W_enc"] / c)
        values["r_mag"] = old.get("r_mag", 0) + math.log(c)
    widths = {f.name: c * getattr(sae, f.name) for f in fields(sae) if f.type is float}
    new = type(sae)(**sae.config | widths, device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    new.load_state_dict({name: values.get(name, v) for name, v in old.items()})
    return new


def _converted(kind: type[SAE], sae: SAE, values: dict[str, Tensor], **options) -> SAE:
    at = dict(stack=sae.stack, device=sae.W_dec.device, dtype=sae.W_dec.dtype)
    new, values = kind(sae.d_in, sae.d_sae, **at, **options), sae.state_dict() | values
    new.load_state_dict({name: values.get(name, v) for name, v in new.state_dict().items()})
    return new


# -- 8 · Metrics -----------------------------------------------------------------------------------
# Three numbers hold all there is to say about scale: how long x is, and x̂, and how well they agree.


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
    gamma_v1         eq. 10 of the first preprint, √(E‖x̂‖² / (E‖x‖² - E‖x - x̂‖²)), right only at
                     γ = 1; reconstructed from its value 1/√3 at x = 1, x̂ = 1/2 (discussion)

    Ratios of means, or rows near zero would decide. Without a value, as γ of a dead SAE: NaN, ∞."""

    x_sq: Tensor
    x_hat_sq: Tensor
    dot: Tensor
    gamma = property(lambda m: m.x_hat_sq / m.dot)
    factor_on_x_hat = property(lambda m: m.dot / m.x_hat_sq)
    factor_on_x = property(lambda m: m.dot / m.x_sq)
    cosine_squared = property(lambda m: m.factor_on_x_hat * m.factor_on_x)
    norm_ratio = property(lambda m: m.x_hat_sq / m.x_sq)
    gamma_v1 = property(lambda m: (m.x_hat_sq / (2 * m.dot - m.x_hat_sq)).sqrt())

    @classmethod
    def from_norms(cls, x_sq: Tensor, x_hat_sq: Tensor, error_sq: Tensor) -> "Moments":
        """From three numbers most runs log: E[x̂·x] = (E‖x̂‖² + E‖x‖² - E‖x - x̂‖²) / 2."""
        x_sq, x_hat_sq, error_sq = given = [*map(torch.as_tensor, (x_sq, x_hat_sq, error_sq))]
        expect(all((v >= 0).all() for v in given), f"got {given}, expected three numbers ≥ 0")
        return cls(x_sq, x_hat_sq, (x_hat_sq + x_sq - error_sq) / 2)


def moments(x: Tensor, x_hat: Tensor) -> Moments:
    """Of (..., batch, d_in) twice; a stack of x_hat may share one x."""
    fits, shapes = x.shape == x_hat.shape[-x.ndim :] and x.numel() > 0, (x.shape, x_hat.shape)
    expect(fits, f"x, x_hat are {shapes}, expected one (..., batch, d_in), or more in x_hat")
    # Squares of half-precision numbers overflow at 256.
    x, x_hat = (v.to(torch.promote_types(v.dtype, torch.float32)) for v in (x, x_hat))
    dot = (x * x_hat).sum(-1).mean(-1)
    x_sq, x_hat_sq = (v.square().sum(-1).mean(-1) for v in (x, x_hat))
    return Moments(x_sq.expand_as(dot), x_hat_sq, dot)


@dataclass(frozen=True, eq=False)
class Metrics(Moments):
    """What `evaluate` finds: `Moments`, and these, of shape `stack` unless said otherwise."""

    n_rows: int
    error: Tensor  # E‖x - x̂‖²
    variance: Tensor  # E‖x - E x‖²
    l1_norm: Tensor  # E‖f‖₁
    firing_frequency: Tensor  # (*stack, d_sae): share of rows on which each latent fired
    fvu = property(lambda m: m.error / m.variance)  # fraction of variance unexplained
    l0 = property(lambda m: m.firing_frequency.sum(-1))  # mean number that fire on a row
    dead_fraction = property(lambda m: (m.firing_frequency == 0).to(m.error).mean(-1))

    @staticmethod
    def code(sae: SAE, x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """x̂ of a batch, and, of each latent, the sum of f and on how many rows it fires."""
        f = sae.encode(x)  # section 12 has another way
        return sae.decode(f), f.sum(-2, dtype=wide), (f > 0).sum(-2)


def as_batch(sae: SAE, x: Tensor, name: str) -> Tensor:
    """Rows, checked, on the SAE's device and in its dtype; errors call them by `name`."""
    if isinstance(x, Tensor) and x.is_floating_point():
        # Detached: the model that made x is not being trained.
        x = x.detach().to(sae.W_dec.device).to(sae.W_dec.dtype)  # in this order: fewer bytes
    check_rows(sae, x, name, only_batches=True)
    if not x.isfinite().all():
        bad = (~x.isfinite()).any(-1).flatten().nonzero().flatten()
        rows = f"{len(bad)} of {x[..., 0].numel()} rows, first in row {int(bad[0])}"
        raise ValueError(f"{name} has NaN or infinity in {rows}")
    return x


def in_parts(sae: SAE, x: Tensor) -> tuple[Tensor, ...]:
    """A batch, cut so that f of each part takes some 64 MB at most."""
    return x.split(max(1, 2**24 // sae.W_dec.shape[:-1].numel()), -2)


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor]) -> Metrics:
    """Metrics over any number of batches, of any sizes, in constant memory: ratios of means over
    all rows, in float64 (MPS: float32). NaN or infinity in x raises ValueError that names it."""
    n_rows, origin, sums, sae = 0, None, {}, unwrapped(sae)
    wide = torch.float32 if sae.W_dec.device.type == "mps" else torch.float64
    for number, batch in enumerate(batches):
        for x in in_parts(sae, as_batch(sae, batch, f"batch {number}")):
            x_hat, f_sum, fired = (v.to(wide) for v in Metrics.code(sae, x, wide))
            x, n = x.to(wide), x.shape[-2]
            # Centred near the data: far from the origin, E‖x‖² - ‖E x‖² would cancel to nothing.
            origin = x[..., :1, :].clone() if origin is None else origin
            means = vars(moments(x, x_hat)) | dict(firing_frequency=fired / n)
            means |= dict(l1_norm=f_sum.sum(-1) / n, error=squared_error(x, x_hat))
            means |= dict(offset=(x - origin).mean(-2), variance=squared_error(x, origin))
            sums = {name: sums.get(name, 0) + n * mean for name, mean in means.items()}
            n_rows += n
    expect(n_rows > 0, "batches is empty, expected at least one batch")
    mean = {name: total / n_rows for name, total in sums.items()}
    variance = mean.pop("variance") - mean.pop("offset").square().sum(-1)
    return Metrics(n_rows=n_rows, variance=variance.expand_as(mean["error"]), **mean)


def variance(batches: Iterable[Tensor], d_in: int) -> Tensor:
    """E‖x - E x‖² of rows (batch, d_in), in one pass: `rescaled` says what for."""
    return evaluate(StandardSAE(d_in, 1, dtype=torch.float64), batches).variance


# -- 9 · Training ----------------------------------------------------------------------------------
# One loop for every variant, and for whole stacks: no parameter is shared by two members, so the
# gradient of the sum of their losses is each one's own, and Adam works element by element.
# Rows of W_dec have norm 1, or the penalty could be dodged: with d_i twice as long, half of f_i
# gives the same x̂ at half the price. Each step removes the gradient's radial part, which would only
# swell Adam's second moment; then steps; then renormalises: tangential steps leave the sphere too.


@torch.no_grad()
def step_on_unit_norm(optimizer: torch.optim.Optimizer, W_dec: Tensor) -> None:
    """grad d_i ← grad d_i - (grad d_i · d_i) d_i; a step; d_i ← d_i / ‖d_i‖, 0 for 0."""
    if W_dec.grad is not None:  # or the caller's losses do without it
        W_dec.grad.addcmul_((W_dec.grad * W_dec).sum(-1, keepdim=True), W_dec, value=-1)
    optimizer.step()
    W_dec /= W_dec.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(W_dec.dtype).tiny)


@torch.no_grad()
def fold_decoder_norms(sae: SAE) -> None:
    """d_i ← d_i / n_i and f_i ← n_i f_i, for n_i = ‖d_i‖ unless near 1: x̂ stays."""
    n = F.threshold(sae.W_dec.norm(dim=-1), 0, 1)  # 1 for 0
    if ((n - 1).abs() <= 1e-3).all():
        return
    scales = not isinstance(sae, SigmoidGatedSAE | SoftCutoffSAE)
    expect(scales, f"norms of W_dec reach {n.max():.3g}, expected 1, for f of {sae} is not linear")
    scale = dict.fromkeys(sae.latent_vectors, n) | dict(W_enc=as_row(n), W_mag=as_row(n))
    sae.W_dec /= n.unsqueeze(-1)
    for name, parameter in sae.named_parameters():
        parameter *= scale.get(name, 1)


@torch.no_grad()
def resample(sae: SAE, dead: Tensor, x: Tensor, generator: torch.Generator, optimizer=None) -> None:
    """Restart latents at inputs x (batch, d_in) that are reconstructed badly, as Anthropic does.
    Each of `dead` (*stack, d_sae), bool, draws a row with probability ∝ its squared error squared;
    d_i becomes its direction from b_dec, the encoder the same at 0.2 of the others' mean norm. All
    else of it restarts (transformer-circuits.pub/2023/monosemantic-features), in Adam too, but the
    second moment, the others' mean: from 0, steps are too big. It fires above half its row's z."""

    def mean_of_living(v: Tensor, is_dead: Tensor) -> Tensor:
        dims, living = tuple(range(len(sae.stack) - v.ndim, 0)), (~is_dead).expand_as(v)
        return (v * living).sum(dims, keepdim=True) / living.sum(dims, keepdim=True).clamp_min(1)

    n, batch = max(1, int(dead.sum(-1).max())), x.shape[-2]
    x_hat = torch.cat([sae(part) for part in in_parts(sae, x)], -2)
    error = (x - x_hat).square().sum(-1)  # (*stack, batch)
    tiny = torch.finfo(error.dtype).tiny
    weight = F.normalize(error, p=math.inf, dim=-1, eps=tiny).square() + tiny
    # Rows are drawn twice only if they are too few: two equal latents would stay equal for ever.
    weight = weight.view(-1, batch).to(generator.device)
    drawn = torch.multinomial(weight, n, n > batch, generator=generator).to(x.device)
    nth = (dead.cumsum(-1) - 1).clamp_min(0)  # the nth dead latent gets the nth row drawn
    drawn = drawn.view(*sae.stack, n).gather(-1, nth).unsqueeze(-1)
    row = (x - as_row(sae.b_dec)).take_along_dim(drawn, -2)  # as W_dec
    size = 0.2 * mean_of_living(sae.W_enc.norm(dim=-2), dead).unsqueeze(-1)
    d, size = F.normalize(row, dim=-1), torch.where(size > 0, size, 0.2)
    fresh = sae.latent_vectors | dict(W_dec=d, W_enc=(size * d).mT, W_mag=(size * d).mT)
    fresh[sae.opener] = fresh.get("threshold", 0) - size[..., 0] * row.norm(dim=-1) / 2
    masks = dict(W_dec=dead.unsqueeze(-1), W_enc=as_row(dead), W_mag=as_row(dead))
    for name, parameter in sae.named_parameters():
        if name == "b_dec" or not parameter.requires_grad:
            continue
        is_dead = masks.get(name, dead)
        parameter.copy_(torch.where(is_dead, fresh.get(name, 0.0), parameter))
        for key, moment in (optimizer.state[parameter] if optimizer else {}).items():
            if key != "step":
                new = mean_of_living(moment, is_dead) if key == "exp_avg_sq" else 0.0
                moment.copy_(torch.where(is_dead, new, moment))


@torch.no_grad()
def start(sae: SAE, x: Tensor) -> list[Tensor]:
    """Fit an untrained SAE's biases to rows x (batch, d_in); returns those that it changed.
    b_dec ← E x, for x may lie far from the origin; b_gate, or b_enc, ← θ - 2 √E z²: a step or ReLU
    opens on some 2 % of rows. If frozen, or not all 0, it is the caller's; if the gates', both."""
    opener, x = getattr(sae, sae.opener, sae.b_dec), as_batch(sae, x, "x")
    fresh = [b for b in (sae.b_dec, opener) if b.requires_grad and not (b.any() or opener.any())]
    for bias in fresh:
        if bias is sae.b_dec:
            bias.copy_(x.mean(-2))
        else:
            z_sq = sum(sae.project(part).square().sum(-2) for part in in_parts(sae, x))
            bias.copy_(sae.latent_vectors.get("threshold", 0) - 2 * (z_sq / x.shape[-2]).sqrt())
    return fresh


def no_float16(t: Tensor) -> Tensor:
    """A tensor that a backward pass needs, if not in float16, where small gradients become 0."""
    expect(t.dtype != torch.float16, "losses are in float16, expected bfloat16 or float32")
    return t


class Record(NamedTuple):
    """What training reports of a step."""

    step: int  # counted from 1
    lr: float  # learning rate of this step
    l1: Tensor  # λ of this step
    losses: Losses  # before this step, on its batch
    metrics: Metrics | None = None  # after it, and any resampling, on the same batch


@dataclass(eq=False, kw_only=True)
class Trainer:
    """Adam on an SAE, in place, and all else that the next step depends on. A decoder from
    elsewhere, not of unit norm, is folded first: x̂ stays. `start` opens step 1."""

    sae: SAE = field(kw_only=False)
    l1: float | Tensor  # λ, one number, or one for each member of a stack (shape `stack`)
    steps: int  # how many there will be
    lr: float | None = None  # None: 0.05 / √d_in, to turn a direction by some 0.05 radians a step
    betas: tuple[float, float] = (0.9, 0.999)  # the paper's (0, 0.999) leaves more latents dead
    lr_warmup: float = 0.1  # shares of the steps: in which lr rises linearly,
    l1_warmup: float = 0.1  # in which λ does,
    lr_decay: float = 0.2  # and in which lr falls at the end
    resample_every: int | None = 100  # steps, and `resample` what is silent in them; not if frozen
    # What is lowered. None: the SAE's own, by section 12 where that is faster. Or, say,
    # torch.compile(sae.losses), or torch.autocast("cuda", torch.bfloat16)(sae.losses).
    losses: Callable[[Tensor], Losses] | None = None
    device: torch.device | str | None = None  # None: where it is, but from CPU to an accelerator
    default_losses = staticmethod(lambda sae, x: sae.losses(x))  # section 12 has another
    # Not under a penalty on norms, which keeps them in bounds by itself.
    unit_norm = property(lambda t: t.sae.W_dec.requires_grad and t.sae.penalty[:5] != "norm_")

    def __post_init__(self):
        sae, every, device = unwrapped(self.sae), self.resample_every, self.device
        self.sae = sae
        lr = 0.05 / sae.d_in**0.5 if self.lr is None else self.lr
        self.steps, self.lr = positive("steps", self.steps), positive("lr", lr, float)
        for name in ("lr_warmup", "l1_warmup", "lr_decay"):
            expect_type(name, share := getattr(self, name), Real)
            expect(0 <= share <= 1, f"{name} is {share}, expected a share in [0, 1]")
        expect_type("betas", self.betas, tuple | list)
        valid = [isinstance(b, Real) and 0 <= b < 1 for b in self.betas] == [True, True]
        expect(valid, f"betas are {self.betas}, expected two numbers in [0, 1)")
        expect_type("losses", self.losses, Callable | None)
        expect_type("l1", self.l1, Real | Tensor | list | tuple)
        if every is not None and positive("resample_every", every) != Trainer.resample_every:
            expect(sae.W_dec.requires_grad, f"resample_every is {every}, but W_dec is frozen")
        elif not (sae.W_dec.requires_grad and sae.W_enc.requires_grad):
            self.resample_every = None
        learns = any(p.requires_grad for p in sae.parameters())
        expect(learns and not torch.is_inference_mode_enabled(), "nothing here gets a gradient")
        dtype, dtypes = sae.W_dec.dtype, {p.dtype for p in sae.parameters()}
        wide = dtypes in ({torch.float32}, {torch.float64})  # in half precision, steps round to 0
        expect(wide, f"the SAE is {dtypes}, expected float32: train, then convert", TypeError)
        l1 = torch.as_tensor(self.l1, dtype=torch.float64, device="cpu").detach().clone()
        fits = l1.shape in ((), sae.stack) and bool(((l1 >= 0) & l1.isfinite()).all())
        expect(fits, f"l1 is {l1.tolist()}, expected finite and ≥ 0, of shape () or {sae.stack}")
        if device is None and sae.W_dec.device.type == "cpu":
            device = torch.accelerator.current_accelerator(check_available=True)
        self.device = torch.device(device or sae.W_dec.device)
        expect(self.device.type != "meta", "device is meta, expected one that holds numbers")
        at = dict(lr=self.lr, betas=tuple(map(float, self.betas)), fused=True)
        self.optimizer = torch.optim.Adam(sae.to(self.device).parameters(), **at)
        if self.unit_norm:
            fold_decoder_norms(sae)
        self.losses = self.losses or partial(self.default_losses, sae)
        self.l1, self.done = l1.to(sae.W_dec.device, dtype), 0
        self.silent = torch.ones_like(sae.W_dec[..., 0], dtype=torch.bool)  # since last resampled
        self.generator = torch.Generator().manual_seed(0)

    @torch.enable_grad()  # also where the caller has switched them off
    def step(self, x: Tensor) -> Record:
        """One step on a batch: its Record, less metrics. ValueError if the loss is no number."""
        step, steps = self.done + 1, self.steps
        expect(step <= steps, f"all {steps} steps are done")
        rise, fall = step / max(1, self.lr_warmup * steps), max(1, self.lr_decay * steps)
        lr = self.lr * min(1, rise, (steps + 1 - step) / fall)
        l1 = self.l1 * min(1, step / max(1, self.l1_warmup * steps))
        x = as_batch(self.sae, x, f"batch {self.done}")
        started = start(self.sae, x) if step == 1 else []
        try:
            look = torch.autograd.graph.saved_tensors_hooks(no_float16, no_float16)
            with look if step == 1 else nullcontext():  # each step, they fragment memory
                total = (losses := self.losses(x)).total(l1)
            finite = bool(total.isfinite().all())
            expect(finite, f"step {step}: the loss is {total.tolist()}, expected finite")
            self.optimizer.zero_grad(), total.sum().backward()
            reached = any(p.grad is not None for p in self.sae.parameters())
            expect(reached, "losses are of another SAE, expected this one's")
        except BaseException:
            [bias.data.zero_() for bias in started]  # as they were
            raise
        if self.resample_every:  # of f alone these hear, and not if f_i = 0 on all rows
            heard = [p for n, p in self.sae.named_parameters() if n in ("r_mag", "b_mag", "b_enc")]
            self.silent &= bool(heard) and heard[0].grad == 0
        self.optimizer.param_groups[0]["lr"] = lr
        if self.unit_norm:
            step_on_unit_norm(self.optimizer, self.sae.W_dec)
        else:
            self.optimizer.step()
        if self.resample_every and step % self.resample_every == 0 and step < self.steps:
            resample(self.sae, self.silent, x, self.generator, self.optimizer)
            self.silent.fill_(True)
        self.done = step
        return Record(step, lr, l1, Losses(*(term.detach() for term in losses)))


def train(sae: SAE, batches: Iterable[Tensor], *, log_every=100, **options) -> Iterator[Record]:
    """Train in place, as it is iterated: a Record at step 1, every `log_every` steps, and the last.
    `options` are those of `Trainer`, checked at once: l1 and steps at least. Takes `steps` batches
    (batch, d_in). What is no number, or too few batches, raise ValueError that names it."""
    positive("log_every", log_every)
    trainer = Trainer(sae, **options)

    def records() -> Iterator[Record]:
        for x in itertools.islice(batches, trainer.steps):
            record = trainer.step(x)
            if record.step in (1, trainer.steps) or record.step % log_every == 0:
                yield record._replace(metrics=evaluate(sae, [x]))
        done = f"{trainer.done} of {trainer.steps} steps; the SAE keeps these"
        expect(trainer.done == trainer.steps, f"batches ended after {done}")

    return records()


# -- 10 · On a real model --------------------------------------------------------------------------
# Activations come from a hook on any module; x̂ goes back in by another.

NEVER_CALLED = "the model never called {}, or torch.compile hides it: then use model._orig_mod"


def harvest(
    model: nn.Module, module: nn.Module, inputs: Iterable, *, skip=0, max_norm=None, left_out=None
) -> Iterator[Tensor]:
    """What `module` puts out as the model reads each of `inputs`, in eval mode: (tokens, d).
    An input is a tensor, a tuple of arguments, or a dict of keyword arguments, as tokenizers give;
    where its "attention_mask" (batch, tokens) is 0 there is padding, which is left out.
    A few rows a hundred times as long as others, as at BOS, are all that an SAE would learn. So
    leave out the first `skip` tokens of each text, or rows longer than `max_norm` times the median
    of their input; `left_out`, a Counter, gets how many were "first" and "long"."""
    expect(isinstance(skip, Integral) and skip >= 0, f"skip is {skip!r}, expected an int ≥ 0")
    most = math.inf if max_norm is None else positive("max_norm", max_norm, float)
    Enough = type("Enough", (Exception,), {})  # when x is there, the model need not go on

    def take(_, args, output):
        raise Enough(hidden(module, output))

    for number, given in enumerate(inputs):
        args = given if isinstance(given, tuple) else (given,)
        kwargs, args = (given, ()) if isinstance(given, Mapping) else ({}, args)
        modes = [(part, part.training) for part in model.modules()]
        handle = module.register_forward_hook(take)
        try:
            with torch.no_grad():
                model.eval()(*args, **kwargs)
            expect(False, f"input {number}: {NEVER_CALLED.format(type(module).__name__)}")
        except Enough as enough:
            (x,) = enough.args
        finally:
            handle.remove()
            for part, mode in modes:
                part.training = mode
        mask = kwargs.get("attention_mask")
        mask = x.new_ones(x.shape[:-1]) if mask is None else mask.to(x.device)
        if x.ndim == 2 and len(x) == mask.numel():  # all tokens in a row, as experts take them
            x = x.view(*mask.shape, -1)
        fits = x.shape[: mask.ndim] == mask.shape and (mask.ndim > 1 or x.ndim == 2)
        shapes = f"attention_mask is {tuple(mask.shape)}, x {tuple(x.shape)}"
        expect(fits, f"input {number}: {shapes}, expected (batch, tokens), (batch, tokens, ..., d)")
        late = (mask.bool().cumsum(-1) > skip) & mask.bool()
        x = x[late].flatten(0, -2).detach()
        long = (norm := x.float().norm(dim=-1)) > most * norm.median()
        if left_out is not None:
            left_out.update(first=int((mask.bool() ^ late).sum()), long=int(long.sum()))
        if not long.all():  # of a text shorter than `skip` nothing is left
            yield x[~long]


def hidden(module: nn.Module, output) -> Tensor:
    """A module's output, or the first of a tuple, if that is a tensor (..., d) of floats."""
    x = output[0] if isinstance(output, tuple | list) and len(output) else output
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{type(module).__name__} put out {got}, expected floats (..., tokens, d)")
    return x


def shuffle(batches: Iterable[Tensor], batch: int, held: int, seed: int = 0) -> Iterator[Tensor]:
    """The rows of all `batches`, each once, `batch` at a time, in random order as far as `held` go:
    rows of one text are much alike. Whenever `held` are there, half of them are given out."""
    positive("batch", batch), positive("held", held)
    generator, pool, n = torch.Generator().manual_seed(seed), [], 0
    for x in itertools.chain(batches, [None]):
        if x is not None:
            expect(x.ndim == 2, f"got {tuple(x.shape)}, expected (tokens, d)")
            pool.append(x)
            n += len(x)
        if n == 0 or (x is not None and n < max(held, 2 * batch)):
            continue
        order, x_held = torch.randperm(n, generator=generator), torch.cat(pool)
        pool.clear()
        x_held = x_held[order.to(x_held.device)]
        out = n if x is None else max(batch, (n - held // 2) // batch * batch)
        yield from map(torch.clone, x_held[:out].split(batch))  # views would keep all of x_held
        pool, n = [x_held[out:].clone()], n - out


@contextmanager
def splice(module: nn.Module, put: SAE | str | Tensor) -> Iterator[None]:
    """Within, `put` stands in for the module's output x: an SAE's x̂, "zero", or (d,), say E x."""
    put = unwrapped(put) if isinstance(put, nn.Module) else put
    known = put == "zero" if isinstance(put, str) else isinstance(put, SAE | Tensor)
    known, calls = known and not getattr(put, "stack", ()), []
    expect(known, f"put is {put!r}, expected a single SAE, 'zero' or a tensor")

    def replace(_, args, output):
        x = hidden(module, output)
        calls.append(x.shape)
        if isinstance(put, Tensor):
            fits = put.shape in (x.shape, x.shape[-1:])
            expect(fits, f"put is {tuple(put.shape)}, expected a row of x, {tuple(x.shape)}")
        new = put(x.to(put.W_dec)) if isinstance(put, SAE) else put
        new = torch.zeros_like(x) if isinstance(put, str) else new.to(x).expand_as(x)
        make = getattr(type(output), "_make", type(output))  # a namedtuple has its own
        return make([new, *output[1:]]) if isinstance(output, tuple | list) else new

    handle = module.register_forward_hook(replace)
    try:
        yield
        expect(calls, NEVER_CALLED.format(type(module).__name__))
    finally:
        handle.remove()


def loss_recovered(ce_sae: Tensor, ce_clean: Tensor, ce_ablated: Tensor) -> Tensor:
    """(CE_ablated - CE_sae) / (CE_ablated - CE_clean), of floats or tensors: 1 is as good as x.
    "Ablated" has 0, or E x, for x: mostly, zeros break the model more, which inflates the score; it
    never changes which of two SAEs is better. ValueError unless ablating hurts: that would."""
    gap = ce_ablated - ce_clean
    hurts = bool(torch.as_tensor((gap > 0) & (gap < math.inf)).all())
    expect(hurts, f"ce_ablated - ce_clean is {gap}, expected positive and finite")
    return (ce_ablated - ce_sae) / gap


# -- 11 · Files ------------------------------------------------------------------------------------
# The layout is SAELens's; dictionary-learning's and Gemma Scope's are read as well.

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
FILES = {WEIGHTS_FILE: CONFIG_FILE, "ae.pt": "config.json", "params.safetensors": "config.json"}
FILES |= {"params.npz": None, "sae.safetensors": CONFIG_FILE}  # the last is sparsify's: refused
KINDS: dict[str, Callable[..., SAE]] = dict(standard=StandardSAE, gated=GatedSAE)
KINDS |= dict(gated_untied=partial(GatedSAE, tied=False), gated_sigmoid=SigmoidGatedSAE)
KINDS |= dict(gated_natural=NaturalGatedSAE, soft_cutoff=SoftCutoffSAE, jumprelu=JumpReLUSAE)
# Names of others: of kinds; of parameters, those with .weight the transposed of ours.
RAW = dict.fromkeys(("JumpReluAutoEncoder", "jump_relu"), "jumprelu")  # encode x, not x - b_dec
ALIASES = RAW | dict(AutoEncoder="standard", GatedAutoEncoder="gated")
NAMES = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
GATED = NAMES | dict(decoder_bias="b_dec", gate_bias="b_gate", mag_bias="b_mag", r_mag="r_mag")
STANDARD = NAMES | {"bias": "b_dec", "encoder.bias": "b_enc"}
RENAMED = GATED | STANDARD | dict(w_enc="W_enc", w_dec="W_dec")
# What SAELens may do, or an older version of this file, and this one does not: refused.
FIXED = dict.fromkeys(("activation_fn", "activation_fn_str"), "relu") | dict(a=1, normalize=False)
FIXED |= dict(normalize_activations="none", reshape_activations="none")


def architecture(sae: SAE) -> str:
    """The name in `KINDS` of what makes such an SAE."""
    name = next((name for name, kind in KINDS.items() if kind is type(sae)), None)
    expect(name is not None, f"got a {type(sae).__name__}, expected one of {list(KINDS)}")
    return "gated_untied" if name == "gated" and not sae.tied else name


def save(sae: SAE, folder: str | os.PathLike) -> None:
    """Write an SAE to a new folder. SAELens loads a single Standard, tied Gated or JumpReLU SAE.
    It is there in one move: a kill leaves all of it, or a NAME.new which the next clears."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sae, folder, new = unwrapped(sae), Path(folder), Path(f"{Path(folder)}.new")
    expect(not folder.exists(), f"{folder} exists, expected a new folder to save into")
    expect(not sae.W_dec.is_meta, "the SAE is on the meta device, expected one that has numbers")
    config = dict(architecture=architecture(sae), dtype=str(sae.W_dec.dtype).removeprefix("torch."))
    config |= sae.config | {key: FIXED[key] for key in FIXED if key.endswith("_activations")}
    config |= dict(apply_b_dec_to_input=True, device="cpu", metadata={})
    tensors = {name: t.detach().contiguous() for name, t in sae.state_dict().items()}
    _fill(type(sae)(**sae.config, dtype=sae.W_dec.dtype, device="meta"), tensors)
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        (new / CONFIG_FILE).write_text(json.dumps(config, indent=2))
        save_file(tensors, new / WEIGHTS_FILE)
        new.rename(folder)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{folder}: {error}") from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def load(folder: str | os.PathLike, device: torch.device | str = "cpu") -> SAE:
    """The SAE in a folder that `save`, SAELens, dictionary-learning or Gemma Scope wrote. What is
    missing, broken, unknown here, or does not fit is a ValueError. Only tensors are unpickled."""
    try:
        holds = sorted(os.listdir(folder))
        file = next((file for file in FILES if file in holds), None)
        expect(file, f"it holds {holds}, expected {WEIGHTS_FILE} or one of {[*FILES][1:]}")
        said = FILES[file] if FILES[file] in holds or not file.startswith("params") else None
        config = json.loads((Path(folder) / said).read_bytes()) if said else {}
        return _read(config, _tensors(Path(folder) / file)).to(device)
    except Exception as error:  # a broken file may raise anything
        wanted = f"{CONFIG_FILE} of one of {[*KINDS]}, and {WEIGHTS_FILE}"
        raise ValueError(f"{folder}: {type(error).__name__}: {error}, expected {wanted}") from None


def _tensors(file: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if file.suffix == ".pt":
        return torch.load(file, "cpu", weights_only=True)
    if file.suffix == ".npz":
        import numpy as np

        return {name: torch.from_numpy(array) for name, array in np.load(file).items()}
    return load_file(file)


@torch.no_grad()
def _read(config: Mapping, tensors: Mapping[str, Tensor]) -> SAE:
    """The SAE that files describe and hold, in copies; what is not said is seen from names."""
    held = "gated" if "r_mag" in tensors else "jump_relu" if "threshold" in tensors else "standard"
    held = "topk" if "k" in config else "transcoder" if "hf_hook_point_out" in config else held
    said = config.get("trainer", {}).get("dict_class") or config.get("architecture") or held
    kind = KINDS.get(ALIASES.get(said, said)) if held != "transcoder" else None
    expect(kind, f"this is a {said} SAE or transcoder, expected one of {[*KINDS]}")
    odd = {key: config[key] for key, v in FIXED.items() if config.get(key) not in (None, False, v)}
    expect(not odd, f"got {odd}, expected {FIXED}")
    ours = {RENAMED.get(k, k): t.movedim(0, -1) if "weight" in k else t for k, t in tensors.items()}
    ours = {k: t for k, t in ours.items() if not k.endswith("scaling_factor") or (t != 1).any()}
    W_enc = torch.atleast_2d(ours.get("W_enc", torch.ones(1)))
    options = dict(zip(("d_in", "d_sae"), W_enc.shape[-2:], strict=True)) | config
    options = {key: options[key] for key in kind(1, 1).config if key in options}
    dtype = str(config.get("dtype", W_enc.dtype)).removeprefix("torch.")
    sae = kind(**options, dtype=getattr(torch, dtype), device="meta")
    _fill(sae, {name: t.to(sae.W_dec.dtype, copy=True) for name, t in ours.items()})
    if not config.get("apply_b_dec_to_input", said not in RAW):
        shift = sae.b_dec @ sae.W_enc  # x W_enc = (x - b_dec) W_enc + b_dec W_enc
        getattr(sae, sae.opener).add_(shift)
        if isinstance(sae, GatedSAE):
            sae.b_mag.add_(sae.r_mag.exp() * shift)
    return sae


def _fill(sae: SAE, tensors: Mapping[str, Tensor]) -> None:
    """Give an SAE on the meta device its numbers."""
    expected = {name: (*p.shape, p.dtype) for name, p in sae.state_dict().items()}
    found = {name: (*t.shape, t.dtype) for name, t in tensors.items()}
    expect(found == expected, f"the weights are {found}, expected {expected}")
    sae.load_state_dict({name: t.contiguous() for name, t in tensors.items()}, assign=True)


def from_dictionary_learning(state: Mapping[str, Tensor]) -> SAE:
    """The SAE in a state dict of dictionary-learning's Gated-, JumpRelu- or plain AutoEncoder."""
    return _read({}, state)


def to_dictionary_learning(sae: SAE) -> dict[str, Tensor]:
    """The state dict of dictionary-learning's GatedAutoEncoder or AutoEncoder with its outputs."""
    sae = unwrapped(sae)
    names = dict(standard=STANDARD, gated=GATED).get(architecture(sae))
    expect(names and not sae.stack, f"got {sae}, expected a single Standard or tied Gated SAE")
    turned = {name: t.mT if t.ndim == 2 else t for name, t in sae.state_dict().items()}
    return {old: turned[new].detach().contiguous().clone() for old, new in names.items()}


# -- 12 · The fast exact path (nothing above needs it) ---------------------------------------------
# Once trained, a row opens a few gates in a thousand, and outside that support, {π_gate > 0}, every
# term of the loss and every gradient is exactly zero. For s with a number at each entry (row,
# latent) of the support, and S the sparse matrix of them, all that is left are three products,
#
#     S C   (batch, d_in)        Sᵀ A   (d_sae, d_in)        A Cᵀ at the support   (nnz,)
#
# and only to find the support takes a dense one. Loss and gradient, by hand, serve for these and,
# while many gates are open, for dense ones. To rounding. A stack is one block-diagonal S.

BLOCK = 2**21  # entries of the dense product that exist at once
bag = partial(F.embedding_bag, mode="sum", include_last_offset=True)
zero_where_shut = torch.ops.aten.threshold_backward  # the gradient of ReLU: (s, f, 0), 0 at f ≤ 0


class Dense:
    """All entries of a (*stack, batch, d_sae) tensor s, and what `Support` has for some of them."""

    to_rows = staticmethod(lambda s, C: s @ C)
    to_latents = staticmethod(lambda s, A: s.mT @ A)
    products = staticmethod(lambda A, C: A @ C.mT)
    per_latent = staticmethod(lambda s: s.sum(-2))
    per_entry = staticmethod(as_row)


class Support:
    """Some entries (row, latent) of a (*stack, batch, d_sae) tensor, and products with them. Sorted
    by latent, then by row; both are numbered through the stack. A is (*stack, batch, d_in),
    C (*stack, d_sae, d_in), s (nnz,), and v, one number for each latent, (*stack, d_sae)."""

    def __init__(self, latent: Tensor, row: Tensor, x_shape: torch.Size, b_shape: torch.Size):
        self.latent, self.row, self.x_shape, self.b_shape = latent, row, x_shape, b_shape
        self.latent_starts = F.pad(latent.bincount(minlength=b_shape.numel()).cumsum(0), (1, 0))

    @cached_property
    def by_row(self) -> tuple[Tensor, Tensor, Tensor]:
        """The order by row, the latents in it, and where each row starts."""
        order, n = self.row.int().sort(stable=True).indices, self.x_shape[:-1].numel()
        starts = F.pad(self.row.bincount(minlength=n).cumsum(0), (1, 0))
        return order, self.latent[order], starts

    def to_rows(self, s: Tensor, C: Tensor) -> Tensor:
        order, latent, starts = self.by_row
        return bag(latent, C.flatten(0, -2), starts, per_sample_weights=s[order]).view(self.x_shape)

    def to_latents(self, s: Tensor, A: Tensor) -> Tensor:
        out = bag(self.row, A.flatten(0, -2), self.latent_starts, per_sample_weights=s)
        return out.view(*self.b_shape, -1)

    def products(self, A: Tensor, C: Tensor) -> Tensor:
        A, C = A.flatten(0, -2), C.flatten(0, -2)
        S = self.latent_starts, self.row, A.new_zeros(len(self.row)), (len(C), len(A))
        with warnings.catch_warnings(action="ignore"):  # once in a process: that CSR is in beta
            S = torch.sparse_csr_tensor(*S, check_invariants=False)
        return torch.sparse.sampled_addmm(S, C, A.mT, beta=0).values()

    def per_latent(self, s: Tensor) -> Tensor:
        return s.new_zeros(self.b_shape.numel()).index_add(0, self.latent, s).view(self.b_shape)

    def per_entry(self, v: Tensor) -> Tensor:
        return v.flatten().index_select(0, self.latent)


@torch.no_grad()
def find_support(x: Tensor, W_enc: Tensor, b: Tensor, look: torch.dtype) -> tuple[Support, Tensor]:
    """Where z + b > 0 for z = x W_enc, and z there, (nnz,); a block of latents at a time.
    The first look may be in bfloat16, which many machines multiply faster. That moves an entry by
    at most eps ‖x‖ ‖w‖ (Cauchy-Schwarz), for w the latent's column, so none is missed where
    [x, ‖x‖, 1] · [w, eps ‖w‖, b + eps |b|] > 0 is asked instead."""
    (batch, d_in), d_sae, C = x.shape[-2:], b.shape[-1], W_enc.mT.contiguous()
    A, W, B = x.reshape(-1, batch, d_in), C.view(-1, d_sae, d_in), b.reshape(-1, d_sae, 1)
    eps = 1.05 * torch.finfo(look).eps + d_in * torch.finfo(torch.float32).eps
    n = 1 + -(d_in + 2) % 8  # columns of 1, to a multiple of 8: else some GPUs take twice as long
    A = F.pad(torch.cat([A, A.norm(dim=-1, keepdim=True)], -1), (0, n), value=1.0).to(look)
    width = max(1, min(d_sae, (BLOCK if x.is_cpu else 16 * BLOCK) // batch))
    out, found = A.new_empty(width, batch), []  # one for all: fresh memory costs as much again
    is_open = torch.empty(-(-out.numel() // 8) * 8, dtype=torch.bool, device=x.device)
    for member, first in itertools.product(range(len(A)), range(0, d_sae, width)):
        w, b_w = (v[member, first : first + width] for v in (W, B))
        w = torch.cat([w, eps * w.norm(dim=-1, keepdim=True), b_w + eps * b_w.abs()], -1)
        pi = torch.mm(F.pad(w, (0, n - 1)).to(look), A[member].mT, out=out[: len(w)]).relu_()
        is_open.zero_()[: pi.numel()].copy_(pi.view(-1))  # NaN too: the loss will show it
        some = is_open.view(torch.int64).nonzero()[:, 0]  # most are False: eight at once
        i, j = is_open.view(-1, 8)[some].nonzero(as_tuple=True)
        found.append(8 * some[i] + j + (member * d_sae + first) * batch)
    entry = torch.cat(found)
    latent, row = entry // batch, entry % batch + entry // (batch * d_sae) * batch
    z = Support(latent, row, x.shape, b.shape).products(x, C)
    keep = (~(z <= -b.flatten()[latent])).nonzero().view(-1)
    return Support(latent[keep], row[keep], x.shape, b.shape), z[keep]


@torch.no_grad()
def encoded(sae: SAE, x: Tensor, sparse: bool | None) -> tuple | None:
    """S, x - b_dec, and z, f and f_gate at S: all entries, the support if `sparse`, or, if None,
    what was measured to be faster; and nothing at all where there is no such path."""
    able = type(sae) in (StandardSAE, GatedSAE, NaturalGatedSAE) and getattr(sae, "tied", True)
    able = able and sae.W_dec.dtype in (torch.float32, torch.float64)
    if sparse is None and (not able or torch.is_autocast_enabled(x.device.type)):
        return None
    expect(able, f"got {sae}, expected a Standard or a tied Gated SAE")
    check_rows(sae, x, only_batches=True)
    x_c, W_enc, b = x - as_row(sae.b_dec), sae.W_enc, getattr(sae, sae.opener)
    if sparse is None and (sparse := x_c[..., 0].numel() * sae.d_sae > 2**17):
        few = ((x_c[..., :8, :] @ W_enc + as_row(b)) > 0).float().mean()  # costs next to nothing
        sparse = few < min(0.1, sae.d_in / 768) and x.device.type in ("cpu", "cuda")
    can = torch.cpu.get_capabilities() if x.is_cpu else dict(amx_bf16=True)
    fast = sae.d_in >= 256 and (can.get("amx_bf16") or can.get("avx512_bf16"))
    look = torch.bfloat16 if fast else x.dtype
    S, z = find_support(x_c, W_enc, b, look) if sparse else (Dense, x_c @ W_enc)
    f = f_gate = (z + S.per_entry(b)).relu_()
    if isinstance(sae, GatedSAE):
        f = torch.addcmul(S.per_entry(sae.b_mag), S.per_entry(sae.r_mag.exp()), z)
        f = zero_where_shut(f.relu_(), f_gate, 0)
    return S, x_c, z, f, f_gate


class ByHand(torch.autograd.Function):
    """f_gate, E‖x - x̂(f)‖², and aux, with their gradients, from what is `encoded`. Of a Standard
    SAE, b_gate is b_enc, and scale, which is exp(r_mag), and b_mag are None."""

    @staticmethod
    def forward(ctx, code, aux, W_enc, W_dec, b_dec, b_gate, scale, b_mag):
        S, x_c, z, f, f_gate = code
        errors = [S.to_rows(s, W_dec) - x_c for s in ((f, f_gate) if aux else (f,))]  # x̂ - x
        ctx.S, ctx.unfrozen = S, aux == "unfrozen"
        ctx.save_for_backward(W_enc, W_dec, scale, x_c, z, f, f_gate, *errors)
        reconstruct, *task = (e.square().sum(-1).mean(-1) for e in errors)
        return f_gate, reconstruct, *(task or [torch.zeros_like(reconstruct)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_gate, *weights):  # d_v: the gradient with respect to v, d_gate: to f_gate
        W_enc, W_dec, scale, x_c, z, f, f_gate, *errors = ctx.saved_tensors
        S, d_scale, d_b_mag = ctx.S, None, None
        w, w_aux = (2 / x_c.shape[-2] * v[..., None, None] for v in weights)
        G = w * errors[0]  # of x̂
        d_f, d_W_dec, d_b_dec = S.products(G, W_dec), S.to_latents(f, G), G.sum(-2)
        if errors[1:]:
            G = w_aux * errors[1]
            d_gate = d_gate + S.products(G, W_dec)
            if ctx.unfrozen:
                d_W_dec, d_b_dec = d_W_dec + S.to_latents(f_gate, G), d_b_dec + G.sum(-2)
        d_z = zero_where_shut(d_gate if scale is not None else d_gate + d_f, f_gate, 0)
        d_b_gate = d_shift = S.per_latent(d_z)
        if scale is not None:
            d_f = zero_where_shut(d_f, f, 0)
            d_scale, d_b_mag = S.per_latent(d_f * z), S.per_latent(d_f)
            d_z, d_shift = d_z.addcmul_(S.per_entry(scale), d_f), d_b_gate + scale * d_b_mag
        d_b_dec = d_b_dec - (W_enc @ d_shift.unsqueeze(-1)).squeeze(-1)  # z has b_dec too
        return None, None, S.to_latents(d_z, x_c).mT, d_W_dec, d_b_dec, d_b_gate, d_scale, d_b_mag


def fast_losses(sae: SAE, x: Tensor, sparse: bool | None = None) -> Losses:
    """`sae.losses(x)` to rounding, by hand where that can be: see `encoded`. x gets no gradient."""
    if (code := encoded(sae, x, sparse)) is None:
        return sae.losses(x)
    scale, b_mag = (sae.r_mag.exp(), sae.b_mag) if isinstance(sae, GatedSAE) else (None, None)
    own = sae.W_enc, sae.W_dec, sae.b_dec, getattr(sae, sae.opener), scale, b_mag
    f_gate, reconstruct, aux = ByHand.apply(code, getattr(sae, "aux", None), *own)
    charge = PENALTIES[sae.penalty](f_gate, code[0].per_entry(sae.W_dec.norm(dim=-1)))
    return Losses(reconstruct, code[0].per_latent(charge).sum(-1) / x.shape[-2], aux)


def fast_code(sae: SAE, x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """`Metrics.code`, by the same paths."""
    if (code := encoded(sae, x, None)) is None:
        return dense_code(sae, x, wide)
    S, f = code[0], code[3]
    sums = (S.per_latent(v.to(wide)) for v in (f, f.sign()))
    return S.to_rows(f, sae.W_dec) + as_row(sae.b_dec), *sums


dense_code, Metrics.code = Metrics.code, staticmethod(fast_code)
Trainer.default_losses = staticmethod(fast_losses)  # without these two lines, all is dense
