"""The losses in NumPy, forward and backward by hand: no autograd, no shared code.

Weights a, l1, c of the terms make every term's gradient testable by itself:

    a E‖x - x̂(f̃)‖² + l1 E‖ReLU(π_gate)‖₁ + c E‖x - x̂_aux(ReLU(π_gate))‖²
"""

import numpy as np


def gated(x, p, a=1.0, l1=1.0, c=1.0, aux="frozen"):
    """Losses and gradients of a Gated SAE; tied if `p` holds r_mag, untied if it holds W_mag."""
    n = len(x)
    xc = x - p["b_dec"]
    z = xc @ p["W_enc"]
    pi_gate = z + p["b_gate"]
    tied = "r_mag" in p
    pi_mag = (np.exp(p["r_mag"]) * z if tied else xc @ p["W_mag"]) + p["b_mag"]
    is_open = np.where(pi_gate > 0, 1.0, 0.0)
    f = is_open * np.maximum(pi_mag, 0)
    f_aux = np.maximum(pi_gate, 0)
    error = f @ p["W_dec"] + p["b_dec"] - x
    error_aux = (f_aux @ p["W_dec"] + p["b_dec"] - x) * (aux is not None)
    losses = (error**2).sum() / n, f_aux.sum() / n, (error_aux**2).sum() / n

    d_x_hat = 2 * a * error / n
    d_x_hat_aux = 2 * c * error_aux / n
    d_pi_mag = (d_x_hat @ p["W_dec"].T) * is_open * np.where(pi_mag > 0, 1.0, 0.0)
    d_pi_gate = (l1 / n + d_x_hat_aux @ p["W_dec"].T) * is_open
    g = {"b_gate": d_pi_gate.sum(0), "b_mag": d_pi_mag.sum(0), "W_dec": f.T @ d_x_hat}
    if tied:
        d_z = d_pi_gate + np.exp(p["r_mag"]) * d_pi_mag
        g["r_mag"] = np.exp(p["r_mag"]) * (d_pi_mag * z).sum(0)
        d_xc = d_z @ p["W_enc"].T
    else:
        d_z = d_pi_gate
        g["W_mag"] = xc.T @ d_pi_mag
        d_xc = d_z @ p["W_enc"].T + d_pi_mag @ p["W_mag"].T
    g["W_enc"] = xc.T @ d_z
    g["b_dec"] = d_x_hat.sum(0) - d_xc.sum(0)
    if aux == "unfrozen":
        g["W_dec"] = g["W_dec"] + f_aux.T @ d_x_hat_aux
        g["b_dec"] = g["b_dec"] + d_x_hat_aux.sum(0)
    return losses, g


def standard(x, p, a=1.0, l1=1.0):
    """Losses and gradients of a Standard SAE."""
    n = len(x)
    xc = x - p["b_dec"]
    pi = xc @ p["W_enc"] + p["b_enc"]
    f = np.maximum(pi, 0)
    error = f @ p["W_dec"] + p["b_dec"] - x
    d_x_hat = 2 * a * error / n
    d_pi = (d_x_hat @ p["W_dec"].T + l1 / n) * np.where(pi > 0, 1.0, 0.0)
    g = {"b_enc": d_pi.sum(0), "W_enc": xc.T @ d_pi, "W_dec": f.T @ d_x_hat}
    g["b_dec"] = d_x_hat.sum(0) - (d_pi @ p["W_enc"].T).sum(0)
    return ((error**2).sum() / n, f.sum() / n, 0.0), g


def jumprelu(x, p, eps, a=1.0, l0=1.0):
    """Losses and pseudo-gradients of a JumpReLU SAE, eqs. 11 and 12 of arXiv 2407.14435.

    K is the rectangle, 1[|u| < 1/2]. A θ below 0 counts as 0, and yet has the gradients of 0:

        ∂ π 1[π > θ] / ∂θ  =  -θ/ε K((π - θ)/ε)        ∂ π 1[π > θ] / ∂π  =  1[π > θ]
        ∂   1[π > θ] / ∂θ  =  -1/ε K((π - θ)/ε)        ∂   1[π > θ] / ∂π  =  0
    """
    n, theta = len(x), np.maximum(p["threshold"], 0)
    xc = x - p["b_dec"]
    pi = xc @ p["W_enc"] + p["b_enc"]
    is_on = np.where(pi > theta, 1.0, 0.0)
    f = pi * is_on
    error = f @ p["W_dec"] + p["b_dec"] - x
    d_x_hat = 2 * a * error / n
    d_f = d_x_hat @ p["W_dec"].T
    d_pi = d_f * is_on
    kernel = np.where(np.abs(pi - theta) / eps < 0.5, 1.0, 0.0)
    g = {"b_enc": d_pi.sum(0), "W_enc": xc.T @ d_pi, "W_dec": f.T @ d_x_hat}
    g["threshold"] = (-(theta / eps) * kernel * d_f - kernel / eps * l0 / n).sum(0)
    g["b_dec"] = d_x_hat.sum(0) - (d_pi @ p["W_enc"].T).sum(0)
    return ((error**2).sum() / n, is_on.sum() / n, 0.0), g
