"""The lesson: `marimo run explainer.py`, or `marimo edit explainer.py` to change it."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="compact", app_title="Gated Sparse Autoencoders")

with app.setup(hide_code=True):
    import difflib
    import html
    import inspect
    import itertools
    import math
    import re
    import warnings
    from functools import partial

    import altair as alt
    import marimo as mo
    import torch

    import gated_sae
    from results import claims, language, measure
    from results.measure import EVIDENCE, GREY, PALETTE, gradient
    from toy_data import SuperpositionData, random_directions


@app.cell(hide_code=True)
def title():
    everything = mo.ui.switch(label="show every answer and picture at once")
    _title = mo.md("""
    # Gated Sparse Autoencoders

    A language model packs more features into its activations than there are dimensions. A *sparse
    autoencoder* (SAE) tries to list them: it writes each activation vector $x$ as a sum of a few
    directions out of a large learned *dictionary*.

    The usual way to train one makes every term of that sum too small. A **Gated** SAE
    ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014)) mends this: it decides *which* directions
    to use apart from *how strongly*, and is charged for the first alone.

    This page shows why, how it works, what it buys, and what it does not. It takes about forty
    minutes, and you need PyTorch, not SAEs. Most pictures come *after* a question: an answer, right
    or wrong, brings picture and explanation. The code folded away is mostly that of
    `gated_sae.py`, whose sections 2 to 10 have the numbers of this page.
    """)
    _asked = mo.md("\n".join(f"1. {question} ({n})" for question, n, _ in questions()))
    mo.vstack(
        [style(), _title, mo.accordion({"What you will be able to answer": _asked}), everything]
    )
    return (everything,)


@app.cell(hide_code=True)
def world_gist(everything, n_features, steps):
    _n = word(n_features)
    _pairs = f"{word(n_features // 2)} pairs of opposites"
    _text = r"""
    ## 1 · Four features in the plane

    Suppose that activations had two dimensions, and that there were **four** things to say about
    them: four *features*, each with a direction of its own. Each activation vector is one *row*,
    $x$, of the data. A feature is rare, it occurs on one row in twenty, with a strength of about 1.
    Then $x$ is its strength times its direction, or the sum if several occur at once.

    Four directions in a plane cannot all be perpendicular; here they are SPREAD. This crowding is
    called *superposition*. It works because features are rare, and seldom meet.

    An SAE sees the rows and nothing else. It has four *latents*. Latent $i$ has a direction
    $d_i$ of length 1, and on each row a coefficient $f_i \ge 0$; it *fires* where $f_i > 0$. The
    $d_i$ are the rows of $W_\text{dec}$, the dictionary. The encoder computes the coefficients, the
    decoder adds the directions up to the *reconstruction* $\hat x$, which training,
    of weights $W$ and biases $b$ from a random start, brings close to $x$:

    $$\begin{aligned} f &= \mathrm{ReLU}\big((x - b_\text{dec})\,W_\text{enc} + b_\text{enc}\big) \\
    \hat x &= \textstyle\sum_i f_i\, d_i + b_\text{dec} \end{aligned}$$

    This small world, *Flatland*, comes along through the whole page.

    **Predict first.** A row has two numbers, and there are four directions. Can an SAE find them?
    - no, at most two | Were all features there at once, two numbers could not tell them apart. But
      nearly every row that is not empty shows one feature alone.
    * from most starts, not from all | Nearly all rows that are not empty lie on four rays. But from
      some random starts two latents turn to one ray, or one stays between two.
    - always | Nearly all rows that are not empty lie on four rays, so they *can* be found. But
      nothing stops two latents from turning to the same ray, and there they stay.
    """.replace("SPREAD", "evenly spread" if n_features % 2 else _pairs)
    _text = _text.replace("four", _n).replace("Four", _n.capitalize())
    ask_1 = ask(_text, everything)
    step = slider(0, steps=list(range(0, steps + 1, max(1, steps // 10))))
    start = mo.ui.dropdown([str(seed) for seed in range(12)], value="5")
    world_panel = controls({"training step": step, "start": start})
    mo.vstack([before(_text), ask_1])
    return ask_1, start, step, world_panel


@app.cell
def settings():
    torch.set_num_threads(1)  # models this small only wait for a second one
    n_features = 4  # of Flatland; try 5
    steps, live_steps = 200, 300  # of each training in the lesson: seconds
    strengths, dying_l1 = [0.4, 0.6, 0.8, 1.0, 1.2], [0.0, 0.001, 0.01, 0.1, 1.0]  # λ on offer
    return dying_l1, live_steps, n_features, steps, strengths


@app.cell
def world_training(n_features, steps):
    _l1, _starts = [0.8] * 12, range(12)  # λ is the subject of section 2
    _, first_history = learn(gated_sae.StandardSAE, n_features, _l1, _starts, steps)
    return (first_history,)


@app.cell(hide_code=True)
def world_picture(ask_1, first_history, n_features, start, step, world_panel):
    _member = int(start.value)
    _point = min(first_history, key=lambda point: abs(point["step"] - step.value))
    _W_dec, _last = _point["state"]["W_dec"][_member], first_history[-1]["state"]["W_dec"]
    picture(
        ask_1,
        world_panel,
        superposition_chart(_W_dec),
        f"Grey points: rows of x. Grey circles: the {word(n_features)} true directions. Orange "
        "lines: those that the SAE has learned so far. Drag the slider and watch them turn.",
        superposition_sentence(_point["step"], misses(_W_dec), misses(_last)),
        "more directions than dimensions can be told apart if few of them are used at a time. The "
        "whole difficulty is to make the SAE use few.",
        The_code_that_makes_such_worlds=source(SuperpositionData.sample),
    )
    return


@app.cell(hide_code=True)
def shrink_gist(everything):
    _text = r"""
    ## 2 · Why L1 shrinks

    Train for a close $\hat x$ alone, and each latent fires on half of all it sees. We want few. But
    a count has no gradient, so the standard SAE is charged for the *size* of its coefficients
    instead. That is the L1 penalty, and $\lambda$ is its weight. With $\mathbb E$ for the mean over
    rows, training lowers

    $$\mathbb E\,\lVert x - \hat x\rVert^2 \;+\; \lambda\; \mathbb E \sum_i f_i$$

    This charges in the wrong currency: what should cost is that a latent fires, not how strongly.

    **Predict first.** A feature is there with strength 2, and λ = 0.8. Which coefficient has the
    least loss?
    - 2.0 | That has no error, but pays in full. The first bit of shrinking costs next to nothing,
      for the error grows as its square, and saves at once.
    * 1.6 | At 2 - δ the error costs δ² and the penalty saves 0.8 δ: it pays until δ = λ/2 = 0.4.
    - 1.2 | That is off by λ. But the error δ² has the slope 2 δ, which meets the slope λ of the
      penalty at half of that.
    - 0 | That saves the whole penalty, 1.6, and costs an error of 4. Only what is weaker than λ/2
      goes to 0.
    """
    ask_2 = ask(_text, everything)
    l1_shrink = slider(0.8, 0.4, 1.2, 0.2)
    shrink_panel = controls({"penalty weight λ": l1_shrink})
    mo.vstack([before(_text), ask_2])
    return ask_2, l1_shrink, shrink_panel


@app.cell
def shrink_training(n_features, steps, strengths):
    _starts = [5] * len(strengths)
    standard, _ = learn(gated_sae.StandardSAE, n_features, strengths, _starts, steps)
    true, found_standard = lone_strengths(standard)
    return found_standard, true


@app.cell(hide_code=True)
def shrink_picture(ask_2, found_standard, l1_shrink, shrink_panel, strengths, true):
    _found = found_standard[:, at(strengths, l1_shrink)]
    picture(
        ask_2,
        shrink_panel,
        shrinkage_chart(true, _found, l1_shrink.value),
        "Each square is a row of Flatland with one feature: its true strength, and what a trained "
        "Standard SAE made of it. They lie on the closed form, below the dashed line of the truth.",
        shrinkage_sentence(l1_shrink.value, true, _found),
        "L1 shrinks because it charges for size where we only meant to charge for use. A little "
        "too small costs little error and saves at once, so every coefficient that survives comes "
        "out λ/2 too small, whatever its size.",
        Derivation=mo.md(r"""
        For one coefficient, with a unit direction and no other in the way, the loss is
        $(a - f)^2 + \lambda f$ over $f \ge 0$. Its derivative, $-2(a - f) + \lambda$, is zero at
        $f = a - \lambda/2$. Where that is negative the best $f$ is 0. So
        $f^* = \max(0,\, a - \lambda/2)$. Small coefficients go to zero, which is what the penalty
        is for. All others lose $\lambda/2$, which nobody asked for.
        """),
        The_code=source(gated_sae.shrink, gated_sae.StandardSAE, gated_sae.penalised_losses),
    )
    return


@app.cell(hide_code=True)
def gate_gist(everything):
    _text = r"""
    ## 3 · What gating separates

    The penalty is needed for one bit per latent: *does it fire?* So split the encoder in two paths.
    With $\mathbf 1[\cdot]$ for 1 where it holds, 0 where not, and $\odot$ for elementwise product,

    $$\begin{aligned} \pi_\text{gate} &= (x - b_\text{dec})\,W_\text{enc} + b_\text{gate} \\
    \pi_\text{mag} &= (x - b_\text{dec})\,W_\text{mag} + b_\text{mag} \\
    \tilde f &= \mathbf 1[\pi_\text{gate} > 0] \odot \mathrm{ReLU}(\pi_\text{mag}) \end{aligned}$$

    The first decides *which* latents fire. The second says *how strongly*. Only the first will be
    penalised. How to train such a thing is the subject of sections 4 and 5, and not obvious; look
    first at what it gives once it has been.

    **Predict first.** At λ = 0.8, how much of a feature's true strength will a latent of a Gated
    SAE give back, where it fires?
    - about 60%, like the Standard SAE | A Standard SAE has one path, which pays for its size. Here
      the path that says how strongly pays for nothing.
    * about 100% | Magnitudes answer to the reconstruction alone, and the best reconstruction is
      neither too long nor too short.
    - about 140% | Nothing would gain by that: magnitudes answer to the reconstruction alone, and
      too long is as wrong as too short.
    """
    ask_3 = ask(_text, everything)
    l1_gate = slider(0.8, 0.4, 1.2, 0.2)
    gate_panel = controls({"penalty weight λ": l1_gate})
    mo.vstack([before(_text), ask_3])
    return ask_3, gate_panel, l1_gate


@app.cell
def gate_training(n_features, steps, strengths):
    gated, _ = learn(gated_sae.GatedSAE, n_features, strengths, [5] * len(strengths), steps)
    _, found_gated = lone_strengths(gated)
    return found_gated, gated


@app.cell(hide_code=True)
def gate_picture(ask_3, found_gated, found_standard, gate_panel, l1_gate, strengths, true):
    _i = at(strengths, l1_gate)
    _found = {"Standard": found_standard[:, _i], "Gated": found_gated[:, _i]}
    picture(
        ask_3,
        gate_panel,
        histogram({"truth": true, **_found}, 3.0, "share of rows", 0.4),
        "How strong the features of Flatland are (dashed), and what two trained SAEs make of them. "
        "Standard's coefficients lie too far to the left, and more so with a larger λ; Gated's lie "
        "on the truth, but for the weakest, which it leaves at 0.",
        strengths_sentence(l1_gate.value, true, _found),
        "gating separates *which* from *how strongly*, because only *which* should cost something; "
        "magnitudes then answer to the reconstruction alone. (The same λ does not make the two "
        "kinds equally sparse; section 9 compares them fairly.)",
        The_code=source(gated_sae.gate),
    )
    return


@app.cell(hide_code=True)
def naive_gist(dying_l1, everything):
    _text = r"""
    ## 4 · What the obvious loss does to the gate

    Now train it. The obvious loss is that of section 2, with $\tilde f$ in the reconstruction and
    the gate in the penalty; there, $\mathrm{ReLU}(\pi_\text{gate})$ stands in for the switch
    $\mathbf 1[\pi_\text{gate} > 0]$.

    $$\mathbb E\,\lVert x - \hat x(\tilde f)\rVert^2 +
    \lambda\, \mathbb E \textstyle\sum_i \mathrm{ReLU}(\pi_\text{gate})_i$$

    It reads well.

    **Predict first.** How does L0, the mean number of latents that fire on a row, behave under this
    loss?
    - it settles where the two terms balance | It would, if the reconstruction could ask for an open
      gate. But it sees π_gate through the switch alone, and a switch is flat on either side: there
      is no gradient to ask with.
    * it falls to zero | The switch is flat on either side, so the reconstruction has no gradient to
      open a gate with. The penalty has one, and it always closes.
    - it grows | That would please the reconstruction, but it has no say: the switch is flat on
      either side and passes no gradient. The penalty's closes gates.
    """
    ask_4 = ask(_text, everything)
    l1_naive = slider(0.1, steps=dying_l1)
    naive_panel = controls({"penalty weight λ": l1_naive})
    mo.vstack([before(_text), ask_4])
    return ask_4, l1_naive, naive_panel


@app.cell
def naive_training(dying_l1, n_features, steps):
    _untied = partial(gated_sae.GatedSAE, tied=False, aux=None)
    _starts = [5] * len(dying_l1)
    _, naive_history = learn(_untied, n_features, dying_l1, _starts, steps, 1e-2)
    return (naive_history,)


@app.cell(hide_code=True)
def naive_picture(ask_4, dying_l1, l1_naive, n_features, naive_history, naive_panel):
    _i = at(dying_l1, l1_naive)
    _x = next(flatland(n_features).batches(2000, seed=1))
    _first = measure.sae_with(naive_history[0]["state"], tied=False, aux=None)
    _terms = _first.losses(_x)
    _hears = (_terms.reconstruct, _terms.sparsity)
    _hears = [gradient(_first, term.sum(), "b_gate")[_i].tolist() for term in _hears]
    picture(
        ask_4,
        naive_panel,
        gates_chart(naive_history, _i),
        "How often each latent fires while training in Flatland with the obvious loss. Dashed: how "
        "often each feature occurs. At λ = 0 hardly anything moves (W_mag is apart from W_enc "
        "here); at any other λ the gates close, and stay closed. (Adam takes steps of one length: "
        "a small λ is as fast as a large one.)",
        dying_sentence(l1_naive.value, *_hears, naive_history, _i),
        "the obvious loss kills the gate because a switch passes no gradient: the reconstruction "
        "cannot open a gate, and the penalty only ever closes it.",
        Derivation=mo.md(r"""
        For every latent,

        $$\begin{aligned} \partial\,\text{reconstruct} / \partial b_\text{gate} &= 0 \\
        \partial\,\text{sparsity} / \partial b_\text{gate} &=
        \mathbb E\,\mathbf 1[\pi_\text{gate} > 0] \ge 0 \end{aligned}$$

        Descent lowers $b_\text{gate}$ of each latent whose gate ever opens, and nothing raises it.
        $W_\text{enc}$ is in the same trap. The loss ends at the variance of $x$.
        """),
        The_code=source(gated_sae.incorrect_losses),
    )
    return


@app.cell(hide_code=True)
def aux_gist(everything):
    _text = r"""
    ## 5 · A reason to open

    The gate needs somebody to tell it which latents would help. So let
    $\mathrm{ReLU}(\pi_\text{gate})$ reconstruct $x$ *as well*, in a third term. With its penalty
    that is section 2 over again, shrinkage and all. But nobody reads these coefficients as
    magnitudes: of them, the gate uses the sign. (It misses what is weaker than $\lambda/2$.)

    $$\begin{aligned} & \mathbb E\,\lVert x - \hat x(\tilde f)\rVert^2 && L_\text{reconstruct} \\
    +\; & \lambda\, \mathbb E \textstyle\sum_i \mathrm{ReLU}(\pi_\text{gate})_i
    && \lambda\, L_\text{sparsity} \\
    +\; & \mathbb E\,\lVert x - \hat x_\text{frozen}(\mathrm{ReLU}(\pi_\text{gate}))\rVert^2
    && L_\text{aux} \end{aligned}$$

    The last decoder is a *frozen* copy, detached from the graph: the auxiliary task teaches the
    gate, and gives the dictionary no gradient.

    **Predict first.** If its decoder were not frozen, what would the auxiliary term ask of the
    dictionary?
    - nothing, the reconstruction already trains it | The two want different things: one decodes
      true magnitudes, the other coefficients that are too small by λ/2.
    * mostly longer directions | ReLU(π_gate) is too small by λ/2, and longer d_i would make up for
      it. But the d_i have length 1, so that part is taken out of every training step, and only what
      is across them can do harm.
    - to close the gates again | Gates are not the dictionary's to close, and L_aux wants them open:
      it pays for the error of a latent that stays shut.
    """
    ask_5 = ask(_text, everything)
    _choices = {"frozen decoder (the paper)": "frozen", "unfrozen": "unfrozen"}
    _choices |= {"no L_aux (section 4)": None}
    aux_choice = mo.ui.radio(_choices, value="frozen decoder (the paper)")
    aux_panel = controls({"auxiliary term": aux_choice})
    mo.vstack([before(_text), ask_5])
    return ask_5, aux_choice, aux_panel


@app.cell(hide_code=True)
def aux_picture(ask_5, aux_choice, aux_panel, gated, measured, n_features, strengths):
    _state = gated.state_dict().items()
    _sae = gated_sae.GatedSAE(2, n_features, aux=aux_choice.value)
    _sae.load_state_dict({name: value[strengths.index(0.8)] for name, value in _state})
    _flow = gradient_flow(_sae, next(flatland(n_features).batches(4000, seed=1)), 0.8)
    picture(
        ask_5,
        aux_panel,
        flow_table(_flow),
        "Length of the gradient of each term on each parameter of Flatland's Gated SAE, λ = 0.8, "
        "tied as in section 6: W_enc serves both paths, r_mag is a scale. Of W_dec, what is across "
        "the d_i, all that a training step keeps. A bold 0 is exact.",
        flow_sentence(_flow, aux_choice.value),
        "L_aux gives the gate somebody who pulls it open, and the two forces balance. "
        + freezing_sentence(measured["G6"]),
        What_the_third_term_is=mo.md("""
        The usual loss of f̃ with its binary gate penalised, plus the usual loss of ReLU(π_gate): the
        penalty on the binary gate has no gradient, and what is left are the three terms with an
        unfrozen decoder. So L_aux is no trick: it is a second SAE on the same weights.
        """),
        The_code=source(gated_sae.gated_losses),
    )
    return


@app.cell(hide_code=True)
def tied_gist(everything):
    _text = r"""
    ## 6 · Tied weights make a JumpReLU

    Two encoders cost twice. But the gate and the magnitude of a latent look for the same thing: let
    them share a direction, and differ in a scale $e^{r_\text{mag}}$ and an offset.

    $$\begin{aligned} z &= (x - b_\text{dec})\,W_\text{enc} \\
    \pi_\text{gate} &= z + b_\text{gate} \\
    \pi_\text{mag} &= e^{r_\text{mag}} \odot z + b_\text{mag} \end{aligned}$$

    Now both paths are functions of one number $z$, and "the gate is open" is a threshold on it. An
    activation that is zero up to a threshold $\theta$ and then jumps to the identity is called a
    *JumpReLU*:

    $$\begin{aligned} \tilde f &= \pi_\text{mag}\; \mathbf 1[\pi_\text{mag} > \max(\theta, 0)] \\
    \theta &= b_\text{mag} - e^{r_\text{mag}}\, b_\text{gate} \end{aligned}$$

    So a Gated SAE can be saved and run as the simpler thing once it is trained, and what is known
    of JumpReLUs (section 11) holds for it.

    **Predict first.** And if W_mag is not tied to W_enc: is a Gated SAE still a JumpReLU?
    - yes | Gate and magnitude then look along two directions. Two rows with the same π_mag can have
      one gate open and one shut, which no threshold on π_mag can do.
    - only at λ = 0 | λ is of training; what the SAE computes has none. Untied, two rows with one
      π_mag can have one gate open and one shut, at any λ.
    * no | Gate and magnitude then look along two directions. Two rows with the same π_mag can have
      one gate open and one shut, which no threshold on π_mag can do.
    """
    ask_6 = ask(_text, everything)
    opens_at = slider(0.6, -1.0, 1.5, 0.05)
    r_mag, b_mag = slider(0.2, -0.5, 0.5, 0.05), slider(0.1, -0.5, 0.5, 0.05)
    tied_panel = controls({"the gate opens at z =": opens_at, "r_mag": r_mag, "b_mag": b_mag})
    mo.vstack([before(_text), ask_6])
    return ask_6, b_mag, opens_at, r_mag, tied_panel


@app.cell(hide_code=True)
def tied_picture(ask_6, b_mag, opens_at, r_mag, tied_panel):
    _curves, _z, _theta, _same = one_latent(-opens_at.value, r_mag.value, b_mag.value)
    picture(
        ask_6,
        tied_panel,
        latent_chart(_curves, _z, opens_at.value),
        "One latent. Dotted: whether its gate is open, from the upright line on. Dashed: the "
        "magnitude. Solid: their product, the output. Move the gate to the right for a higher "
        "jump, to the left for none.",
        latent_sentence(-opens_at.value, _theta, _same),
        "a Gated SAE with tied weights is a JumpReLU SAE, exactly; untied it is not, for its gate "
        "looks along another direction. What differs in the paper that named JumpReLU SAEs "
        "(section 12) is how θ is trained. At θ ≤ 0 nothing jumps.",
        Derivation=mo.md(r"""
        $\pi_\text{gate} > 0$ says $z > -b_\text{gate}$. Multiply by $e^{r_\text{mag}} > 0$ and add
        $b_\text{mag}$: $\pi_\text{mag} > b_\text{mag} - e^{r_\text{mag}} b_\text{gate} = \theta$.
        The ReLU asks for $\pi_\text{mag} > 0$ besides.
        """),
        The_code=source(gated_sae.jump_relu, gated_sae.to_jumprelu),
    )
    return


@app.cell(hide_code=True)
def forty_gist():
    _gist = mo.md("""
    ### All of it in forty lines

    That is all: model, loss and training loop of a Gated SAE, in plain PyTorch. Choose an edit: it
    is made in the text below and run in Flatland, to show what the line is for. (In `marimo edit`,
    the cell below is yours to type in.) `gated_sae.py` is this, for stacks of SAEs, other variants
    and large data, with the same losses, gradients and steps.
    """)
    edit = mo.ui.dropdown([*edits()], value="as it is")
    mo.vstack([_gist, controls({"edit": edit})])
    return (edit,)


@app.function
def forty_lines(W_dec, batches, l1, lr):
    """Train a Gated SAE from W_dec (d_sae, d_in); yield losses. l1 is λ."""
    d_sae, d_in = W_dec.shape
    W_enc = W_dec.T.clone()
    b_dec, b_gate, b_mag, r_mag = map(torch.zeros, (d_in, d_sae, d_sae, d_sae))
    parameters = [W_dec, W_enc, b_dec, b_gate, b_mag, r_mag]
    optimizer = torch.optim.Adam([p.requires_grad_() for p in parameters], lr)

    for x in batches:
        # The model: of each latent, one direction, a gate and a magnitude
        z = (x - b_dec) @ W_enc
        pi_gate = z + b_gate
        pi_mag = r_mag.exp() * z + b_mag
        is_open = (pi_gate > 0).float()
        f = is_open * pi_mag.relu()
        x_hat = f @ W_dec + b_dec

        # The loss: what is kept, what the gate is charged, and what teaches it
        f_gate = pi_gate.relu()
        x_hat_gate = f_gate @ W_dec.detach() + b_dec.detach()
        reconstruct = (x - x_hat).square().sum(-1).mean()
        sparsity = f_gate.sum(-1).mean()
        aux = (x - x_hat_gate).square().sum(-1).mean()
        loss = reconstruct + l1 * sparsity + aux

        # A step along which the directions keep their length
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
            optimizer.step()
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
        yield parameters, (reconstruct, sparsity, aux)


@app.cell(hide_code=True)
def forty_picture(edit, n_features):
    _changes, _why = edits()[edit.value]
    _text, _code = edited(inspect.getsource(forty_lines), _changes)
    exec(_code, _scope := {"torch": torch})  # of the edits, none of what a visitor types
    _runs = {"as it is": forty_run(forty_lines, n_features)}
    if _changes:
        _runs[edit.value] = forty_run(_scope["forty_lines"], n_features)
    _table = measure.as_markdown([{"": name} | row for name, (row, _) in _runs.items()])
    picture(
        None,
        mo.md(f"{_text}\n\n{_table}"),
        errors_chart(_runs),
        f"Table: on fresh rows, {0.05 * n_features:g} features each, λ = 0.8: L0; FVU, the part of "
        "variance unexplained; the share of a lone feature's strength given back; by how much the "
        "worst direction is off. Picture: `reconstruct` while training, means of ten steps.",
        _why,
        How_training_starts=source(gated_sae.start),
    )
    return


@app.cell(hide_code=True)
def norms_gist(everything):
    _text = r"""
    ## 7 · What breaks when decoder norms are penalised

    So far every $d_i$ has length 1. It must, or the penalty could be dodged: twice the $d_i$, half
    the $f_i$, the same $\hat x$ at half the price. Many codebases drop the constraint and charge
    $\sum_i f_i \lVert d_i\rVert$ instead, which that trick does not change.

    For a Standard SAE this is fine. For a Gated SAE there are now *two* places where the decoder
    may be frozen: $L_\text{aux}$, and the norms in the penalty.

    **Predict first.** Freeze the decoder in L_aux, as the paper does, but let the norms in the
    penalty have their gradient. What happens to the norms?
    - they stay near 1 | Something would have to hold them. L_aux would mind if they shrank, but it
      is not heard: its decoder is frozen.
    * they shrink, many times over | A shorter d_i lowers the penalty. The reconstruction does not
      mind, exp(r_mag) makes up for it. L_aux would mind, but it is not heard.
    - they grow | Longer d_i cost more, and nobody needs them: exp(r_mag) makes up for any length.
      (Frozen in the penalty and live in L_aux it is the other way round.)
    """
    ask_7 = ask(_text, everything)
    norms_penalty = mo.ui.radio(["live", "frozen"], value="live", inline=True)
    norms_aux = mo.ui.radio(["frozen", "unfrozen"], value="frozen", inline=True)
    norms_panel = controls({"norms in the penalty": norms_penalty, "decoder in L_aux": norms_aux})
    mo.vstack([before(_text), ask_7])
    return ask_7, norms_aux, norms_panel, norms_penalty


@app.cell
def norms_training(n_features, steps):
    norms_history = {}
    with warnings.catch_warnings(action="ignore"):  # two of these fail, and are to be seen failing
        for _penalty, _aux in itertools.product(("live", "frozen"), ("frozen", "unfrozen")):
            _kind = partial(gated_sae.GatedSAE, penalty=f"norm_{_penalty}", aux=_aux)
            _, _history = learn(_kind, n_features, [0.8], [5], steps)
            norms_history[f"norms {_penalty}, aux {_aux}"] = _history
    return (norms_history,)


@app.cell(hide_code=True)
def norms_picture(ask_7, measured, norms_aux, norms_history, norms_panel, norms_penalty):
    _chosen = f"norms {norms_penalty.value}, aux {norms_aux.value}"
    _ratio = measured["A5"]["toy data"][f"L0 {_chosen} / Gated"]["mean"]
    _end = norms_history[_chosen][-1]
    picture(
        ask_7,
        norms_panel,
        norms_chart(norms_history, _chosen),
        "Mean length of the learned directions during training in Flatland, on a logarithmic "
        "scale; the thick line is the setting chosen. Frozen in both or in neither, the lengths "
        "stay; frozen in one only, they run away.",
        norms_sentence(_chosen, _end["norm"].item(), _end["step"], _ratio),
        "with a norm-weighted penalty, freeze the decoder in both L_aux and the penalty, or in "
        "neither. Frozen in L_aux alone, the norms collapse: shorter d_i are cheaper, exp(r_mag) "
        "makes up for them, and L_aux may not lengthen them. It finds its x̂ ever shorter, and "
        "pulls all gates up: they open on weak traces too. Frozen in the penalty alone, the norms "
        "swell: L_aux wants d_i longer, and length is free.",
        The_code=source(gated_sae.PENALTIES["norm_live"], gated_sae.PENALTIES["norm_frozen"]),
    )
    return


@app.cell(hide_code=True)
def gamma_gist(everything):
    _text = r"""
    ## 8 · What γ measures, and what it does not

    How much too short are reconstructions? Find the $g$ by which $\hat x$ should be divided to come
    closest to $x$. That is the *relative reconstruction bias*:

    $$\gamma = \arg\min_g\; \mathbb E\,\lVert \hat x / g - x\rVert^2
    = \frac{\mathbb E\,\lVert\hat x\rVert^2}{\mathbb E[\hat x \cdot x]}$$

    Below 1, $\hat x$ is too short, above 1 too long. At 1 it is unbiased, which is *not* to say it
    is good: it may still point elsewhere. And there is a second question, easily taken for the
    first: which multiple of $x$ is nearest to $\hat x$?

    **Predict first.** The nearest multiple of x̂ to x is p · x̂, and the nearest multiple of x to
    x̂ is q · x. Is q = 1/p?
    - always | So it is for numbers. But each is a projection on the line of the other: turn x̂
      until it is nearly perpendicular to x, and both are nearly 0.
    * only if x̂ and x lie on one line | Their product is the squared cosine of the angle between x̂
      and x, which is 1 only there. Nearly perpendicular, both are nearly 0.
    - only if γ = 1 | γ = 1 says p = 1. Then q is the squared cosine of the angle, and below 1
      unless x̂ = x.
    """
    ask_8 = ask(_text, everything)
    degrees, length = slider(60, 0, 85, 5), slider(0.5, 0.1, 1.2, 0.05)
    gamma_panel = controls({"angle of x̂ to x, degrees": degrees, "length of x̂": length})
    mo.vstack([before(_text), ask_8])
    return ask_8, degrees, gamma_panel, length


@app.cell(hide_code=True)
def gamma_picture(ask_8, degrees, gamma_panel, length):
    picture(
        ask_8,
        gamma_panel,
        two_vectors_chart(degrees.value, length.value),
        "x lies along the axis, x̂ at an angle to it. Open circles, each at the foot of a dashed "
        "perpendicular: the best multiple of x̂ on the line of x̂, the best multiple of x on the "
        "axis. On the grey circle γ = 1, inside it less, outside more.",
        two_vectors_sentence(degrees.value, two_vectors(degrees.value, length.value)),
        "γ measures whether reconstructions are too short or too long as a whole, and nothing "
        "else: not how good they are, nor whether each latent is right. The two best factors are "
        "no reciprocals, for each is a projection, and both shrink as the angle grows. So the norm "
        "ratio ‖x̂‖²/‖x‖² is below 1 for every unbiased SAE that is not perfect.",
        Derivation=mo.md(r"""
        $\mathbb E\lVert g' \hat x - x\rVert^2$ is a parabola in $g' = 1/g$, least at
        $\mathbb E[\hat x\cdot x] / \mathbb E\lVert\hat x\rVert^2$. The other factor is
        $\mathbb E[\hat x\cdot x] / \mathbb E\lVert x\rVert^2$. Their product is the squared cosine
        of two vectors as long as the whole data set; at $\gamma = 1$ the norm ratio equals it.
        (The first preprint had a formula that is right at $\gamma = 1$ only: for $\hat x = x/2$ it
        gave $1/\sqrt 3$.)
        """),
        The_code=source(gated_sae.Moments),
    )
    return


@app.cell(hide_code=True)
def frontier_gist(everything):
    _text = r"""
    ## 9 · What it buys: "half as many features"

    Comparing two SAEs at one $\lambda$ says nothing. Train each kind for many $\lambda$, and draw
    what it gets against what it pays: the *fraction of variance unexplained* (**FVU**) against
    **L0**, the latents that fire on a row. Further to the left and further down is better. "Half as
    many features" says that at equal FVU half as many latents *fire on a row*.

    Training a Gated SAE takes three products with a weight matrix a step (encoder, decoder, and
    L_aux's decoder), where a Standard one takes two. So a fair opponent is a Standard SAE **1.5
    times as wide**, at equal training compute.

    **Predict first.** A Standard SAE with 1.5 times the latents costs the same to train. Does it
    catch up?
    - yes | More latents explain more only if they may fire, and each that fires still pays for its
      size. Width does not mend that.
    - half of the way | The lead comes from how coefficients are charged, and 1.5 times as many are
      charged the same way.
    * no | Width does not mend how coefficients are charged. Here it even hurts, for there are no
      more features to find; in the language model of section 10 there are, and it gains a little.
    """
    ask_9 = ask(_text, everything)
    world_name = mo.ui.dropdown(measure.WORLDS, value="plain")
    beside = mo.ui.dropdown(["nothing else", *[*EVIDENCE][3:]], value="nothing else")
    frontier_panel = controls({"larger world": world_name, "beside them": beside})
    mo.vstack([before(_text), ask_9])
    return ask_9, beside, frontier_panel, world_name


@app.cell
def committed():
    claimed, runs, in_language = map(measure.read, ("claims", "runs", "language"))
    measured = {row["id"]: row["measured"] for row in claimed}
    spoken = means_in_language(in_language, measure.read("models"))
    return claimed, in_language, measured, runs, spoken


@app.cell(hide_code=True)
def frontier_picture(ask_9, beside, frontier_panel, runs, world_name):
    _names = [*[*EVIDENCE][:3], beside.value]
    _means = [r for r in measure.means_over_seeds(runs) if r["variant"] in _names]
    picture(
        ask_9,
        frontier_panel,
        frontier_chart([r for r in _means if r["data"] == world_name.value], 4),
        "128 features in 32 dimensions, 4 (dashed) on a row: independent (plain); of very unequal "
        "frequency and fond of company (Zipf, correlated); children that occur only with their "
        "parents (hierarchical). Each point is the mean of five SAEs of 128 latents, or 192.",
        frontier_sentence(runs, world_name.value, "Standard 1.5x", beside.value),
    )
    return


@app.cell(hide_code=True)
def why_gate(ask_9, in_language, runs):
    mo.stop(not ask_9.value)
    _gist = mo.md(r"""
    ### Then why gate at all?

    Choose other kinds beside them, above. They are other ways to the same end:

    - **rescale & shift** trains a Standard SAE, then learns a scale and a shift for each latent
      without penalty. It mends the magnitudes, and leaves *which* latents fire as it was.
    - **natural b_mag**: a Gated SAE whose θ is 0, so that nothing jumps.
    - **log penalty**: log(1 + f) in place of f, which spares large coefficients.
    - **soft cutoff**: a smooth step in place of the ReLU, with a learned threshold.
    - **JumpReLU**: no gate of its own, and θ trained on L0 itself (section 12).
    """)
    mo.vstack([_gist, mo.callout(mo.md(why_gate_sentence([*runs, *in_language])), kind="info")])
    return


@app.cell(hide_code=True)
def live_form(ask_9, live_steps):
    _gist = mo.md("""
    ### Train them yourself

    Five λ each, 40 features in 20 dimensions; for longer, if you like, or with another seed.
    """)
    _steps = slider(live_steps, 50, 1000, 50)
    _form = mo.md("training steps {steps} seed {seed}")
    _form = _form.batch(steps=_steps, seed=mo.ui.number(0, 999, value=0))
    live = _form.form(submit_button_label="Train", bordered=True)
    mo.vstack([_gist, live]) if ask_9.value else None
    return (live,)


@app.cell
def live_picture(ask_9, live, live_steps, runs):
    mo.stop(not ask_9.value)
    _asked = live.value or {"steps": live_steps, "seed": 0}
    _rows = live_runs(_asked["steps"], _asked["seed"])
    _truth = [row for row in claims.recovered(runs) if row["data"] == "plain"]
    _truth = [{key: row[key] for key in ("variant", "L0", "MCC", "F1")} for row in _truth]
    picture(
        None,
        None,
        frontier_chart(_rows, 2),
        "FVU against L0 of the SAEs just trained. Dashed: 2, the number of features that are there "
        "on a row.",
        live_sentence(_rows, _asked["seed"]),
        '"half as many features" means that half as many latents fire on a row, at equal '
        "reconstruction. It does not say that the dictionary is smaller, or truer.",
        How_much_of_the_truth_was_found=mo.md(
            "MCC: mean cosine of true and learned directions, matched one to one; F1: of latents "
            f"as detectors; in the plain world at FVU 0.2.\n\n{measure.as_markdown(_truth)}"
        ),
        The_code_of_a_step=source(gated_sae.step_on_unit_norm),
    )
    return


@app.cell(hide_code=True)
def real_gist():
    _gist = mo.md("""
    ## 10 · In a language model

    Toy data is made to be found. So here is a small transformer that reads Python's own help texts,
    byte by byte, and predicts the next byte. $x$ is what its MLP puts out at a byte; two SAEs, 512
    latents each, have learned to write it. Through either, about as much of the model's prediction
    is lost. Type any text: the model reads its first 128 bytes, and what you see is computed now.
    """)
    _text = (
        "Return a list of the keys. If a key is not found, a KeyError is raised by the function."
    )
    typed = mo.ui.text_area(_text, rows=3, debounce=400, full_width=True)
    mo.vstack([_gist, controls({"text": typed})])
    return (typed,)


@app.cell
def real_models():
    corpus, model, on_corpus, saes = kept_latents()
    return corpus, model, on_corpus, saes


@app.cell
def real_reading(model, on_corpus, saes, typed):
    ids = read_bytes(typed.value)
    x_typed = torch.cat([*gated_sae.harvest(model, model.mlp, [ids])])
    with torch.no_grad():
        on_text = {kind: sae.encode(x_typed) for kind, sae in saes.items()}
    _rates = 100 * (on_corpus["Gated"] > 0).float().mean(0)
    _top = (on_text["Gated"].sum(0) * (_rates < 5)).topk(8).indices.tolist()
    _named = {f"{i}, which fires on {_rates[i]:.1f}% of bytes": i for i in _top}
    latent = mo.ui.dropdown(_named, value=next(iter(_named)))
    controls({"one of Gated's rarer latents, those that fire most here": latent})
    return ids, latent, on_text, x_typed


@app.cell(hide_code=True)
def real_picture(corpus, ids, latent, model, on_corpus, on_text, saes):
    _pair = nearest_latents(saes, latent.value)
    _f = {kind: on_corpus[kind][:, i] for kind, i in _pair.items()}
    _cards = [latent_card(k, i, ids[0], on_text[k][:, i], corpus, _f[k]) for k, i in _pair.items()]
    picture(
        None,
        mo.vstack(_cards),
        histogram({kind: f[f > 0] for kind, f in _f.items()}, None, "share of such bytes"),
        "A latent of Gated, and the one of Standard whose direction is nearest: on your text "
        "(darker is stronger), where they fire most in a text that nobody has trained on, and "
        "here, how strongly, on those bytes of it where they fire.",
        latents_sentence(_pair, _f, saes, model),
    )
    return


@app.cell(hide_code=True)
def real_splice(ids, model, on_text, saes, x_typed):
    _gist = mo.md(r"""
    ### The splice, seen

    Put $\hat x$ in the place of $x$, and let the model go on. Each byte of your text is the darker
    the less the model expected it: as it is, through each SAE, and with zeros for $x$.
    """)
    _puts = {f"{kind}, L0 {(f > 0).sum() / len(f):.1f}": saes[kind] for kind, f in on_text.items()}
    _puts = {"as it is": x_typed[None], **_puts, "zeros": "zero"}
    _texts = spliced_texts(ids, byte_losses(model, ids, _puts))
    _keep = mo.md(
        "**Keep:** a latent is a direction and the places where it is used. Whether what it fires "
        "on is *one thing* is for you to judge, and easy to misjudge from its strongest places."
    )
    _folds = {"The model": source(language.LanguageModel)}
    _folds |= {"The code": source(gated_sae.harvest, gated_sae.splice)}
    mo.vstack([_gist, *_texts, _keep, mo.accordion(_folds, multiple=True)])
    return


@app.cell(hide_code=True)
def language_gist(everything):
    _text = """
    ### Does it hold where it counts?

    With reconstructions in place of the original, what counts is how well the model predicts text
    that neither has read: its cross-entropy (**CE**, mean loss in nats per byte).

    **Predict first.** In the larger worlds Gated needed half the latents or fewer at equal FVU.
    And here, at equal CE?
    * half or fewer | The lead holds downstream, if in a small model. At equal FVU it looks larger
      still: what counts for FVU is not quite what counts for the model.
    - about as many | It might have been: features of a real model need not be what the toy assumes.
      But the penalty shrinks here as it does there.
    - more | A gate that misses weak latents could cost the model dearly. It does not: what counts
      for FVU counts for the model as well, if not quite as much.
    """
    ask_10 = ask(_text, everything)
    mo.vstack([before(_text), ask_10])
    return (ask_10,)


@app.cell(hide_code=True)
def language_picture(ask_10, in_language, spoken):
    _ce = spoken["ce"]
    _levels = [(_ce[k], n) for k, n in (("clean", "as it is"), ("zero", "zeros"), ("mean", "mean"))]
    picture(
        ask_10,
        None,
        spliced_chart(spoken, "ce", "CE once spliced in, nats per byte", _levels),
        "Each point is an SAE with a λ of its own, spliced into the model, the mean of three "
        "models. Dashed: the model as it is, and with zeros or the mean in place of its MLP's "
        "output.",
        language_sentence(in_language),
    )
    return


@app.cell(hide_code=True)
def recovered_gist(everything):
    _text = r"""
    ### Loss recovered

    *Loss recovered* sets that CE on a scale: 1 is as good as $x$ itself, 0 as bad as *ablating*,
    which is putting zeros, or the mean of $x$, in its place.

    $$\frac{\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{SAE}}
    {\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{clean}}$$

    **Predict first.** Against which baseline do SAEs look better, and can the choice change which
    of two is ahead?
    * the one that breaks the model more; no | A worse baseline makes every SAE look better. But
      either score is a straight line in the SAE's own CE: the order stays.
    - the one that breaks the model more; yes | Better, yes. But either score is a straight line,
      falling in the SAE's own CE, so no order can change: that is algebra.
    - the one that breaks it less; no | The order stays. But the less a baseline breaks, the less
      there is to recover, and the same CE is a larger share of it lost.
    """
    ask_11 = ask(_text, everything)
    ablation = mo.ui.radio(["zero", "mean"], value="zero", inline=True)
    recovered_panel = controls({"ablated with": ablation})
    mo.vstack([before(_text), ask_11])
    return ablation, ask_11, recovered_panel


@app.cell(hide_code=True)
def recovered_picture(ablation, ask_11, recovered_panel, spoken):
    _key, _title = f"recovered_{ablation.value}", f"loss recovered, {ablation.value} ablation"
    _lowest = min(row[f"recovered_{a}"] for row in spoken["table"] for a in ("zero", "mean"))
    picture(
        ask_11,
        recovered_panel,
        spliced_chart(spoken, _key, _title, domain=[_lowest - 0.05, 1]),
        "Loss recovered by the same SAEs against the baseline you choose. Switch it: all points "
        "move, and none overtakes another.",
        recovered_sentence(spoken),
        "always ask which ablation a loss recovered is measured against: it moves every score, and "
        "never decides between two SAEs.",
        The_code=source(gated_sae.loss_recovered),
    )
    return


@app.cell(hide_code=True)
def jump_gist(everything):
    _text = r"""
    ## 11 · What attribution sees of a jump

    Which latents of an SAE matter to a model's output? Patching answers: change one, run the model,
    look. That takes a run per latent. *Attribution* answers for all at once, from gradients.
    *Integrated gradients* (IG) add the gradient up while the pre-activation $\pi_\text{mag}$ of a
    latent goes from 0 to $z$. For a continuous function they sum to the change of the output.

    A JumpReLU is not continuous. Apart from its jump it has the slopes of a ReLU shifted by
    $\theta$:

    $$\frac{d}{dz}\, z\,\mathbf 1[z > \theta] \;=\; \mathbf 1[z > \theta] \;=\;
    \frac{d}{dz}\, \mathrm{ReLU}(z - \theta)$$

    **Predict first.** θ = 0.5, and z goes from 0 to 1.5, so the JumpReLU goes from 0 to 1.5. What
    do integrated gradients attribute to it?
    - 0.5 | That is the jump, the very part they miss: a jump has no slope to add up.
    * 1.0 | The slope is 0 up to θ and 1 from there to 1.5: that adds up to 1.0. At the jump there
      is no slope to add.
    - 1.5 | So it would be for a continuous function, for which IG is complete. Here the slopes add
      up to 1.0, and the jump of 0.5 has none.
    """
    ask_12 = ask(_text, everything)
    theta, z_end = slider(0.5, 0.0, 1.5, 0.05), slider(1.5, 0.05, 2.0, 0.05)
    jump_panel = controls({"threshold θ": theta, "z": z_end})
    mo.vstack([before(_text), ask_12])
    return ask_12, jump_panel, theta, z_end


@app.cell(hide_code=True)
def jump_picture(ask_12, jump_panel, theta, z_end):
    picture(
        ask_12,
        jump_panel,
        jump_chart(theta.value, z_end.value),
        "Output of a JumpReLU and of the shifted ReLU along the path. Where both have left zero "
        "they are parallel: same slope, another height. A sum of slopes cannot tell one from the "
        "other.",
        jump_sentence(theta.value, z_end.value, jump_numbers(theta.value, z_end.value)),
        "attribution is made of gradients, and a jump has none. Added up on the way from 0, they "
        "miss exactly θ of each latent that crosses its threshold, in a JumpReLU SAE and so in a "
        "Gated one. Patch where it matters.",
        The_code=source(claims.integrated_gradients, claims.attribution_patching),
    )
    return


@app.cell(hide_code=True)
def next_gist(claimed):
    _gist = mo.md("""
    ## 12 · Where the field went next, and what toy data cannot show

    **JumpReLU SAEs** ([arXiv 2407.14435](https://arxiv.org/abs/2407.14435)), three months later and
    in part by the same people, keep the activation of section 6, drop the auxiliary task, and train
    θ on L0 itself, with an estimate of the gradient that the switch does not have. **TopK** SAEs
    ([2406.04093](https://arxiv.org/abs/2406.04093)) keep the k largest coefficients of each row:
    without a penalty there is nothing to shrink. **BatchTopK**
    ([2412.06410](https://arxiv.org/abs/2412.06410)) lets k vary from row to row, and runs as a
    JumpReLU once trained. SAELens, the library most used, marks Standard, TopK *and* Gated as
    "legacy architecture", and recommends BatchTopK or JumpReLU.

    What stays is the insight: *which* and *how strongly* are two questions, and what makes latents
    few should not make their coefficients small.

    **What toy data cannot show.** Here features exist, are known, and are straight lines. Whether a
    language model's are is the open question, and no toy answers it. Nor can toy data say whether
    latents can be *interpreted*, how large the gain is on a real model, whether the ranking of
    variants survives at scale, or what an SAE costs downstream. It can refute a mechanism, and
    check an identity. Where a measurement disagrees with the paper or its discussion, it may be the
    toy, or the small model, that is wrong.
    """)
    _claims = mo.callout(mo.md(claims_sentence(claimed)), kind="info")
    _places = itertools.product(("toy data", "language model"), ("disagrees", "agrees"))
    _lists = {f"{k}: {v}": mo.md(claims_list(claimed, k, v)) for k, v in _places}
    mo.vstack([_gist, _claims, mo.accordion(_lists, multiple=True)])
    return


@app.cell(hide_code=True)
def recap():
    _gist = mo.md("### Can you answer them now?\n\nSay each answer aloud before you unfold it.")
    _cards = {question: mo.md(said) for question, _, said in questions()}
    _next = mo.md("""
    **Where to go next.** Read `gated_sae.py`, the same story as code. Put activations of yours into
    the lines of the README. Change `n_features` in `marimo edit explainer.py` to 5, and look again.
    """)
    mo.vstack([_gist, mo.accordion(_cards, multiple=True), _next])
    return


# -- What the cells call: first the forms that all sections share ----------------------------------


@app.function
def questions():
    """What a reader can answer at the end: [(question, section, answer)]."""
    text = """
    - Why does an L1 penalty shrink? | 2 | It charges for size. A coefficient too small by δ costs
      an error of δ² and saves λδ, so it pays until δ = λ/2.
    - What does gating separate, and why? | 3 | Which latents fire from how strongly. Only the first
      should cost something, so magnitudes answer to the reconstruction alone.
    - What does the obvious loss do to the gate? | 4 | A switch passes no gradient, so nothing
      asks a gate to open. The penalty's gradient on b_gate is never negative: all close.
    - What does the auxiliary task do, and what its frozen decoder? | 5 | It pulls gates open,
      against the penalty. Not frozen, it would want longer d_i, in vain where norms are 1, and turn
      them a little towards what suits coefficients that are too small.
    - When is a Gated SAE the same thing as a JumpReLU SAE? | 6 | When W_mag is W_enc times
      exp(r_mag): gate and magnitude are functions of one z, and θ = b_mag - exp(r_mag) b_gate.
    - What breaks with penalties weighted by decoder norms? | 7 | With live norms and a frozen L_aux
      the d_i shrink: that is cheaper, exp(r_mag) makes up for it, and L_aux is not heard. With
      frozen norms and a live L_aux they swell. Freeze in both, or in neither.
    - What does γ measure, and what not? | 8 | By which factor reconstructions are too short (above
      1, too long) as a whole. Not how good they are, nor whether each latent is right.
    - Why are the two best scale factors not reciprocals? | 8 | Each is a projection on the other's
      line. Their product is the squared cosine of x and x̂, 1 only where they lie on one line.
    - What does "half as many features" mean? | 9 | At equal reconstruction, half as many latents
      fire on a row. The dictionary has the same size; how many features were found is not said.
    - What does attribution see of a jump? | 11 | Nothing: it is made of gradients, and a jump has
      none. Added up from 0 they give what a ReLU shifted by θ would have.
    - Where did the field go next, and what can toy data not show? | 12 | To JumpReLU (θ trained on
      L0), TopK and BatchTopK; Gated is legacy in SAELens. Toy data cannot show whether a model's
      features exist, are straight lines and can be interpreted, nor what scale changes.
    """
    return [items(item) for item in re.split(r"\n\s*(?=- )", text)[1:]]


@app.function
def items(item):
    """What stands between the bars of an item of a list."""
    return [" ".join(part.split()) for part in item[2:].split("|")]


@app.function
def before(text):
    """What a section says before its question."""
    return mo.md(text.partition("**Predict first.**")[0])


@app.function
def ask(text, everything):
    """The question at the end of a text, and its answers with what is to be said of each, the right
    one starred. Its value is that feedback; where everything is shown, it has one at once."""
    question, *options = re.split(r"\n\s*(?=[-*] )", text.partition("**Predict first.**")[2])
    options = [(option[0], *items(option)) for option in options]
    ((right, why),) = (rest for mark, *rest in options if mark == "*")
    said = {
        option: mo.callout(mo.md(f"**No: {right}.** {of}"), "warn") for _, option, of in options
    }
    said[right] = mo.callout(mo.md(f"**Right.** {why}"), "success")
    said["show me"] = mo.callout(mo.md(f"**The answer is: {right}.** {why}"), "info")
    first = "show me" if everything.value else None
    return mo.ui.radio(said, value=first, label="**Predict first.** " + " ".join(question.split()))


@app.function
def slider(value, *span, **steps):
    """From start to stop, or one of the given steps; pictures follow while it is dragged."""
    return mo.ui.slider(*span, value=value, show_value=True, **steps)


@app.function
def at(values, control):
    """Where in a list a control stands."""
    return min(range(len(values)), key=lambda i: abs(values[i] - control.value))


@app.function
def controls(named):
    """Controls with their names, for the eye and for screen readers."""
    group = '<div class="control" role="group" aria-label="{0}"><span>{0}</span>{1}</div>'
    return mo.Html("".join(group.format(name, control.text) for name, control in named.items()))


@app.function
def picture(asked, panel, chart, caption, sentence, keep="", **folds):
    """Once there is an answer: why it is right or wrong, controls, a chart, what to see in it, what
    it adds up to, what to keep, and what a first reading may leave folded."""
    if asked is not None and not asked.value:
        return mo.md("*A picture comes with your answer.*")
    if isinstance(chart, alt.TopLevelMixin):
        chart = chart.properties(description=caption)
    parts = [asked.value if asked is not None else None, panel, chart, mo.md(f"*{caption}*")]
    parts += [mo.callout(mo.md(sentence), kind="info"), keep and mo.md(f"**Keep:** {keep}")]
    folds = {title.replace("_", " "): content for title, content in folds.items()}
    return mo.vstack([*filter(None, parts), mo.accordion(folds, multiple=True)])


@app.function
def source(*things):
    """The code itself, as it stands."""
    return mo.md("\n".join(f"```python\n{inspect.getsource(thing)}```\n" for thing in things))


@app.function
def word(n):
    """A small number in words."""
    return dict(enumerate(("one", "two", "three", "four", "five", "six"), 1)).get(n, str(n))


@app.function
def style():
    """Lines of text that can be read, on any screen."""
    return mo.Html("""<style>
    .markdown .paragraph { display: block; max-width: 70ch; }
    .markdown :is(th, td) { padding: 0.2rem !important; font-size: 0.8rem; }
    .control { display: flex; flex-wrap: wrap; gap: 0.2rem 0.8rem; align-items: center; }
    .bytes { display: block; white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6; }
    </style>""")


@app.function
def panel(chart, height=260, width="container"):
    """As wide as the page allows; nothing but the curves catches the eye, on white or on black."""
    chart = chart.properties(width=width, height=height, background="transparent")
    chart.usermeta = {"embedOptions": {"actions": False}}
    return chart.configure_axis(gridOpacity=0.3)


@app.function
def axis(channel, title, ticks=6, **scale):
    """An axis of numbers: alt.X or alt.Y, and its scale."""
    field = "x" if channel is alt.X else "y"
    of = alt.Axis(values=ticks) if isinstance(ticks, list) else alt.Axis(tickCount=ticks)
    return channel(f"{field}:Q", title=title, axis=of, scale=alt.Scale(**scale))


@app.function
def rows_of(curves, x):
    """What `lines` draws: {name: numbers} over the numbers x."""
    pairs = ((name, zip(x, y, strict=True)) for name, y in curves.items())
    return [{"what": name, "x": float(a), "y": float(b)} for name, at in pairs for a, b in at]


@app.function
def lines(values, x, y, looks, dots=0, legend=True, **more):
    """Lines against two axes; looks: (colour, shape or dashes) of each, in their order.
    With dots of some size, the lines differ by the shape of these, and else by dashes."""
    names, (colours, forms) = list({row["what"]: 0 for row in values}), zip(*looks, strict=True)
    top = alt.Legend(title=None, orient="top", labelLimit=400, columns=len(names) % 4)
    legend = top if legend else None
    colour = alt.Color("what:N", scale=alt.Scale(domain=names, range=colours), legend=legend)
    form = alt.Shape if dots else alt.StrokeDash
    forms = form("what:N", scale=alt.Scale(domain=names, range=forms), legend=legend)
    point = alt.OverlayMarkDef(size=dots, filled=True) if dots else False
    chart = alt.Chart(alt.Data(values=values)).mark_line(clip=True, point=point)
    return chart.encode(x, y, colour, forms, **{"strokeWidth": alt.value(3)} | more)


@app.function
def points(named, *axes):
    """Points of the plane against two axes: (what, number, (x, y)) each."""
    values = [{"what": what, "k": k, "x": x, "y": y} for what, k, (x, y) in named]
    return alt.Chart(alt.Data(values=values)).encode(*axes)


@app.function
def rule(**at):
    """A dashed line across, at one x or y."""
    ((channel, value),) = at.items()
    chart = alt.Chart(alt.Data(values=[{"at": value}])).mark_rule(color=GREY, strokeDash=[4, 4])
    return chart.encode(**{channel: "at:Q"})


@app.function
def histogram(found, top, title, most=None):
    """Which share of some numbers lies where. found: {name: numbers from 0 to top}."""
    top = top or max((float(v.max()) * 1.05 for v in found.values() if len(v)), default=1.0)
    edges = [k * top / 20 for k in range(21)]
    shares = {k: torch.histc(v, 20, 0.0, top) / max(1, len(v)) for k, v in found.items()}
    values = rows_of({name: [*share, 0.0] for name, share in shares.items()}, edges)
    dash = alt.Scale(domain=[*found], range=[[5, 3] if n == "truth" else [1, 0] for n in found])
    scale, legend = measure.colours(*found), alt.Legend(title=None, orient="top")
    y = alt.Y("y:Q", title=title, axis=alt.Axis(format="%"))
    y.scale = alt.Scale(domain=[0, most]) if most else alt.Scale()
    chart = alt.Chart(alt.Data(values=values)).mark_line(interpolate="step-after", strokeWidth=2.5)
    colour = alt.Color("what:N", scale=scale, legend=legend)
    form = alt.StrokeDash("what:N", scale=dash, legend=legend)
    return panel(chart.encode(axis(alt.X, "strength, or coefficient"), y, colour, form))


# -- Flatland: sections 1 to 7 ---------------------------------------------------------------------


@app.function
def flatland(n):
    """n features in the plane, evenly spread; each occurs on one row in twenty, at about 1."""
    angle = torch.arange(n) * (2 * math.pi / n) + math.pi / 8
    directions = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return SuperpositionData(2, n, dictionary=directions, firing=0.05, magnitude="log_normal")


@app.function
def learn(kind, n, l1, starts, steps, lr=6e-2):
    """A stack of SAEs in Flatland, one for each λ and start: (the stack, what it was on the way).

    A start is a seed: the same seed is the same first dictionary, whatever the kind.
    """
    sae = kind(2, n, stack=(len(starts),))
    first = [random_directions(n, 2, torch.Generator().manual_seed(seed)) for seed in starts]
    with torch.no_grad():
        sae.W_dec.copy_(torch.stack(first))
        sae.W_enc.copy_(sae.W_dec.mT)  # not a tenth of it: d_sae / (2 d_in) is about 1 here
        if not getattr(sae, "tied", True):
            sae.W_mag.copy_(sae.W_enc)
    data, history = flatland(n), []
    held_out = next(data.batches(2000, seed=1))
    gated_sae.start(sae, held_out)  # as step 1 would, so that step 0 shows it
    schedule = {"steps": steps, "lr": lr, "log_every": max(1, steps // 20), "device": "cpu"}
    schedule |= {"resample_every": None}  # what dies is to be seen dead
    records = gated_sae.train(sae, data.batches(256, seed=0), l1=torch.tensor(l1), **schedule)
    for step in itertools.chain([0], (record.step for record in records if record.step > 1)):
        with torch.no_grad():
            rates = (sae.encode(held_out) > 0).float().mean(-2)  # of each latent
        state = {name: value.clone() for name, value in sae.state_dict().items()}
        norm = state["W_dec"].norm(dim=-1).mean(-1)
        history.append({"step": step, "rates": rates, "norm": norm, "state": state})
    return sae, history


@app.function
def misses(W_dec):
    """Degrees between each of the true directions and the learned one nearest to it."""
    true = flatland(W_dec.shape[-2]).dictionary
    cosines = torch.nn.functional.normalize(W_dec, dim=-1) @ true.T
    return cosines.max(-2).values.clamp(-1, 1).arccos().rad2deg()


@app.function
def superposition_chart(W_dec):
    """The plane: rows x, the true directions, the learned ones."""
    data = flatland(len(W_dec))
    x, _ = data.sample(2500, torch.Generator().manual_seed(2))
    span = {"domain": [-2.2, 2.2]}
    axes = axis(alt.X, "first dimension of x", **span), axis(alt.Y, "second dimension of x", **span)
    rows = [("x", 0, row) for row in x[x.abs().sum(-1) > 0].tolist()]
    true = [("true direction", i, end) for i, end in enumerate(data.dictionary.tolist())]
    learned = [("learned direction", i, end) for i, end in enumerate(W_dec.tolist())]
    spokes = [(what, i, at) for what, i, end in learned for at in ((0, 0), end)]
    scale = alt.Scale(domain=[true[0][0], learned[0][0]], range=[GREY, PALETTE["Standard"][0]])
    colour = alt.Color("what:N", scale=scale, legend=alt.Legend(title=None, orient="top"))
    ends = points(true + learned, *axes).mark_point(size=130, strokeWidth=3, opacity=1)
    chart = alt.layer(
        points(rows, *axes).mark_circle(size=12, opacity=0.35, color=GREY, clip=True),
        points(spokes, *axes).mark_line(strokeWidth=4).encode(colour, detail="k:N"),
        ends.encode(colour),
    )
    return panel(chart, 290, 290)


@app.function
def superposition_sentence(step, degrees, at_end):
    """How far each true direction is from the nearest learned one: now, and of each start."""
    n, found = word(len(degrees)), (at_end.amax(-1) < 10).tolist()
    lost = ", ".join(str(start) for start, good in enumerate(found) if not good)
    return (
        f"After **{step}** training steps, the {n} true directions are {degrees.min():.0f}° to "
        f"{degrees.max():.0f}° away from the nearest learned one. At the end, **{sum(found)} of "
        f"{len(found)}** starts have found all {n} to within 10°{f' (not {lost})' if lost else ''}."
    )


@app.function
def lone_strengths(sae, rows=20_000):
    """Flatland's rows with one feature only: (true strength, coefficient of the latent that points
    its way: one column for each SAE of a stack)."""
    data = flatland(sae.d_sae)
    x, f = data.sample(rows, torch.Generator().manual_seed(3))
    alone = (f > 0).sum(-1) == 1
    x, true, feature = x[alone], f[alone].max(-1).values, f[alone].argmax(-1)
    with torch.no_grad():
        latent = (sae.W_dec @ data.dictionary.T).argmax(-2)  # (stack, n): the best for each feature
        found = sae.encode(x).gather(-1, latent[:, feature].unsqueeze(-1)).squeeze(-1)
    return true, found.T


@app.function
def shrinkage_chart(true, found, l1):
    """Coefficients against true strengths, and the closed form."""
    ends, orange = torch.tensor([0.0, l1 / 2, 3.0]), PALETTE["Standard"][0]
    x = axis(alt.X, "a: true strength", domain=[0, 3])
    y = axis(alt.Y, "f: coefficient", domain=[0, 3])
    curves = {"no shrinkage": ends, "max(0, a - λ/2)": gated_sae.shrink(ends, l1)}
    looks = [(GREY, [6, 4]), (orange, [1, 0])]
    squares = alt.Chart(alt.Data(values=rows_of({"f": found[:150]}, true[:150])))
    squares = squares.mark_point(shape="square", size=70, color=orange, clip=True).encode(x, y)
    return panel(squares + lines(rows_of(curves, ends), x, y, looks), 300)


@app.function
def shrinkage_sentence(l1, true, found):
    """The closed form, and how far a trained SAE is from it."""
    off = (found - gated_sae.shrink(true, l1)).abs().mean().item()
    lost = (true - found)[found > 0].mean().item()
    return (
        f"With λ = {l1:.1f}, the closed form takes λ/2 = **{l1 / 2:.2f}** off every coefficient "
        f"that survives. The trained SAE took **{lost:.2f}** off those that did, and lies "
        f"{off:.3f} from the closed form on average."
    )


@app.function
def strengths_sentence(l1, true, found):
    on = {kind: f > 0 for kind, f in found.items()}
    shares = {kind: (f.sum() / true[on[kind]].sum()).item() for kind, f in found.items()}
    given = " and ".join(f"**{kind} {100 * share:.0f}%**" for kind, share in shares.items())
    fires = " and ".join(f"{100 * f.float().mean():.0f}% ({kind})" for kind, f in on.items())
    return (
        f"At λ = {l1:.1f}, on rows with one feature, the latent that points its way fires on "
        f"{fires} of them; where it does, {given} of the true strength come back."
    )


@app.function
def gates_chart(history, i):
    """The share of rows on which each latent of SAE i fires, over training."""
    n, steps = history[0]["rates"].shape[-1], [point["step"] for point in history]
    of = {f"latent {k + 1}": [point["rates"][i, k] for point in history] for k in range(n)}
    y = axis(alt.Y, "share of rows on which it fires", domain=[0, 0.06], clamp=True)
    looks = [(PALETTE["Gated"][0], [1, 0])] * n
    drawn = lines(rows_of(of, steps), axis(alt.X, "training step"), y, looks, legend=False)
    return panel(rule(y=0.05) + drawn)


@app.function
def dying_sentence(l1, reconstruct, sparsity, history, i):
    """Gradients on b_gate of two terms, one number a latent, and what the gates of SAE i did."""
    first, last = (history[k]["rates"][i].sum().item() for k in (0, -1))
    heard = (
        f"Before training, the reconstruction's gradient on the {word(len(sparsity))} gate biases "
        f"is **{max(abs(g) for g in reconstruct):.0f}, exactly**; the penalty's is λ times "
        f"{min(sparsity):.2g} to {max(sparsity):.2g}, never negative. "
    )
    if l1 == 0:
        return f"{heard}At λ = 0 nobody pushes, and L0 is {first:.2f} before and {last:.2f} after."
    return f"{heard}At λ = {l1:g}, L0 falls from {first:.2f} to **{last:.2f}**."


@app.function
def gradient_flow(sae, x, l1):
    """‖∂ term / ∂ parameter‖ for each term of the loss and each parameter; of W_dec what is across
    the d_i, and ("along", term) the rest."""
    reconstruct, sparsity, aux = sae.losses(x)
    terms = {"L_reconstruct": reconstruct, "λ L_sparsity": l1 * sparsity, "L_aux": aux}
    names, flow, d = ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"), {}, sae.W_dec.detach()
    for (term, value), name in itertools.product(terms.items(), names):
        grad = gradient(sae, value, name) if value.requires_grad else torch.zeros(())
        if name == "W_dec":
            along = (grad * d).sum(-1, keepdim=True) * d
            flow["along", term], grad = along.norm().item(), grad - along
        flow[term, name] = grad.norm().item()
    return flow


@app.function
def flow_table(flow):
    """Which term of the loss reaches which parameter, and how strongly."""
    terms, names = (list(dict.fromkeys(key[k] for key in flow if "L_" in key[0])) for k in (0, 1))
    cells = [{n: f"{flow[t, n]:.1g}" if flow[t, n] else "**0**" for n in names} for t in terms]
    rows = [{"": term} | row for term, row in zip(terms, cells, strict=True)]
    return mo.md(measure.as_markdown(rows))


@app.function
def flow_sentence(flow, aux):
    """From a table of `gradient_flow`, by what L_aux is."""
    said = f"On b_gate the penalty pushes with **{flow['λ L_sparsity', 'b_gate']:.2g}** and "
    if aux is None:
        return (
            f"{said}nobody pulls back. (This SAE had L_aux until now. Its gates would now close.)"
        )
    said += f"L_aux pulls back with **{flow['L_aux', 'b_gate']:.2g}**: a balance. "
    if aux == "frozen":
        return f"{said}On W_dec L_aux has **{flow['L_aux', 'W_dec']:.0f}**, exactly."
    return (
        f"{said}It would turn the d_i with **{flow['L_aux', 'W_dec']:.2g}**, where the "
        f"reconstruction, nearly content, turns them with {flow['L_reconstruct', 'W_dec']:.2g}. "
        f"Along them it pushes with {flow['along', 'L_aux']:.2g}, for nothing."
    )


@app.function
def freezing_sentence(measured):
    """What freezing the decoder in L_aux does, from claim G6."""
    toy, real = measured["toy data"], measured["language model"]
    along = toy["of L_aux's gradient on W_dec, along the d_i, aux unfrozen"]["mean"]
    across = toy["across them, in the reconstruction's, aux unfrozen"]["mean"]
    ratios = [claims.shortly(of["L0 aux unfrozen / Gated"]) for of in (toy, real)]
    return (
        f"Not frozen, it would ask for longer d_i above all ({100 * along:.0f}% of its length, in "
        "the plain world of section 9), and in vain, as norms are 1. What is across them turns the "
        f"d_i, {across:.2f} times as hard as the reconstruction does, and costs latents: "
        f"{ratios[0]} times as many at equal FVU there, {ratios[1]} times in section 10's model."
    )


@app.function
def edits():
    """What can be done to the forty lines: {name: ([(old, new)], what it shows)}."""
    project = "            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec\n"
    move, switch = "            optimizer.step()\n", "(pi_gate > 0).float()"
    through = f"{switch} + pi_gate - pi_gate.detach()"
    changes = {
        "as it is": [],
        "delete .detach()": [(".detach()", "")],
        "drop L_aux": [(" + aux", "")],
        "straight through, no L_aux": [(switch, through), (" + aux", "")],
        "mean for sum": [(".square().sum(-1).mean()", ".square().mean()")],
        "step before projection": [(project + move, move + project)],
        "encoder ten times too long": [("W_dec.T.clone()", "10 * W_dec.T")],
    }
    why = [
        "Nearly all of the strength comes back, and L0 is nearly the truth.",
        "The dictionary hears L_aux (section 5). In the plane that shows little; in larger worlds "
        "and in a language model it costs latents.",
        "Section 4: nobody asks for an open gate, so they all close, and nothing is left.",
        "A made-up gradient for the switch, as if it were the identity: the gate hears the "
        "reconstruction, but at every π_gate, near the switch or far from it.",
        "Errors are averaged over d_in = 2 dimensions, so the same λ weighs twice as much. With "
        "d_in = 4096 it would weigh 4096 times as much.",
        "Projected when it has been used, the gradient still moves the lengths. They are brought "
        "back to 1, so it hardly shows here; but Adam's averages hear of what is never kept.",
        "Reconstructions begin ten times too long, and training has to undo it. A wide SAE begins "
        "so by itself: with W_enc = W_decᵀ and half of its gates open, x̂ is d_sae / (2 d_in) times "
        "x: 1 here, often 16. So `gated_sae.py` starts W_enc a tenth as long.",
    ]
    return dict(zip(changes, zip(changes.values(), why, strict=True), strict=True))


@app.function
def edited(code, changes):
    """(as shown, as run): the text with some of it replaced, and its changed lines marked."""
    code = code[code.index("def ") :]
    new = code
    for old, by in changes:
        new = new.replace(old, by)
    marked = difflib.ndiff(code.splitlines(), new.splitlines())
    marked = [line for line in marked if line[0] != "?"] if changes else new.splitlines()
    return f"```{'diff' if changes else 'python'}\n" + "\n".join(marked) + "\n```", new


@app.function
def forty_run(forty_lines, n, steps=400):
    """What forty lines, as they are or edited, make of Flatland, and their errors on the way."""
    first = random_directions(n, 2, torch.Generator().manual_seed(5))
    batches = itertools.islice(flatland(n).batches(256, seed=0), steps)
    way = [(p, losses[0].item()) for p, losses in forty_lines(first, batches, 0.8, 3e-2)]
    names = "W_dec", "W_enc", "b_dec", "b_gate", "b_mag", "r_mag"
    state = {name: p.detach() for name, p in zip(names, way[-1][0], strict=True)}
    sae = measure.sae_with(state)
    m = gated_sae.evaluate(sae, [next(flatland(n).batches(20_000, seed=1))])
    true, found = lone_strengths(measure.sae_with({k: v[None] for k, v in state.items()}))
    on = found[:, 0] > 0
    back = f"{100 * found[on, 0].sum() / true[on].sum():.0f}%" if on.any() else "-"
    off = misses(state["W_dec"]).max()
    row = {"L0": f"{m.l0:.2f}", "FVU": f"{m.fvu:.3f}", "given back": back, "off by": f"{off:.1f}°"}
    return row, [error for _, error in way]


@app.function
def errors_chart(runs):
    """Errors over training, ten steps at a time: as it is, and edited."""
    of = {name: torch.tensor(errors).view(-1, 10).mean(-1) for name, (_, errors) in runs.items()}
    steps = range(5, 10 * len(of["as it is"]), 10)
    looks = [(GREY, [6, 4]), (PALETTE["Gated"][0], [1, 0])][: len(of)]
    axes = axis(alt.X, "training step"), axis(alt.Y, "reconstruct", type="log")
    return panel(lines(rows_of(of, steps), *axes, looks), 200)


@app.function
def one_latent(b_gate, r_mag, b_mag):
    """Gate, magnitude and output of one latent over its pre-activation z, and its threshold."""
    ends = [-1.5, -b_mag / math.exp(r_mag), -b_gate, -b_gate + 1e-9, 2.0]  # it bends only there
    z = torch.tensor(sorted(ends), dtype=torch.float64)
    pi_gate, pi_mag = z + b_gate, math.exp(r_mag) * z + b_mag
    theta = torch.tensor([b_mag - math.exp(r_mag) * b_gate], dtype=torch.float64)
    f = gated_sae.gate(pi_gate, pi_mag)
    curves = {"open gate": (pi_gate > 0).double(), "ReLU(π_mag)": pi_mag.relu(), "output f̃": f}
    many = torch.linspace(-1.5, 2.0, 1000, dtype=torch.float64)[:, None]
    pi_gate, pi_mag = many + b_gate, math.exp(r_mag) * many + b_mag
    same = (gated_sae.gate(pi_gate, pi_mag) - gated_sae.jump_relu(pi_mag, theta)).abs().max().item()
    return curves, z, theta.item(), same


@app.function
def latent_chart(curves, z, opens_at):
    looks = [(GREY, [2, 3]), ("#56b4e9", [8, 4]), (PALETTE["Gated"][0], [1, 0])]
    x = axis(alt.X, "z = (x - b_dec) W_enc", 7, domain=[-1.5, 2])
    curves = lines(rows_of(curves, z), x, axis(alt.Y, None, domain=[0, 4]), looks)
    return panel(rule(x=opens_at) + curves)


@app.function
def latent_sentence(b_gate, theta, same):
    if theta > 1e-9:
        jump = f"there the output jumps from 0 to **{theta:.2f}**"
    elif theta < -1e-9:
        jump = "but π_mag is still negative there, so nothing jumps: a ReLU, shifted"
    else:
        jump = "there π_mag is just 0, so nothing jumps: a plain ReLU of the gate, rescaled"
    return (
        f"The gate opens at z = {-b_gate:.2f}; {jump}. Its threshold on π_mag is "
        f"θ = {theta:.2f}, and `jump_relu(π_mag, θ)` differs from the gated output by at most "
        f"**{f'{same:.0e}' if same else 0}**, at 1000 values of z."
    )


@app.function
def norms_chart(histories, chosen):
    """Mean length of the d_i over training, a line for each setting."""
    steps = [point["step"] for point in histories[chosen]]
    of = {name: [point["norm"][0] for point in history] for name, history in histories.items()}
    looks = [(PALETTE["Gated"][0] if name == chosen else GREY, "circle") for name in of]
    y = axis(alt.Y, "mean length of d_i", [0.05, 0.1, 0.2, 0.5, 1, 2, 5], type="log")
    thick = alt.condition(f"datum.what == '{chosen}'", alt.value(4), alt.value(2))
    x = axis(alt.X, "training step")
    chart = lines(rows_of(of, steps), x, y, looks, 30, legend=False, strokeWidth=thick)
    for name, (*_, end) in of.items():
        text = points([(name, 0, (steps[-1], float(end)))], x, y).encode(text="what:N")
        chart += text.mark_text(align="right", dy=14 if end < 1 else -12, color=GREY)
    return panel(chart, 300)


@app.function
def norms_sentence(setting, norm, steps, ratio):
    """Flatland's mean norm after training, and in a larger world L0 over Gated's."""
    kept = "stayed near 1" if 0.7 < norm < 1.4 else "**collapsed**" if norm < 0.7 else "**swelled**"
    return (
        f"{setting[0].upper()}{setting[1:]}: after {steps} steps the norms, 1 at first, are "
        f"{norm:.2g} on average: they {kept}. In a larger world (section 9) it needs "
        f"**{ratio:.2f} times** the active latents of a Gated SAE with unit norms."
    )


# -- Larger worlds, two vectors, a jump, and a language model: sections 8 to 12 --------------------


@app.function
def two_vectors(degrees, length):
    """Moments of x = (1, 0) and an x̂ at an angle to it."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angle = math.radians(degrees)
    x_hat = length * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    return gated_sae.moments(x, x_hat)


@app.function
def two_vectors_chart(degrees, length):
    """x, x̂, the two best multiples, and the circle γ = 1."""

    def polar(turn, length):
        return length * math.cos(turn), length * math.sin(turn)

    axes = axis(alt.X, None, 4, domain=[-0.1, 1.3]), axis(alt.Y, None, 4, domain=[-0.2, 1.2])
    m, angle, zero = two_vectors(degrees, length), math.radians(degrees), (0.0, 0.0)
    tip, one = polar(angle, length), (1.0, 0.0)
    on_x_hat, on_x = polar(angle, length * m.factor_on_x_hat.item()), (m.factor_on_x.item(), 0.0)
    turns = [math.pi * k / 120 for k in range(61)]
    circle = points([("γ = 1", t, polar(t, math.cos(t))) for t in turns], *axes)
    drops = points([("a", 0, one), ("a", 1, on_x_hat), ("b", 0, tip), ("b", 1, on_x)], *axes)
    arrows = points([("x", 0, zero), ("x", 1, one), ("x̂", 0, zero), ("x̂", 1, tip)], *axes)
    feet = points([("best multiple of x̂", 0, on_x_hat), ("best multiple of x", 0, on_x)], *axes)
    green, faint = "#009e73", alt.condition("datum.what == 'x'", alt.value(0.45), alt.value(1))
    names = arrows.transform_filter("datum.k").mark_text(dx=12, dy=-10, fontSize=16, color=green)
    arrows = arrows.mark_line(strokeWidth=4, color=green)
    feet = feet.mark_point(size=80, color=GREY, filled=False, strokeWidth=2)
    chart = alt.layer(
        circle.mark_line(color=GREY).encode(order="k:Q"),
        drops.mark_line(color=GREY, strokeDash=[4, 3]).encode(detail="what:N", order="k:Q"),
        arrows.encode(detail="what:N", order="k:Q", opacity=faint),
        names.encode(text="what:N"),
        feet.encode(tooltip="what:N"),
    )
    return panel(chart, 300, 300)


@app.function
def two_vectors_sentence(degrees, m):
    long = " x̂ is too long, even if shorter than x: along its line, x does not reach far."
    product = f"their product, **{m.cosine_squared:.2f}**, is the squared cosine of {degrees}°"
    return (
        f"γ = **{m.gamma:.2f}**, so {m.factor_on_x_hat:.2f} x̂ is the best multiple of x̂ (1/γ)."
        f"{long if m.gamma > 1.005 else ''} The best multiple of x is {m.factor_on_x:.2f} x. The "
        f"two are {'reciprocal' if degrees == 0 else 'not reciprocal'}: {product}. The norm ratio "
        f"‖x̂‖²/‖x‖² is {m.norm_ratio:.2f}."
    )


@app.function
def frontier_chart(rows, true_l0):
    """FVU against L0, both logarithmic: a line, a colour and a shape for each variant."""
    rows = [row for row in rows if row["l0"] > 0.3]
    chart = measure.curves(rows, "fvu", "FVU: variance unexplained", legend="bottom")
    tips = [alt.Tooltip(f"{key}:Q", format=".3g") for key in ("l1", "l0", "fvu", "gamma")]
    chart = rule(x=true_l0) + chart.encode(tooltip=["variant:N", *tips])
    return panel(chart, 320).configure_legend(columns=2)


@app.function
def over_gated(rows, variant, data, by="fvu"):
    """L0 of a variant over that of Gated, mean over seeds; NaN where they cannot be compared."""
    return measure.spread(measure.l0_ratios(rows, variant, "Gated", data, by))["mean"]


@app.function
def half_sentence(rows, world_name):
    """What "half as many features" comes to."""
    gamma = [torch.tensor(measure.means(rows, k, world_name)).mean() for k in ("Standard", "Gated")]
    times = over_gated(rows, "Standard", world_name)
    return (
        f"At equal FVU, a Standard SAE has **{times:.1f} times** as many latents firing on a row "
        f"as a Gated one. γ is {gamma[0]:.2f} for Standard and **{gamma[1]:.2f}** for Gated"
    )


@app.function
def frontier_sentence(rows, world_name, *others):
    """The same, and of others beside them."""
    over = {v: over_gated(rows, v, world_name) for v in others if v in EVIDENCE}
    shown = {v: "cannot be compared" if math.isnan(n) else f"**{n:.2f}**" for v, n in over.items()}
    said = (f"{v}: {n}" for v, n in shown.items())
    return f"{half_sentence(rows, world_name)}. Times Gated's L0: {'; '.join(said)}."


@app.function
def why_gate_sentence(rows):
    """How near the others come."""
    said = []
    for variant in ("rescale & shift", "JumpReLU"):
        toy = sorted(over_gated(rows, variant, name) for name in measure.WORLDS)
        real = over_gated(rows, variant, "language model", "lost")
        said.append(
            f"**{variant}** has {toy[0]:.2f} to {toy[-1]:.2f} times Gated's L0 at equal FVU on the "
            f"three worlds, and {real:.2f} times in the model of section 10, at equal prediction"
        )
    return (
        f"{said[0]}: a repair afterwards mends magnitudes, but latents have been chosen under a "
        f"penalty on size. {said[1]}: θ can move by one learning rate a step. So gate, *or* train "
        "a threshold on L0: either keeps the penalty off the magnitudes while latents are chosen. "
        "JumpReLU needs a made-up gradient for its switch, and time; Gated a third term instead."
    )


@app.function
def live_runs(steps, seed, n_l1=5):
    """A small sweep: the rows of a table, none where the seed is no whole number up to 999."""
    if not isinstance(seed, int | float) or seed not in range(1000):
        return []
    seed, rows = int(seed), []
    data = SuperpositionData(20, 40, firing=2 / 40, seed=seed)
    held_out = list(itertools.islice(data.batches(1000, seed + 20_000), 5))
    # Another seed than the data's: from the same one both would draw the same directions.
    options = {"d_in": 20, "d_sae": 40, "seed": seed + 30_000, "lr": 3e-2}
    kinds = ("Standard", "Gated", "JumpReLU")
    for variant in mo.status.progress_bar(kinds, title="Training", remove_on_exit=True):
        l1, stream = EVIDENCE[variant].strengths(n_l1), lambda i: data.batches(256, seed + i)
        swept = measure.swept(EVIDENCE[variant], stream, l1, steps, held_out, **options)
        of = {"variant": variant, "world": "plain", "seed": 0}
        rows += [of | {"l1": round(l1[at].item(), 3)} | row for at, _, row in swept]
    return rows


@app.function
def live_sentence(rows, seed):
    """What "half" comes to among the SAEs just trained."""
    if not rows:
        return f"The seed is {seed}, expected a whole number from 0 to 999."
    if math.isnan(over_gated(rows, "Standard", "plain")):
        return "After so few training steps the kinds do not reach the same FVU: train for longer."
    return f"{half_sentence(rows, 'plain')}."


@app.function
def kept_latents():
    """A text that nobody has trained on, a model, its SAEs' latents on that text, and the SAEs."""
    model, saes = language.kept()
    corpus = language.in_rows(language.english()[1], 128)
    x = [*gated_sae.harvest(model, model.mlp, corpus.split(64))]
    with torch.no_grad():
        on_corpus = {kind: torch.cat([*map(sae.encode, x)]) for kind, sae in saes.items()}
    return corpus, model, on_corpus, saes


@app.function
def read_bytes(text):
    """What a model reads of a text: its first 128 bytes, at least two, (1, n)."""
    return torch.tensor([list(f"{text:2}".encode(errors="replace")[:128])])


@app.function
def letter(byte, space=" "):
    """A byte as it can be shown."""
    return {10: "⏎", 32: space}.get(byte, chr(byte) if 32 < byte < 127 else "·")


@app.function
def coloured(ids, strengths, colour, most):
    """Bytes as text, each on a background as strong as its number beside the most."""
    span, shown = '<span title="{:.2f}" style="background:{}{:02x}">{}</span>', []
    for byte, value in zip(ids.tolist(), torch.as_tensor(strengths).tolist(), strict=True):
        shade = round(200 * min(1, value / most))
        shown.append(span.format(value, colour, shade, html.escape(letter(byte))))
    return mo.Html(f'<code class="bytes">{"".join(shown)}</code>')


@app.function
def nearest_latents(saes, i):
    """Gated's latent i, and that of Standard whose direction is nearest."""
    cosines = torch.nn.functional.normalize(saes["Standard"].W_dec, dim=-1) @ saes["Gated"].W_dec[i]
    return {"Gated": i, "Standard": cosines.argmax().item()}


@app.function
def latent_card(kind, i, ids, on_text, corpus, f):
    """Where a latent fires on a text, and the eight rows of a corpus where it fires most."""
    colour, f = PALETTE[kind][0], f.view(corpus.shape)
    most, position = f.max(-1)
    places, top = [], max(f.max().item(), 1e-9)
    for row in most.topk(8).indices.tolist():
        span = slice(max(0, position[row] - 40), position[row] + 12)
        places.append(coloured(corpus[row, span], f[row, span], colour, top))
    head = mo.md(f"**{kind}, latent {i}**")
    fold = mo.accordion({"Where it fires most": mo.vstack(places)})
    return mo.vstack([head, coloured(ids, on_text, colour, top), fold])


@app.function
def latents_sentence(pair, strengths, saes, model):
    """How alike a latent of Gated and the nearest of Standard are; and which bytes each makes
    likelier: its direction, read as the model's last layers do."""
    d = torch.stack([saes[kind].W_dec[i].detach() for kind, i in pair.items()])
    cosine = torch.nn.functional.cosine_similarity(*d, dim=0)
    f, g = strengths["Gated"], strengths["Standard"]
    share = 100 * (g * (f > 0)).sum() / (f * (g > 0)).sum().clamp_min(1e-9)
    top = model.unembed((d - d.mean(-1, keepdim=True)) * model.norm.weight).topk(6).indices
    likelier = (" ".join(f"`{letter(byte, '␣')}`" for byte in row) for row in top.tolist())
    return (
        f"Gated's latent {pair['Gated']} fires on **{100 * (f > 0).float().mean():.1f}%** of bytes "
        f"and Standard's {pair['Standard']}, at a cosine of {cosine:.2f} to it, on "
        f"**{100 * (g > 0).float().mean():.1f}%**. Where both fire, Standard's coefficients are "
        f"**{share:.0f}%** of Gated's. Likelier next bytes, of Gated's and of Standard's: "
        f"{' and '.join(likelier)}."
    )


@app.function
def byte_losses(model, ids, puts):
    """{name: loss of each byte but the first, in nats} with something in place of x."""
    found = {}
    for name, put in puts.items():
        with torch.no_grad(), gated_sae.splice(model.mlp, put):
            log_p = model(ids)[0, :-1].log_softmax(-1)
        found[name] = -log_p.gather(-1, ids[0, 1:, None])[:, 0]
    return found


@app.function
def spliced_texts(ids, losses):
    """A text as often as there are losses of its bytes, coloured by them."""
    for name, loss in losses.items():
        yield mo.md(f"**{name}**: {loss.mean():.2f} nats per byte")
        yield coloured(ids[0], [0.0, *loss.tolist()], PALETTE["Standard"][0], 6.0)


@app.function
def jump_numbers(theta, z):
    """[(by IG, by patching)] of one latent that goes from 0 to z: a JumpReLU, a shifted ReLU."""
    z, zero = torch.tensor([[z]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    jump = partial(gated_sae.jump_relu, theta=torch.tensor([theta], dtype=torch.float64))
    found = []
    for f in (lambda v: jump(v).sum(-1), lambda v: (v - theta).relu().sum(-1)):
        path = claims.integrated_gradients(f, z, zero, steps=500)
        found.append((path.item(), (f(z) - f(zero)).item()))
    return found


@app.function
def jump_chart(theta, z):
    path = torch.tensor(sorted({0.0, min(theta, z), min(theta + 1e-9, z), z}), dtype=torch.float64)
    jump = gated_sae.jump_relu(path[:, None], torch.tensor([theta], dtype=torch.float64))[:, 0]
    curves = {"JumpReLU": jump, "ReLU(z - θ)": (path - theta).relu()}
    looks = [(PALETTE["JumpReLU"][0], [1, 0]), (GREY, [8, 4])]
    x = axis(alt.X, "pre-activation on its way from 0 to z", 5, domain=[0, 2])
    y = axis(alt.Y, "output", domain=[0, 2])
    return panel(rule(x=z) + lines(rows_of(curves, path), x, y, looks))


@app.function
def jump_sentence(theta, z, numbers):
    (ig, patched), (ig_relu, patched_relu) = numbers
    return (
        f"Patching z from 0 to {z:.2f} changes the JumpReLU's output by **{patched:.2f}** and the "
        f"shifted ReLU's by {patched_relu:.2f}. Integrated gradients say **{ig:.2f}** and "
        f"{ig_relu:.2f}: the same for both. What is missing, {patched - ig:.2f}, is the jump"
        + (f" θ = {theta:.2f}." if z > theta else f": z did not reach θ = {theta:.2f}.")
    )


@app.function
def means_in_language(rows, models):
    """CE of the language model, and of SAEs in it, means over seeds, and what these recover."""
    ce = {k: sum(model[k] for model in models) / len(models) for k in ("clean", "zero", "mean")}
    rows = [row for row in rows if row["variant"] in [*EVIDENCE][:3]]
    table = measure.means_over_seeds(rows, ("l0", "fvu", "ce"))
    for row, name in itertools.product(table, ("zero", "mean")):
        row[f"recovered_{name}"] = gated_sae.loss_recovered(row["ce"], ce["clean"], ce[name])
    return {"ce": ce, "table": table}


@app.function
def language_sentence(rows):
    """Who is ahead in the language model, by both measures."""
    plain, wide = (
        [over_gated(rows, v, "language model", by) for by in ("lost", "fvu")]
        for v in ("Standard", "Standard 1.5x")
    )
    return (
        f"At equal CE, a Standard SAE has **{plain[0]:.2f} times** as many latents firing on a "
        f"byte as a Gated one, and one 1.5 times as wide {wide[0]:.2f} times. At equal FVU they "
        f"have {plain[1]:.2f} and {wide[1]:.2f} times as many."
    )


@app.function
def spliced_chart(found, key, title, levels=(), **scale):
    """A column of the language model's table against L0; levels: (number, name), drawn across."""
    across, y = [], f"{key}:Q"
    for level, name in levels:
        named = alt.Chart(alt.Data(values=[{key: level}])).encode(y=y, text=alt.value(name))
        dy = -7 if level == min(levels)[0] else 9
        across += [rule(y=level), named.mark_text(align="left", dx=4, dy=dy, x=0, color=GREY)]
    curves = measure.curves(found["table"], key, title, per="byte", log=False)
    curves = curves.encode(alt.Y(y, title=title, scale=alt.Scale(zero=False, **scale)))
    tips = [alt.Tooltip(f"{k}:Q", format=".3f") for k in ("l0", key)]
    return panel(alt.layer(*across, curves.encode(tooltip=["variant:N", *tips])), 280)


@app.function
def recovered_sentence(found):
    """What the baseline moves, and what it cannot."""
    rows, (zero, mean) = found["table"], ("recovered_zero", "recovered_mean")
    gap = sorted(100 * abs(row[mean] - row[zero]) for row in rows)
    orders = [sorted(range(len(rows)), key=lambda i: rows[i][name]) for name in (zero, mean)]
    kinder = "mean" if found["ce"]["mean"] > found["ce"]["zero"] else "zero"
    same = "the same" if orders[0] == orders[1] else "not the same"
    return (
        f"In this model the **{kinder}** is the worse thing to put in: CE "
        f"{found['ce']['zero']:.2f} with zeros, {found['ce']['mean']:.2f} with the mean. So the "
        f"scores against the {kinder} are {gap[0]:.1f} to {gap[-1]:.1f} points higher. The "
        f"order of the {len(rows)} points is **{same}** under both."
    )


@app.function
def claims_list(claimed, kind, verdict):
    """The claims of one verdict on one kind of data, and what was measured."""
    rows = [row for row in claimed if row["verdict"].get(kind) == verdict]
    return "\n".join(
        f"- **{row['']}** {row['claim']}. *{row[kind].partition(': ')[2]}*"
        for row in claims.condensed(rows)
    )


@app.function
def claims_sentence(claimed):
    """How many of the claims made in the discussion of the paper hold."""
    said = []
    for kind in ("toy data", "language model"):
        found = [row["verdict"][kind] for row in claimed if kind in row["verdict"]]
        said.append(f"**{found.count('agrees')} of {len(found)}** agree with the {kind}")
    return (
        f"Of the claims made when the paper was announced and discussed, {' and '.join(said)}. "
        "Each is below, with what was measured, those that disagree first."
    )


if __name__ == "__main__":
    app.run()
