"""Gated Sparse Autoencoders: every variant and loss, in one file.

A sparse autoencoder (SAE) explains an activation vector as a sum of a few directions out of a large
learned dictionary. The L1 penalty that keeps the sum short also pulls every coefficient towards
zero: it *shrinks*. A Gated SAE pays the penalty only for deciding *which* directions are used, not
for *how strongly*, and so reconstructs as well with fewer of them.

    Rajamanoharan, Conmy, Smith, Lieberum, Varma, Kramár, Shah, Nanda: Improving Dictionary Learning
    with Gated Sparse Autoencoders, arXiv 2404.16014v2. Below: "the paper".

    "The discussion" is the thread under its announcement, lesswrong.com/posts/vdoiWXeouGsZEYgrg.

A *latent* is one of the d_sae coefficients of that sum; it *fires* on x where it is not zero. A
batch is a matrix of rows x. Every parameter may carry leading `stack` dimensions: many SAEs in one
module, which run as one.

    x        x           (..., batch, d_in)    activations
    x̂        x_hat       (..., batch, d_in)    their reconstruction
    f, f̃     f           (..., batch, d_sae)   the coefficients, nowhere negative: standard, gated
    π_gate   pi_gate     (..., batch, d_sae)   a gate is open where this is positive;
    π_mag    pi_mag      (..., batch, d_sae)   its latent's coefficient is then max(0, π_mag)
    W_enc    W_enc       (..., d_in, d_sae)    encoder: the paper's W_gate, transposed
    W_dec    W_dec       (..., d_sae, d_in)    decoder: row i is dictionary direction d_i, of norm 1
    b_dec    b_dec       (..., d_in)           subtracted before encoding, added after decoding
    b_enc, b_gate, b_mag (..., d_sae)          biases of the encoders: standard; gate and magnitude
    r_mag    r_mag       (..., d_sae)          log of a scale per latent: section 6
    λ        l1          () or stack           weight of the sparsity penalty
    E        .mean(-1)                         mean over the batch, of a *sum* over features
    1[·], ⊙                                    1 where true and 0 elsewhere; elementwise product

Map.  2 the standard SAE and its shrinkage · 3 gating · 4 why its gradient vanishes · 5 the
auxiliary task · 6 weight tying · 8 metrics · 9 training · 12 files.  No idea uses a later one: stop
after any section and own what came before. (7, 10 and 11 are reserved.)

Departures from the paper: W_enc starts as a copy of W_dec transposed, and λ warms up (both became
practice later); dead latents are not resampled; the untied variant has no r_mag, since W_mag has
scales of its own; the learning rate warms up and falls over shares of the run.
"""

import json
import math
import operator
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
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


def decode(f: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """x̂(f) = f W_dec + b_dec: (..., batch, d_sae) -> (..., batch, d_in)."""
    return f @ W_dec + rows(b_dec)


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


def l1_losses(x: Tensor, f: Tensor, penalised: Tensor, W_dec: Tensor, b_dec: Tensor) -> Losses:
    """E‖x - x̂(f)‖² + λ E‖penalised‖₁, for f, penalised ≥ 0 of shape (..., batch, d_sae).

    A standard SAE penalises f itself (section 2.2 of the paper), and that shrinks f.
    """
    reconstruct = squared_error(x, decode(f, W_dec, b_dec))
    return Losses(reconstruct, penalised.sum(-1).mean(-1), torch.zeros_like(reconstruct))


class SAE(nn.Module, ABC):
    """What all variants share: the dictionary, its constraint, decoding, and the checks.

    stack      leading dimensions: `stack=(12,)` is twelve independent SAEs
    normalize  divide the squared errors in `losses` by E‖x‖² of the batch (authors, in the
               discussion, to carry hyper-parameters between sites): c x then has the errors of x.
               Its sparsity is still c times as large, so the same λ weighs c times as much
    generator  draws the initial dictionary. None is seed 0, never the global generator: two SAEs
               start alike unless given two generators

    x is (batch, d_in), shared by a whole stack, or (*stack, batch, d_in). A single SAE also encodes
    x of more dimensions. Wrong shapes raise ValueError, wrong dtypes TypeError.
    """

    architecture: str
    latent_vectors: tuple[str, ...]  # names of the parameters of shape (..., d_sae)

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        *,
        stack: int | Sequence[int] = (),
        normalize: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        stack = (stack,) if hasattr(stack, "__index__") else stack
        self.d_in, self.d_sae = _positive_int("d_in", d_in), _positive_int("d_sae", d_sae)
        self.stack = tuple(_positive_int("a dimension of stack", n) for n in stack)
        self.normalize = _flag("normalize", normalize)
        W_dec = torch.empty(*self.stack, self.d_sae, self.d_in, device=device, dtype=dtype)
        if not W_dec.is_floating_point():
            raise TypeError(f"dtype is {dtype}, expected a floating-point dtype")
        if not W_dec.is_meta:  # on the meta device there are shapes and no numbers: see `load`
            generator = torch.Generator().manual_seed(0) if generator is None else generator
            at = dict(generator=generator, device=generator.device, dtype=W_dec.dtype)
            W_dec.copy_(F.normalize(torch.randn(W_dec.shape, **at), dim=-1))
        self.W_dec = nn.Parameter(W_dec)
        # The encoder starts out looking along the directions it decodes to (discussion). A copy: a
        # transposed view would share memory, and the two would stay tied for ever. (By itself,
        # `clone` would keep the transposed strides.)
        self.W_enc = nn.Parameter(W_dec.mT.clone(memory_format=torch.contiguous_format))
        self.b_dec = nn.Parameter(W_dec.new_zeros(*self.stack, self.d_in))
        for name in self.latent_vectors:
            setattr(self, name, nn.Parameter(W_dec.new_zeros(*self.stack, self.d_sae)))

    @property
    def config(self) -> dict:
        """The constructor's arguments: `type(sae)(**sae.config)` is an untrained sae like this."""
        return dict(d_in=self.d_in, d_sae=self.d_sae, stack=self.stack, normalize=self.normalize)

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
        return (x - rows(self.b_dec)) @ self.W_enc

    def decode(self, f: Tensor) -> Tensor:
        """x̂(f) = f W_dec + b_dec: (..., batch, d_sae) -> (..., batch, d_in)."""
        return decode(f, self.W_dec, self.b_dec)

    def forward(self, x: Tensor) -> Tensor:
        """x̂: (..., batch, d_in) -> the same, with `stack` in front where x was shared."""
        return self.decode(self.encode(x))

    def losses(self, x: Tensor) -> Losses:
        """The terms of this variant's loss on (batch, d_in) or (*stack, batch, d_in)."""
        self.check(x, rows_only=True)
        terms = self.loss_terms(x)
        if not self.normalize:
            return terms
        x_sq = x.square().sum(-1).mean(-1)
        x_sq = torch.where(x_sq > 0, x_sq, 1)  # an all-zero batch has no scale to divide by
        return terms._replace(reconstruct=terms.reconstruct / x_sq, aux=terms.aux / x_sq)

    def check(self, x: Tensor, rows_only: bool = False) -> None:
        """Raise TypeError or ValueError unless x is a batch that this SAE can take."""
        if not isinstance(x, Tensor) or not x.is_floating_point():
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x is {kind}, expected a floating-point tensor")
        if x.dtype != self.W_enc.dtype:
            raise TypeError(f"x is {x.dtype}, expected {self.W_enc.dtype} like the SAE")
        if x.ndim < 2 or x.shape[-1] != self.d_in or x.numel() == 0:
            raise ValueError(f"x is {tuple(x.shape)}, expected (..., batch ≥ 1, {self.d_in})")
        if (self.stack or rows_only) and x.shape[:-2] not in ((), self.stack):
            own = f" or (*{self.stack}, batch, {self.d_in})" if self.stack else ""
            raise ValueError(f"x is {tuple(x.shape)}, expected (batch, {self.d_in}){own}")

    # Rows of W_dec have norm 1, or the penalty could be dodged: with d_i twice as long, half of f_i
    # gives the same x̂ at half the price. Each step removes the gradient's radial part, which would
    # only swell Adam's second moment and so shorten the useful part of the step; then steps; then
    # renormalises, since Adam rescales each coordinate and its step is not tangential again.

    @torch.no_grad()
    def fold_decoder_norms(self) -> None:
        """d_i ← d_i / n_i and f_i ← n_i f_i, for n_i = ‖d_i‖: x̂ and the squared errors stay."""
        n = self.W_dec.norm(dim=-1)
        n = torch.where(n > 0, n, 1)
        self.W_dec /= n.unsqueeze(-1)
        for name, parameter in self.named_parameters():
            if name in ("W_enc", "W_mag"):
                parameter *= rows(n)
            elif name.startswith("b_") and name != "b_dec":
                parameter *= n

    @torch.no_grad()
    def remove_radial_gradient(self) -> None:
        """grad d_i ← grad d_i - (grad d_i · d_i) d_i, for the unit rows d_i of W_dec."""
        grad, d = self.W_dec.grad, self.W_dec
        grad -= (grad * d).sum(-1, keepdim=True) * d

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """d_i ← d_i / ‖d_i‖. A row of zeros stays zero."""
        tiny = torch.finfo(self.W_dec.dtype).tiny
        self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True).clamp_min(tiny)


class StandardSAE(SAE):
    """f = ReLU((x - b_dec) W_enc + b_enc), section 2.2 of the paper. Options: see `SAE`."""

    architecture = "standard"
    latent_vectors = ("b_enc",)

    def encode(self, x: Tensor) -> Tensor:
        self.check(x)
        return F.relu(self.project(x) + rows(self.b_enc))

    def loss_terms(self, x: Tensor) -> Losses:
        f = self.encode(x)
        return l1_losses(x, f, f, self.W_dec, self.b_dec)


def _positive_int(name: str, value: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a positive integer")
    return operator.index(value)


def _flag(name: str, value: bool) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, expected True or False")
    return value


# -- 3 · Gating ------------------------------------------------------------------------------------
# L1 is needed for one bit per latent: does it fire? Section 2 showed what it does to the rest. So
# split the encoder: one path decides *which* latents fire, the other *how strongly*, and only the
# first will be penalised. Each has weights (d_in, d_sae) and biases of its own.
#
#     π_gate = (x - b_dec) W_gate + b_gate            π_mag = (x - b_dec) W_mag + b_mag


def gate(pi_gate: Tensor, pi_mag: Tensor) -> Tensor:
    """f̃ = 1[π_gate > 0] ⊙ ReLU(π_mag), all (..., batch, d_sae); eq. 6, section 3.2.1 of the paper.

    The step is flat wherever it is not vertical, so no gradient of f̃ tells the gate when to open.
    """
    return (pi_gate > 0) * F.relu(pi_mag)


# -- 4 · Why the gradient vanishes -----------------------------------------------------------------
# Put f̃ into the loss of section 2, penalise the gate alone, and training kills the SAE. Two lines
# show why. For every latent,
#
#     ∂ reconstruct / ∂b_gate  =  0                       f̃ sees π_gate through the step only: flat
#     ∂ sparsity    / ∂b_gate  =  E 1[π_gate > 0]  ≥  0   ReLU(π_gate) rises where the gate is open
#
# so descent lowers b_gate of each latent whose gate ever opens, and nothing ever raises it. W_gate
# is in the same trap. (Tied to W_mag, as in section 6, it still hears of the reconstruction, and
# only dies more slowly.) The loss reads well, falls for a while, and ends near E‖x‖²: all shut.


def incorrect_losses(x: Tensor, f: Tensor, pi_gate: Tensor, W_dec: Tensor, b_dec: Tensor) -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁: L_incorrect of the paper's section 3.2.2. It fails.

    What we mean to penalise is the gate itself, 1[π_gate > 0], but a step has no gradient here
    either. ReLU(π_gate) has one, and it reaches the gate. The reconstruction's still does not.
    """
    return l1_losses(x, f, F.relu(pi_gate), W_dec, b_dec)


# -- 5 · The auxiliary task ------------------------------------------------------------------------
# The gate needs a reason to open. So let ReLU(π_gate) reconstruct x as well: that gradient says
# which latents would help. With its penalty this is section 2 over again, shrinkage and all, but
# nobody reads those coefficients as magnitudes: they train the gate, which uses their sign.


def gated_losses(
    x: Tensor, f: Tensor, pi_gate: Tensor, W_dec: Tensor, b_dec: Tensor, frozen: bool = True
) -> Losses:
    """E‖x - x̂(f̃)‖² + λ E‖ReLU(π_gate)‖₁ + E‖x - x̂_frozen(ReLU(π_gate))‖², section 3.2.2.

    `frozen=False` lets the auxiliary task train the decoder as well, the paper's ablation.
    """
    # Frozen, or the auxiliary task would turn the d_i and move b_dec to suit ReLU(π_gate), which is
    # shrunken, at the cost of f̃. b_dec is frozen as the decoder's bias only: it is also in π_gate,
    # as x - b_dec, and there it keeps its gradient.
    W_aux, b_aux = (W_dec.detach(), b_dec.detach()) if frozen else (W_dec, b_dec)
    f_gate = F.relu(pi_gate)
    aux = squared_error(x, decode(f_gate, W_aux, b_aux))
    return l1_losses(x, f, f_gate, W_dec, b_dec)._replace(aux=aux)


# -- 6 · Weight tying ------------------------------------------------------------------------------
# A second encoder costs a product and its parameters. But a latent's gate and its magnitude seek
# the same thing: let them look along one direction, and differ in scale and offset (section 3.2.1).
#
#     z = (x - b_dec) W_enc          π_gate = z + b_gate          π_mag = exp(r_mag) ⊙ z + b_mag


class GatedSAE(SAE):
    """The Gated SAE, section 3.2 of the paper.

    tied  True: one encoder, and a scale exp(r_mag) per latent (the paper). False: a W_mag as well
    aux   "frozen" (the paper), "unfrozen" (its ablation), None (L_incorrect: the gates die)

    Other options: see `SAE`.
    """

    latent_vectors = ("b_gate", "b_mag")

    def __init__(
        self, d_in: int, d_sae: int, tied: bool = True, *, aux: str | None = "frozen", **options
    ):
        if aux not in ("frozen", "unfrozen", None):
            raise ValueError(f"aux is {aux!r}, expected 'frozen', 'unfrozen' or None")
        super().__init__(d_in, d_sae, **options)
        self.tied, self.aux = _flag("tied", tied), aux
        if self.tied:
            self.r_mag = nn.Parameter(torch.zeros_like(self.b_gate))
        else:
            self.W_mag = nn.Parameter(self.W_enc.detach().clone())

    @property
    def architecture(self) -> str:
        return "gated" if self.tied else "gated_untied"

    @property
    def config(self) -> dict:
        return super().config | dict(tied=self.tied, aux=self.aux)

    def paths(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """π_gate, π_mag: (..., batch, d_in) -> (..., batch, d_sae) twice."""
        self.check(x)
        z = self.project(x)
        z_mag = rows(self.r_mag.exp()) * z if self.tied else (x - rows(self.b_dec)) @ self.W_mag
        return z + rows(self.b_gate), z_mag + rows(self.b_mag)

    def encode(self, x: Tensor) -> Tensor:
        return gate(*self.paths(x))

    def loss_terms(self, x: Tensor) -> Losses:
        pi_gate, pi_mag = self.paths(x)
        args = x, gate(pi_gate, pi_mag), pi_gate, self.W_dec, self.b_dec
        if self.aux is None:
            return incorrect_losses(*args)
        return gated_losses(*args, frozen=self.aux == "frozen")

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


# -- 8 · Metrics -----------------------------------------------------------------------------------
# Three numbers hold all there is to say about scale: how long x is, how long x̂ is, and how well
# they point the same way.


class Moments(NamedTuple):
    """E‖x‖², E‖x̂‖², E[x̂·x], each of shape `stack`, and the metrics of scale made from them.

    All are ratios of means. Means of ratios would let the rows nearest to zero decide. Where a
    denominator is 0 the ratio is NaN, and a RuntimeWarning says so.
    """

    x_sq: Tensor
    x_hat_sq: Tensor
    dot: Tensor

    @classmethod
    def from_norms(cls, x_sq: Tensor, x_hat_sq: Tensor, error_sq: Tensor) -> "Moments":
        """From three numbers most runs log: E[x̂·x] = (E‖x̂‖² + E‖x‖² - E‖x - x̂‖²) / 2."""
        x_sq, x_hat_sq, error_sq = map(torch.as_tensor, (x_sq, x_hat_sq, error_sq))
        return cls(x_sq, x_hat_sq, (x_hat_sq + x_sq - error_sq) / 2)

    @property
    def gamma(self) -> Tensor:
        """γ = argmin over g of E‖x̂/g - x‖² = E‖x̂‖² / E[x̂·x], the relative reconstruction bias.

        As corrected in the discussion. Below 1, x̂ is too short, and 1/γ times as long would be
        better. At 1 the error is orthogonal to x̂: no rescaling helps, but it need not be small.
        """
        return _ratio(self.x_hat_sq, self.dot, "γ", "E[x̂·x]")

    @property
    def factor_on_x(self) -> Tensor:
        """argmin over g of E‖x̂ - g x‖² = E[x̂·x] / E‖x‖²: S. Marks's reading (discussion)."""
        return _ratio(self.dot, self.x_sq, "factor_on_x", "E‖x‖²")

    @property
    def factor_on_x_hat(self) -> Tensor:
        """argmin over g of E‖g x̂ - x‖² = E[x̂·x] / E‖x̂‖² = 1/γ, but *not* 1/factor_on_x."""
        return _ratio(self.dot, self.x_hat_sq, "factor_on_x_hat", "E‖x̂‖²")

    @property
    def cosine_squared(self) -> Tensor:
        """factor_on_x · factor_on_x_hat = E[x̂·x]² / (E‖x‖² E‖x̂‖²) ≤ 1: 1 only if collinear.

        Nearly perpendicular x and x̂ send both factors to 0, so they cannot be reciprocals.
        """
        return self.factor_on_x * self.factor_on_x_hat

    @property
    def norm_ratio(self) -> Tensor:
        """E‖x̂‖² / E‖x‖². Not the bias: at γ = 1 it is cosine_squared, < 1 unless x̂ is perfect."""
        return _ratio(self.x_hat_sq, self.x_sq, "norm_ratio", "E‖x‖²")

    @property
    def gamma_v1(self) -> Tensor:
        """√(E‖x̂‖² / (E‖x‖² - E‖x - x̂‖²)): eq. 10 of the first preprint, right only at γ = 1.

        Reconstructed, not quoted: from its value 1/√3 at x = 1, x̂ = 1/2, where γ = 1/2, and from
        the authors' explanation that the unoptimised loss had slipped into the derivation. A
        negative denominator counts as 0.
        """
        explained = (2 * self.dot - self.x_hat_sq).clamp_min(0)
        return _ratio(self.x_hat_sq, explained, "gamma_v1", "max(0, E‖x‖² - E‖x - x̂‖²)").sqrt()


def moments(x: Tensor, x_hat: Tensor) -> Moments:
    """Of (..., batch, d_in) twice; a stack of x_hat may share one x."""
    if x.shape != x_hat.shape[-x.ndim :] or x.numel() == 0:
        raise ValueError(
            f"x is {tuple(x.shape)}, x_hat {tuple(x_hat.shape)}, expected one (..., batch, d_in)"
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


def _ratio(a: Tensor, b: Tensor, name: str, denominator: str) -> Tensor:
    ratio = torch.where(b == 0, torch.nan, a / b)
    if not ratio.isfinite().all():
        message = f"{name} is undefined where {denominator} is 0, NaN or infinite"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return ratio


class Metrics(NamedTuple):
    """What `evaluate` finds; each of shape `stack` unless said otherwise."""

    n_rows: int
    l0: Tensor  # mean number of latents that fire on a row
    l1: Tensor  # E‖f‖₁
    fvu: Tensor  # fraction of variance unexplained, E‖x - x̂‖² / E‖x - E x‖²
    gamma: Tensor  # this and the next four: see Moments
    norm_ratio: Tensor
    cosine_squared: Tensor
    factor_on_x: Tensor
    factor_on_x_hat: Tensor
    dead_fraction: Tensor  # share of latents that never fired
    firing_frequency: Tensor  # (*stack, d_sae): share of rows on which each latent fired


@torch.no_grad()
def evaluate(sae: SAE, batches: Iterable[Tensor]) -> Metrics:
    """Metrics over any number of batches, of any sizes, in constant memory.

    Ratios of means over the whole stream: how it was cut into batches changes nothing but rounding.
    Sums are float64 (MPS: float32). A NaN or infinity raises ValueError, with the batch's number.
    """
    n_rows, sums = 0, {}
    for number, x in enumerate(_stream(sae, batches)):
        if not x.isfinite().all():
            raise ValueError(f"batch {number}: {_bad_rows(x)}")
        f = sae.encode(x)
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        x, x_hat, n = x.to(wide), sae.decode(f).to(wide), x.shape[-2]
        if n_rows == 0:
            origin = rows(x[..., 0, :])  # centre near the data, or a far mean cancels the variance
        means = moments(x, x_hat)._asdict() | dict(
            error=squared_error(x, x_hat),
            offset=(x - origin).mean(-2),
            offset_sq=squared_error(x, origin),
            fires=(f > 0).sum(-2, dtype=wide) / n,
            l1=f.sum(-1, dtype=wide).mean(-1),
        )
        sums = {name: sums.get(name, 0) + n * mean for name, mean in means.items()}
        n_rows += n
    if n_rows == 0:
        raise ValueError("batches is empty, expected at least one batch")
    mean = {name: total / n_rows for name, total in sums.items()}
    m = Moments(mean["x_sq"], mean["x_hat_sq"], mean["dot"])
    variance = mean["offset_sq"] - mean["offset"].square().sum(-1)
    return Metrics(
        n_rows=n_rows,
        l0=mean["fires"].sum(-1),
        l1=mean["l1"],
        fvu=_ratio(mean["error"], variance, "fvu", "the variance of x"),
        gamma=m.gamma,
        norm_ratio=m.norm_ratio,
        cosine_squared=m.cosine_squared,
        factor_on_x=m.factor_on_x,
        factor_on_x_hat=m.factor_on_x_hat,
        dead_fraction=(mean["fires"] == 0).to(wide).mean(-1),
        firing_frequency=mean["fires"],
    )


def _stream(sae: SAE, batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """Each batch, checked, on the SAE's device and in its dtype. Errors number them from 0."""
    if isinstance(batches, Tensor):
        raise TypeError("batches is one tensor, expected an iterable of them: x.split(512), or [x]")
    for number, x in enumerate(batches):
        if isinstance(x, Tensor) and x.is_floating_point():
            # Detached: the model that made x is not being trained.
            x = x.detach().to(sae.W_enc.device, sae.W_enc.dtype)
        try:
            sae.check(x, rows_only=True)
        except (TypeError, ValueError) as error:
            raise type(error)(f"batch {number}: {error}") from None
        yield x


def _bad_rows(x: Tensor) -> str:
    bad = (~x.isfinite()).any(-1).flatten().nonzero().flatten()
    return f"NaN or infinity in {len(bad)} of {x[..., 0].numel()} rows, first in row {int(bad[0])}"


# -- 9 · Training ----------------------------------------------------------------------------------
# One loop for every variant, and for whole stacks: no parameter is shared by two members, so the
# gradient of the sum of their losses is each one's own, and Adam works element by element.


def best_device() -> torch.device:
    """CUDA if there is one, else MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


class Record(NamedTuple):
    """What `train` reports of a step."""

    step: int  # counted from 1
    lr: float  # learning rate of this step
    l1: Tensor  # λ of this step
    losses: Losses  # before this step, on its batch
    metrics: Metrics  # after it, on the same batch


def train(
    sae: SAE,
    batches: Iterable[Tensor],
    *,
    l1: float | Tensor,
    steps: int,
    lr: float = 3e-4,
    betas: tuple[float, float] = (0.0, 0.999),
    lr_warmup: float = 0.1,
    l1_warmup: float = 0.1,
    lr_decay: float = 0.2,
    log_every: int = 100,
    device: torch.device | str | None = None,
) -> Iterator[Record]:
    """Train in place with Adam; yields a Record at step 1, every `log_every` steps, and the last.

    Checks its arguments and moves the SAE at once. Training itself runs as the records are
    iterated, takes exactly `steps` batches (batch, d_in), and stops if the iteration does.

    l1         λ, one number, or one for each member of a stack (shape `stack`)
    lr, betas  of Adam: the paper's for Gated SAEs of language models. Toy data of 64 dimensions
               learned in 4000 steps at lr 1e-2 what 3e-4 had not reached; betas made no difference
    lr_warmup, l1_warmup, lr_decay
               shares of the steps in which lr and λ rise linearly, and in which lr falls at the end
    device     None: `best_device()`; the SAE is moved there, and each batch

    A decoder from elsewhere, not of unit norm, is folded first: x̂ stays. NaN or infinity in a batch
    or a loss, or too few batches, raise ValueError with the step, and leave the SAE as before that
    step. A half-precision SAE is a TypeError: its rounding swallows the steps.
    """
    _positive_int("steps", steps), _positive_int("log_every", log_every)
    if not 0 < lr < math.inf:
        raise ValueError(f"lr is {lr}, expected a positive number")
    if not all(0 <= share <= 1 for share in (lr_warmup, l1_warmup, lr_decay)):
        shares = lr_warmup, l1_warmup, lr_decay
        raise ValueError(f"lr_warmup, l1_warmup, lr_decay are {shares}, expected shares in [0, 1]")
    if torch.finfo(sae.W_enc.dtype).bits < 32:
        raise TypeError(f"the SAE is {sae.W_enc.dtype}, expected float32: train, then convert")
    sae.to(best_device() if device is None else device)
    l1 = torch.as_tensor(l1).detach().clone().to(sae.W_enc)
    if l1.shape not in ((), sae.stack) or not ((l1 >= 0) & l1.isfinite()).all():
        raise ValueError(
            f"l1 is {l1.tolist()}, expected finite and ≥ 0, of shape () or {sae.stack}"
        )

    if (sae.W_dec.norm(dim=-1) - 1).abs().max() > 1e-3:
        sae.fold_decoder_norms()

    @torch.enable_grad()  # also where the caller has switched gradients off
    def run() -> Iterator[Record]:  # apart, so that the checks above do not wait for an iteration
        optimizer = torch.optim.Adam(sae.parameters(), lr=lr, betas=betas, fused=True)
        step = 0
        for step, x in enumerate(islice(_stream(sae, batches), steps), start=1):
            rise, fall = (
                step / max(1, lr_warmup * steps),
                (steps + 1 - step) / max(1, lr_decay * steps),
            )
            lr_now, l1_now = lr * min(1, rise, fall), l1 * min(1, step / max(1, l1_warmup * steps))
            losses = sae.losses(x)
            total = losses.total(l1_now)
            if not total.isfinite().all():
                cause = f"the loss is {total.tolist()}" if x.isfinite().all() else _bad_rows(x)
                raise ValueError(f"step {step}: {cause}; the SAE is as it was before this step")
            optimizer.zero_grad()
            total.sum().backward()
            if sae.W_dec.requires_grad:
                sae.remove_radial_gradient()
            optimizer.param_groups[0]["lr"] = lr_now
            optimizer.step()
            sae.normalize_decoder()
            if step in (1, steps) or step % log_every == 0:
                terms = Losses(*(term.detach() for term in losses))
                yield Record(step, lr_now, l1_now, terms, evaluate(sae, [x]))
        if step < steps:
            raise ValueError(f"batches ended after {step} of {steps} steps; the SAE keeps these")

    return run()


# -- 12 · Files ------------------------------------------------------------------------------------
# The layout is SAELens's, a folder with two files, so that weights travel both ways.

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES = {"standard": StandardSAE, "gated": GatedSAE, "gated_untied": GatedSAE}
# What SAELens may do and this file does not: another value is refused.
PREPROCESSING = dict(
    apply_b_dec_to_input=True, normalize_activations="none", reshape_activations="none"
)
FIXED = PREPROCESSING | dict(activation_fn="relu", activation_fn_str="relu")


def save(sae: SAE, folder: str | os.PathLike) -> None:
    """Write an SAE to `folder`. SAELens loads it too, if it is a single Standard or tied Gated SAE.

    If the folder holds an SAE of the same configuration, its weights are replaced; if of another
    one, ValueError. A kill at any moment leaves the old SAE or the new: the config is written while
    there are no weights and never changes under them, and the weights are replaced in one move.
    (One process at a time may save to a folder.)
    """
    from safetensors.torch import save_file

    folder, sae = Path(folder), getattr(sae, "_orig_mod", sae)  # torch.compile wraps modules
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder to save into")
    given = _describe(sae)
    tensors = {name: tensor.detach().contiguous() for name, tensor in sae.state_dict().items()}
    blank = type(sae)(**sae.config, dtype=sae.W_enc.dtype, device="meta")
    _fill(blank, tensors, "the SAE")  # what could not be loaded is not saved
    if (folder / WEIGHTS_FILE).exists():
        held = _describe(_blank(folder))
        differ = {
            k: (held.get(k), given.get(k)) for k in held | given if held.get(k) != given.get(k)
        }
        if differ:
            raise ValueError(f"{folder} holds another SAE; (held, given) differ in {differ}")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        config = given | PREPROCESSING | dict(device="cpu", metadata={})
        _replace(folder / CONFIG_FILE, lambda new: new.write_text(json.dumps(config, indent=2)))
    _replace(folder / WEIGHTS_FILE, lambda new: save_file(tensors, new))


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


def from_dictionary_learning(state: Mapping[str, Tensor]) -> SAE:
    """The SAE in a state dict of dictionary-learning's GatedAutoEncoder or AutoEncoder.

    ValueError, with both lists of names and shapes, if it is neither.
    """
    names = {"encoder.weight": "W_enc", "decoder.weight": "W_dec"}
    if "r_mag" in state:
        variant = GatedSAE
        names |= dict(decoder_bias="b_dec", gate_bias="b_gate", mag_bias="b_mag", r_mag="r_mag")
    else:
        variant = StandardSAE
        names |= {"bias": "b_dec", "encoder.bias": "b_enc"}
    if set(state) != set(names) or state["encoder.weight"].ndim != 2:
        raise ValueError(f"the state holds {sorted(state)}, expected {sorted(names)}")
    turned = {old: t.mT if t.ndim == 2 else t for old, t in state.items()}
    tensors = {new: turned[old].detach().clone() for old, new in names.items()}
    W_enc = tensors["W_enc"]
    return _fill(variant(*W_enc.shape, dtype=W_enc.dtype, device="meta"), tensors, "the state")


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
