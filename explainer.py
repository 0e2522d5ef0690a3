"""The lesson: `marimo run explainer.py`, or `marimo edit explainer.py` to change it."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Gated Sparse Autoencoders")

with app.setup(hide_code=True):
    import inspect
    import itertools
    import math
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
    _title = mo.md("""
    # Gated Sparse Autoencoders

    A language model packs more features into its activations than there are dimensions. A *sparse
    autoencoder* (SAE) tries to list them: it writes each activation vector $x$ as a sum of a few
    directions out of a large learned dictionary.

    The usual way to train one makes every term of that sum too small. A **Gated** SAE
    ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014)) mends this: it decides *which* directions
    to use apart from *how strongly*, and pays for the first alone.

    This page shows why that is needed, how it works, what it buys, and what it does not. It takes
    about forty minutes, and you need PyTorch, not SAEs. Every section goes the same way: the gist,
    a question to answer *before* you look, a control, a picture, a sentence computed from it, and
    what to keep. Derivations and code are folded away. The code is that of `gated_sae.py`, whose
    sections 2 to 7 are those of this page; 8 and 9 are its metrics and its training.
    """)
    _questions = mo.md("""
    1. Why does an L1 penalty shrink? (2)
    2. What does gating separate, and why? (3)
    3. Why does the obvious loss kill the gate? (4)
    4. What does the frozen decoder do? (5)
    5. When is a Gated SAE the same thing as a JumpReLU SAE? (6)
    6. What breaks with penalties weighted by decoder norms? (7)
    7. What does γ measure, and what not? (8)
    8. Why are the two best scale factors not reciprocals? (8)
    9. What does "half as many features" mean? (9)
    10. Why can attribution not see the jump? (10)
    11. Where did the field go next, and what can toy data not show? (12)
    """)
    mo.vstack([_title, mo.accordion({"What you will be able to answer": _questions})])
    return


@app.cell(hide_code=True)
def world_gist(n_features):
    _n = word(n_features)
    _pairs = f"{word(n_features // 2)} pairs of opposites"
    _text = r"""
    ## 1 · Four features in the plane

    Suppose that activations had two dimensions, and that there were **four** things to say about
    them: four *features*, each with a direction of its own. A feature is rare, it occurs on one row
    in twenty, with a strength of about 1. Then $x$ is its strength times its direction, or the sum
    if several occur at once.

    Four directions in a plane cannot all be perpendicular; here they are SPREAD.
    This crowding is called *superposition*. It works because features are rare, and seldom meet.

    An SAE sees the points $x$ and nothing else. It has four *latents*. Latent $i$ has a direction
    $d_i$ of length 1 and a coefficient $f_i \ge 0$, and *fires* where $f_i > 0$. The encoder
    computes the coefficients, the decoder adds the directions up:

    $$\begin{aligned} f &= \mathrm{ReLU}\big((x - b_\text{dec})\,W_\text{enc} + b_\text{enc}\big) \\
    \hat x &= \textstyle\sum_i f_i\, d_i + b_\text{dec} \end{aligned}$$

    This small world comes along through the whole page; let us call it *Flatland*. What two
    dimensions cannot show is measured in larger worlds, and said to be.
    """.replace("SPREAD", "evenly spread" if n_features % 2 else _pairs)
    _gist = mo.md(_text.replace("four", _n).replace("Four", _n.capitalize()))
    ask_1 = ask(
        f"A row has two numbers, and there are {_n} directions. Can an SAE find them?",
        ["no, at most two", "*from most starts, not from all", "always"],
        f"Most rows that are not empty show one feature alone, so the points lie on {_n} rays. But "
        "descent can get stuck with two latents on one ray, or one between two. (Try start 1.)",
    )
    mo.vstack([_gist, ask_1])
    return (ask_1,)


@app.cell(hide_code=True)
def world_feedback(ask_1):
    answer(ask_1)
    return


@app.cell
def settings():
    torch.set_num_threads(1)  # models this small only wait for a second one
    n_features = 4  # of Flatland; try 5
    steps, live_steps = 200, 150  # of each training in the lesson: seconds
    strengths = [0.4, 0.6, 0.8, 1.0, 1.2]  # the λ that sliders offer
    # Trained while the reader waits: d_sae of each variant, for 40 features in 20 dimensions.
    live_sizes = {"Standard": 40, "Standard 1.5x": 60, "Gated": 40}
    live_sizes |= {"rescale & shift": 40, "JumpReLU": 40}
    return live_sizes, live_steps, n_features, steps, strengths


@app.cell
def world_controls(n_features, steps):
    starts = list(range(12))
    step = slider("training step", 0, steps=list(range(0, steps + 1, max(1, steps // 10))))
    start = mo.ui.dropdown([str(seed) for seed in starts], value="5", label="start")
    _, first_history = learn(gated_sae.StandardSAE, n_features, [0.8] * len(starts), starts, steps)
    mo.hstack([step, start], justify="start", wrap=True)
    return first_history, start, starts, step


@app.cell(hide_code=True)
def world_picture(first_history, n_features, start, starts, step):
    _member = starts.index(int(start.value))
    _point = min(first_history, key=lambda point: abs(point["step"] - step.value))
    _now, _last = misses(_point["W_dec"][_member]), misses(first_history[-1]["W_dec"])
    _found = (_last.amax(-1) < 10).sum().item()
    picture(
        superposition_chart(_point["W_dec"][_member]),
        f"Grey points: rows of x. Open circles: the {word(n_features)} true directions. Solid "
        "lines: those that the SAE has learned so far. Drag the slider and watch them turn.",
        superposition_sentence(_point["step"], _now.tolist(), _found, len(starts)),
    )
    return


@app.cell(hide_code=True)
def world_end():
    takeaway(
        "more directions than dimensions can be told apart if few of them are used at a time. The "
        "whole difficulty is to make the SAE use few.",
        The_code_that_makes_such_worlds=source(SuperpositionData.sample),
    )
    return


@app.cell(hide_code=True)
def shrink_gist():
    _gist = mo.md(r"""
    ## 2 · Why L1 shrinks

    Train for a close $\hat x$ alone, and every latent fires on everything. We want few to fire. But
    a count has no gradient, so the standard SAE is charged for the *size* of its coefficients
    instead. That is the L1 penalty, and $\lambda$ is its weight:

    $$\mathbb E\,\lVert x - \hat x\rVert^2 \;+\; \lambda\; \mathbb E \sum_i f_i$$

    This charges in the wrong currency. A coefficient that is needed, and rightly so, can still
    save money by being a little too small.
    """)
    ask_2 = ask(
        "A feature is there with strength 2, and λ = 0.8. Which coefficient has the least loss?",
        ["2.0", "*1.6", "1.2", "0"],
        "At 2 - δ the error costs δ² and the penalty saves 0.8 δ. The first bit of shrinking is "
        "nearly free, the saving is not: it pays until δ = λ/2 = 0.4.",
    )
    mo.vstack([_gist, ask_2])
    return (ask_2,)


@app.cell(hide_code=True)
def shrink_feedback(ask_2):
    answer(ask_2)
    return


@app.cell
def shrink_controls(n_features, steps, strengths):
    standard, standard_history = learn(
        gated_sae.StandardSAE, n_features, strengths, [5] * len(strengths), steps
    )
    true, found_standard = lone_strengths(standard)
    l1_shrink = slider("penalty weight λ", 0.8, steps=strengths)
    l1_shrink
    return found_standard, l1_shrink, standard_history, true


@app.cell(hide_code=True)
def shrink_picture(found_standard, l1_shrink, strengths, true):
    _found = found_standard[:, strengths.index(l1_shrink.value)]
    picture(
        shrinkage_chart(true, _found, l1_shrink.value),
        "Each square is a row of Flatland with one feature: its true strength, and the coefficient "
        "that a trained Standard SAE gave it. They lie on the solid line of the closed form, "
        "below the dashed line where they should be.",
        shrinkage_sentence(l1_shrink.value, true, _found),
    )
    return


@app.cell(hide_code=True)
def shrink_end():
    takeaway(
        "L1 shrinks because it charges for size where we only meant to charge for use. Every "
        "coefficient that survives comes out λ/2 too small, whatever its size.",
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
def gate_gist():
    _gist = mo.md(r"""
    ## 3 · What gating separates

    The penalty is needed for one bit per latent: *does it fire?* So split the encoder in two paths.

    $$\begin{aligned} \pi_\text{gate} &= (x - b_\text{dec})\,W_\text{enc} + b_\text{gate} \\
    \pi_\text{mag} &= (x - b_\text{dec})\,W_\text{mag} + b_\text{mag} \\
    \tilde f &= \mathbf 1[\pi_\text{gate} > 0] \odot \mathrm{ReLU}(\pi_\text{mag}) \end{aligned}$$

    The first decides *which* latents fire. The second says *how strongly*. Only the first will be
    penalised, so nothing pulls the second away from the truth.
    """)
    ask_3 = ask(
        "At λ = 0.8, how much of a feature's true strength will a latent of a Gated SAE give back, "
        "where it fires?",
        ["about 60%, like the Standard SAE", "*about 100%", "about 140%"],
        "The magnitudes answer to the reconstruction alone, and the best reconstruction has no "
        "bias. (How such a gate can be trained at all is the next two sections.)",
    )
    mo.vstack([_gist, ask_3])
    return (ask_3,)


@app.cell(hide_code=True)
def gate_feedback(ask_3):
    answer(ask_3)
    return


@app.cell
def gate_controls(n_features, steps, strengths):
    gated, _ = learn(gated_sae.GatedSAE, n_features, strengths, [5] * len(strengths), steps)
    _, found_gated = lone_strengths(gated)
    l1_gate = slider("penalty weight λ", 0.8, steps=strengths)
    l1_gate
    return found_gated, gated, l1_gate


@app.cell(hide_code=True)
def gate_picture(found_gated, found_standard, l1_gate, strengths, true):
    _i = strengths.index(l1_gate.value)
    _found = {"Standard": found_standard[:, _i], "Gated": found_gated[:, _i]}
    picture(
        strengths_chart(true, _found),
        "Grey: the true strengths in Flatland. Standard has the same shape pushed to the left; "
        "Gated lies on the truth, but for the weakest, which it drops to 0.",
        strengths_sentence(l1_gate.value, true, _found),
    )
    return


@app.cell(hide_code=True)
def gate_end():
    takeaway(
        "gating separates *which* from *how strongly*, because only *which* should cost something. "
        "The same λ does not make the two kinds equally sparse; section 9 compares them fairly.",
        The_code=source(gated_sae.gate),
    )
    return


@app.cell(hide_code=True)
def naive_gist():
    _gist = mo.md(r"""
    ## 4 · Why the obvious loss kills the gate

    Now train it. The obvious loss is that of section 2, with $\tilde f$ in the reconstruction and
    the gate in the penalty. (A step has no gradient, so $\mathrm{ReLU}(\pi_\text{gate})$ stands in
    for it.)

    $$\mathbb E\,\lVert x - \hat x(\tilde f)\rVert^2 +
    \lambda\, \mathbb E \textstyle\sum_i \mathrm{ReLU}(\pi_\text{gate})_i$$

    It reads well. But $\tilde f$ sees $\pi_\text{gate}$ through the step alone, and a step is flat
    wherever it is not vertical.
    """)
    ask_4 = ask(
        "How does L0, the mean number of latents that fire on a row, behave under this loss?",
        ["it settles where the two terms balance", "*it falls to zero", "it grows"],
        "There is no balance. The reconstruction never asks a gate to open, and the penalty always "
        "asks it to close.",
    )
    mo.vstack([_gist, ask_4])
    return (ask_4,)


@app.cell(hide_code=True)
def naive_feedback(ask_4):
    answer(ask_4)
    return


@app.cell
def naive_controls(n_features, steps, strengths):
    _starts, _untied = [5] * len(strengths), partial(gated_sae.GatedSAE, tied=False, aux=None)
    _, naive_history = learn(_untied, n_features, strengths, _starts, steps // 2)
    l1_naive = slider("penalty weight λ", 0.4, steps=strengths)
    l1_naive
    return l1_naive, naive_history


@app.cell(hide_code=True)
def naive_picture(l1_naive, n_features, naive_history, standard_history, strengths):
    _i = strengths.index(l1_naive.value)
    _first = gated_sae.GatedSAE(2, n_features, tied=False, aux=None)
    _dec = naive_history[0]["W_dec"][_i]
    _first.load_state_dict({"W_dec": _dec, "W_enc": _dec.T, "W_mag": _dec.T}, strict=False)
    _x = next(flatland(n_features).batches(2000, seed=1))
    gated_sae.start(_first, _x)
    _terms = _first.losses(_x)
    _terms = _terms.reconstruct, l1_naive.value * _terms.sparsity
    _hears = [gradient(_first, term, "b_gate").tolist() for term in _terms]
    _l0 = [point["l0"][_i].item() for point in naive_history]
    _histories = {"Standard": standard_history, "Gated, obvious loss": naive_history}
    _looks = PALETTE["Standard"], PALETTE["Gated"]
    _y = axis(alt.Y, "L0: latents firing per row")
    picture(
        history_chart(_histories, "l0", _i, _looks, _y),
        "L0 on fresh rows while training in Flatland. The Standard SAE settles; with the obvious "
        "loss the gates close, one after the other, and stay closed, for every λ.",
        dying_sentence(*_hears, _l0[0], _l0[-1], naive_history[-1]["step"]),
    )
    return


@app.cell(hide_code=True)
def naive_end():
    takeaway(
        "the obvious loss kills the gate because the step passes no gradient: the reconstruction "
        "cannot open a gate, and the penalty only ever closes it.",
        Derivation=mo.md(r"""
        For every latent,

        $$\begin{aligned} \partial\,\text{reconstruct} / \partial b_\text{gate} &= 0 \\
        \partial\,\text{sparsity} / \partial b_\text{gate} &=
        \mathbb E\,\mathbf 1[\pi_\text{gate} > 0] \ge 0 \end{aligned}$$

        Descent therefore lowers $b_\text{gate}$ of each latent whose gate ever opens, and nothing
        ever raises it. $W_\text{enc}$ is in the same trap. The loss falls for a while and ends at
        the variance of $x$: $\hat x = b_\text{dec}$.
        """),
        The_code=source(gated_sae.incorrect_losses),
    )
    return


@app.cell(hide_code=True)
def aux_gist():
    _gist = mo.md(r"""
    ## 5 · A reason to open

    The gate needs somebody to tell it which latents would help. So let
    $\mathrm{ReLU}(\pi_\text{gate})$ reconstruct $x$ *as well*, in a third term. With its penalty
    that is section 2 over again, shrinkage and all. But nobody reads these coefficients as
    magnitudes: of them, the gate uses the sign.

    $$\begin{aligned} & \mathbb E\,\lVert x - \hat x(\tilde f)\rVert^2 && L_\text{reconstruct} \\
    +\; & \lambda\, \mathbb E \textstyle\sum_i \mathrm{ReLU}(\pi_\text{gate})_i
    && \lambda\, L_\text{sparsity} \\
    +\; & \mathbb E\,\lVert x - \hat x_\text{frozen}(\mathrm{ReLU}(\pi_\text{gate}))\rVert^2
    && L_\text{aux} \end{aligned}$$

    The last decoder is a *frozen* copy, detached from the graph. The auxiliary task may teach the
    gate, and may not touch the dictionary.
    """)
    ask_5 = ask(
        "If its decoder were not frozen, what would the auxiliary term do to the dictionary?",
        [
            "nothing, the reconstruction already trains it",
            "*pull it towards what suits shrunken coefficients",
            "kill the gates again",
        ],
        "ReLU(π_gate) is too small, by λ/2. A decoder that is to serve it too must compromise, at "
        "the cost of the reconstruction that we keep.",
    )
    mo.vstack([_gist, ask_5])
    return (ask_5,)


@app.cell(hide_code=True)
def aux_feedback(ask_5):
    answer(ask_5)
    return


@app.cell
def aux_controls():
    _choices = {"frozen decoder (the paper)": "frozen", "unfrozen": "unfrozen"}
    _choices |= {"no L_aux (section 4)": None}
    _first = next(iter(_choices))
    aux_choice = mo.ui.radio(_choices, value=_first, label="auxiliary term")
    aux_choice
    return (aux_choice,)


@app.cell(hide_code=True)
def aux_picture(aux_choice, gated, n_features, strengths):
    _i = strengths.index(0.8)
    _x = next(flatland(n_features).batches(4000, seed=1))
    _flows = {}
    for _aux in ("frozen", "unfrozen", None):
        _sae = gated_sae.GatedSAE(2, n_features, aux=_aux)
        _sae.load_state_dict({name: value[_i] for name, value in gated.state_dict().items()})
        _flows[_aux] = gradient_flow(_sae, _x, 0.8)
    picture(
        flow_chart(_flows[aux_choice.value]),
        "1000 times the norm of the gradient of each term (rows) on each parameter (columns), on "
        "Flatland's Gated SAE at λ = 0.8, tied as in section 6: W_enc serves both paths, r_mag a "
        "scale. A grey 0 is exact. Look at the column b_gate, and at W_dec as you change the task.",
        flow_sentence(_flows["frozen"], _flows["unfrozen"]),
    )
    return


@app.cell(hide_code=True)
def aux_end(measured):
    _ratio = measured["G6"]["L0 aux unfrozen / Gated"]
    takeaway(
        "L_aux gives the gate a gradient. The frozen decoder keeps the auxiliary task from turning "
        "the dictionary to suit its shrunken coefficients. The paper finds that freezing helps; in "
        f"the larger worlds of section 9, unfrozen needs {_ratio['mean']:.2f} ± "
        f"{_ratio['se']:.2f} times the L0 at equal reconstruction.",
        What_the_third_term_is=mo.md("""
        Take the usual loss of f̃ with its binary gate penalised, and add the usual loss of
        ReLU(π_gate). The penalty on the binary gate has no gradient, and what is left are the three
        terms with an unfrozen decoder. So L_aux is no trick: it is a second SAE on the same
        weights.
        """),
        The_code=source(gated_sae.gated_losses),
    )
    return


@app.cell(hide_code=True)
def tied_gist():
    _gist = mo.md(r"""
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
    """)
    ask_6 = ask(
        "And if W_mag is not tied to W_enc: is a Gated SAE still a JumpReLU?",
        ["yes", "only at λ = 0", "*no"],
        "Gate and magnitude then look along two directions. Two rows with the same π_mag can have "
        "one gate open and one shut, which no threshold on π_mag can do.",
    )
    mo.vstack([_gist, ask_6])
    return (ask_6,)


@app.cell(hide_code=True)
def tied_feedback(ask_6):
    answer(ask_6)
    return


@app.cell
def tied_controls():
    opens_at = slider("the gate opens at z =", 0.6, -1.0, 1.5, 0.05)
    r_mag = slider("r_mag", 0.2, -0.5, 0.5, 0.05)
    b_mag = slider("b_mag", 0.1, -0.5, 0.5, 0.05)
    mo.vstack([opens_at, r_mag, b_mag])
    return b_mag, opens_at, r_mag


@app.cell(hide_code=True)
def tied_picture(b_mag, opens_at, r_mag):
    _curves, _z, _theta, _same = one_latent(-opens_at.value, r_mag.value, b_mag.value)
    picture(
        latent_chart(_curves, _z, opens_at.value),
        "One latent. Dotted: whether its gate is open. Dashed: the magnitude. Solid: their "
        "product, the output. Move the gate to the right for a higher jump, to the left for none.",
        latent_sentence(-opens_at.value, _theta, _same),
    )
    return


@app.cell(hide_code=True)
def tied_end():
    takeaway(
        "a Gated SAE with tied weights is a JumpReLU SAE, exactly; untied it is not. What differs "
        "in the paper that named JumpReLU SAEs (section 12) is how θ is trained. At θ ≤ 0 nothing "
        "jumps.",
        Derivation=mo.md(r"""
        $\pi_\text{gate} > 0$ says $z > -b_\text{gate}$. Multiply by $e^{r_\text{mag}} > 0$ and add
        $b_\text{mag}$: $\pi_\text{mag} > b_\text{mag} - e^{r_\text{mag}} b_\text{gate} = \theta$.
        The ReLU asks for $\pi_\text{mag} > 0$ besides.
        """),
        The_code=source(gated_sae.jump_relu, gated_sae.to_jumprelu),
    )
    return


@app.cell(hide_code=True)
def norms_gist():
    _gist = mo.md(r"""
    ## 7 · What breaks when decoder norms are penalised

    So far every $d_i$ has length 1. It must, or the penalty could be dodged: twice the $d_i$, half
    the $f_i$, the same $\hat x$ at half the price. Many codebases drop the constraint and charge
    $\sum_i f_i \lVert d_i\rVert$ instead, which that trick does not change.

    For a Standard SAE this is fine. For a Gated SAE there are now *two* places where the decoder
    may be frozen: in $L_\text{aux}$, and in the penalty's norms.
    """)
    ask_7 = ask(
        "Freeze the decoder in L_aux, as the paper does, but let the norms in the penalty have "
        "their gradient. What happens to the norms?",
        ["they stay near 1", "*they go to zero", "they grow"],
        "A shorter d_i lowers the penalty. The reconstruction does not mind, exp(r_mag) makes up "
        "for it. L_aux would mind, but it is not heard: its decoder is frozen.",
    )
    mo.vstack([_gist, ask_7])
    return (ask_7,)


@app.cell(hide_code=True)
def norms_feedback(ask_7):
    answer(ask_7)
    return


@app.cell
def norms_controls(n_features, steps):
    norms_history = {}
    with warnings.catch_warnings(action="ignore"):  # two of these fail, and are to be seen failing
        for _penalty, _aux in itertools.product(("live", "frozen"), ("frozen", "unfrozen")):
            _kind = partial(gated_sae.GatedSAE, penalty=f"norm_{_penalty}", aux=_aux)
            _, _history = learn(_kind, n_features, [0.8], [5], steps // 2)
            norms_history[f"norms {_penalty}, aux {_aux}"] = _history
    norms_penalty = mo.ui.radio(
        ["live", "frozen"], value="live", label="norms in the penalty", inline=True
    )
    norms_aux = mo.ui.radio(
        ["frozen", "unfrozen"], value="frozen", label="decoder in L_aux", inline=True
    )
    mo.vstack([norms_penalty, norms_aux])
    return norms_aux, norms_history, norms_penalty


@app.cell(hide_code=True)
def norms_picture(measured, norms_aux, norms_history, norms_penalty):
    _chosen = f"norms {norms_penalty.value}, aux {norms_aux.value}"
    _ratio = measured["A5"][f"L0 {_chosen} / Gated"]["mean"]
    _standard = measured["D4"]["L0 Standard / Gated, plain"]["mean"]
    _end = norms_history[_chosen][-1]
    _colours = [PALETTE["Gated"][0] if name == _chosen else GREY for name in norms_history]
    _looks = zip(_colours, ("circle", "square", "cross", "diamond"), strict=True)
    _ticks = [0.05, 0.1, 0.2, 0.5, 1, 2, 5]
    _y = axis(alt.Y, "mean length of d_i", _ticks, type="log", domain=[0.05, 5])
    _thick = alt.condition(f"datum.what == '{_chosen}'", alt.value(4), alt.value(2))
    picture(
        history_chart(norms_history, "norm", 0, _looks, _y, strokeWidth=_thick),
        "Mean length of the learned directions during training in Flatland (the scale is "
        "logarithmic). The thick line is the setting chosen. Frozen in both or in neither, the "
        "lengths stay; frozen in one only, they run away.",
        norms_sentence(_chosen, _end["norm"].item(), _end["step"], _ratio, _standard),
    )
    return


@app.cell(hide_code=True)
def norms_end():
    takeaway(
        "with a norm-weighted penalty, freeze the decoder in both L_aux and the penalty, or in "
        "neither. Frozen in L_aux alone, the norms collapse, and with them all that Gated had "
        "gained. Users of libraries have met such drifting norms and wondered ([SAELens "
        "546](https://github.com/decoderesearch/SAELens/pull/546)).",
        The_code=source(gated_sae.PENALTIES["norm_live"], gated_sae.PENALTIES["norm_frozen"]),
        Other_alternatives=mo.md("""
        The discussion of the paper proposed more, and section 7 of the code has it all; section 9
        shows how each fares.

        - **rescale & shift**: train a Standard SAE, then learn a scale and a shift for each latent
          without penalty. It mends the magnitudes, and leaves *which* as it was.
        - **natural b_mag**: a Gated SAE whose θ is 0, so that nothing jumps.
        - **log penalty**: log(1 + f) in place of f, which spares large coefficients.
        - **soft cutoff**: a smooth step in place of the ReLU, with a learned threshold.
        """),
    )
    return


@app.cell(hide_code=True)
def gamma_gist():
    _gist = mo.md(r"""
    ## 8 · What γ measures, and what it does not

    How much too short are reconstructions? Find the $g$ by which $\hat x$ should be divided to come
    closest to $x$. That is the *relative reconstruction bias*:

    $$\gamma = \arg\min_g\; \mathbb E\,\lVert \hat x / g - x\rVert^2
    = \frac{\mathbb E\,\lVert\hat x\rVert^2}{\mathbb E[\hat x \cdot x]}$$

    Below 1, $\hat x$ is too short. At 1, no rescaling brings it closer: it is unbiased. That is
    *not* to say it is good, it may still point elsewhere. And there is a second question, easily
    taken for the first: which multiple of $x$ is nearest to $\hat x$?
    """)
    ask_8 = ask(
        "The nearest multiple of x̂ to x is p · x̂, and the nearest multiple of x to x̂ is q · x. "
        "Is q = 1/p?",
        ["always", "*only if x̂ points exactly as x does", "only if γ = 1"],
        "p q is the squared cosine of the angle between them. Turn x̂ until it is nearly "
        "perpendicular to x: then the best multiple of either is nearly 0, both p and q.",
    )
    mo.vstack([_gist, ask_8])
    return (ask_8,)


@app.cell(hide_code=True)
def gamma_feedback(ask_8):
    answer(ask_8)
    return


@app.cell
def gamma_controls():
    degrees = slider("angle of x̂ to x, degrees", 60, 0, 85, 5)
    length = slider("length of x̂", 0.5, 0.1, 1.2, 0.05)
    mo.vstack([degrees, length])
    return degrees, length


@app.cell(hide_code=True)
def gamma_picture(degrees, length, runs):
    picture(
        two_vectors_chart(degrees.value, length.value, typical(runs)),
        "x lies along the axis, x̂ at an angle to it. Open circles, each at the foot of a dashed "
        "perpendicular: the best multiple of x̂ on the line of x̂, the best multiple of x on the "
        "axis. On the grey circle γ = 1. Square and disc: the mean angle and length of trained "
        "Standard and Gated SAEs from results/runs.json. Standard lies inside the circle, too "
        "short; Gated on it.",
        two_vectors_sentence(degrees.value, two_vectors(degrees.value, length.value)),
    )
    return


@app.cell(hide_code=True)
def gamma_end():
    takeaway(
        "γ measures whether reconstructions are too short as a whole, and nothing else: not how "
        "good they are, nor whether each latent is right. The two best factors are not "
        "reciprocals, because each is a projection, and both shrink as the angle grows. For the "
        "same reason the norm ratio ‖x̂‖²/‖x‖² is below 1 for every unbiased SAE that is not "
        "perfect.",
        Derivation=mo.md(r"""
        $\mathbb E\lVert g' \hat x - x\rVert^2$ is a parabola in $g' = 1/g$, least at
        $g' = \mathbb E[\hat x\cdot x] / \mathbb E\lVert\hat x\rVert^2$. The other factor is
        $\mathbb E[\hat x\cdot x] / \mathbb E\lVert x\rVert^2$. Their product is
        $\mathbb E[\hat x\cdot x]^2 / (\mathbb E\lVert\hat x\rVert^2\, \mathbb E\lVert x\rVert^2)$,
        the squared cosine of two vectors as long as the whole data set. At $\gamma = 1$ the norm
        ratio equals it. (The first preprint had another formula for γ, which is right at
        $\gamma = 1$ only: for $\hat x = x/2$ it gave $1/\sqrt 3$.)
        """),
        The_code=source(gated_sae.Moments),
    )
    return


@app.cell(hide_code=True)
def frontier_gist():
    _gist = mo.md(r"""
    ## 9 · What it buys: "half as many features"

    Comparing two SAEs at one $\lambda$ says nothing. Train each kind for many $\lambda$, and draw
    what it gets against what it pays: the *fraction of variance unexplained* (**FVU**) against
    **L0**, the latents that fire on a row. Further to the left and further down is better.

    "Half as many features" is a statement about this picture: at equal FVU, half as many latents
    *fire on a row*. The dictionary has the same size, and nothing is said about how many features
    were found.

    A Gated training step has three products with a weight matrix where a Standard one has two. So
    the fair opponent is also a Standard SAE **1.5 times as wide**, at equal training compute.
    """)
    ask_9 = ask(
        "A Standard SAE with 1.5 times the latents costs the same to train. Does it catch up?",
        ["yes", "half of the way", "*no"],
        "Here it needs more latents than the narrow one, not fewer. But mind that our worlds have "
        "exactly as many features as the narrow SAE has latents; language models have more.",
    )
    mo.vstack([_gist, ask_9])
    return (ask_9,)


@app.cell(hide_code=True)
def frontier_feedback(ask_9):
    answer(ask_9)
    return


@app.cell
def frontier_controls():
    world_name = mo.ui.dropdown(measure.WORLDS, value="plain", label="larger world")
    world_name
    return (world_name,)


@app.cell
def committed():
    claimed, runs, in_language = map(measure.read, ("claims", "runs", "language"))
    measured = {row["id"]: row["measured"].get("toy data") for row in claimed}
    spoken = means_in_language(in_language, measure.read("models"))
    return claimed, in_language, measured, runs, spoken


@app.cell(hide_code=True)
def frontier_picture(runs, world_name):
    _means = measure.means_over_seeds(runs)
    picture(
        panel(frontier_chart([r for r in _means if r["data"] == world_name.value]), 340),
        "128 features in 32 dimensions, 4 active: independent and equally frequent (plain); of "
        "very unequal frequency and fond of company (Zipf, correlated); children that occur "
        "only with their parents (hierarchical). Each point is the mean of five SAEs. Committed "
        "results; `python results/rebuild.py toy` measures them again.",
        frontier_sentence(runs, world_name.value),
    )
    return


@app.cell(hide_code=True)
def live_form(live_steps):
    _gist = mo.md("""
    ### Train them yourself

    Do not take it from a file. Below are SAEs trained as you opened this page, in a world of 40
    features in 20 dimensions. Train them for longer, or with another seed. Then pick one, with a
    click on its point or from the list, and look at its latents.
    """)
    _steps = slider("steps", live_steps, steps=sorted({live_steps, *range(50, 501, 50)}))
    _seed = mo.ui.number(0, 999, value=1, label="seed")
    _form = mo.md("{steps} {seed}").batch(steps=_steps, seed=_seed)
    live = _form.form(submit_button_label="Train", bordered=True)
    mo.vstack([_gist, live])
    return (live,)


@app.cell
def live_training(live, live_sizes, live_steps):
    _asked = live.value or {"steps": live_steps, "seed": 0}
    _sizes = mo.status.progress_bar(live_sizes.items(), title="Training", remove_on_exit=True)
    live_rows, live_saes = live_runs(_sizes, **_asked)
    live_seed = _asked["seed"]
    return live_rows, live_saes, live_seed


@app.cell
def live_frontier(choose, live_rows):
    live_pick = mo.ui.altair_chart(
        live_chart(live_rows),
        legend_selection=False,
        on_change=lambda _: choose(lambda i: picked(live_rows, live_pick.selections, i)),
    )
    live_pick
    return


@app.cell
def live_choice(live_rows):
    _fire = [(i, row) for i, row in enumerate(live_rows) if row["l0"] > 0.1]
    _names = {f"{row['variant']}, λ = {row['l1']:.2f}": i for i, row in _fire}
    _first = [name for name in _names if name.startswith("Standard,")][-2]
    choice, choose = mo.state(_names[_first])
    live_list = mo.ui.dropdown(_names, value=_first, label="inspect", on_change=choose)
    live_list
    return choice, choose


@app.cell(hide_code=True)
def live_latents(choice, live_rows, live_saes, live_seed):
    _row, _latents = live_rows[choice()], latents_of(live_saes[choice()], small_world(live_seed))
    picture(
        latents_chart(_latents, _row["variant"]),
        "Each point is a latent of the SAE you picked: how well it points at a true feature, and "
        "which share of that feature's strength it gives back. On the dashed line nothing is lost. "
        "Standard stays far below it; pick a Gated one to compare.",
        latents_sentence(_row, _latents),
    )
    return


@app.cell(hide_code=True)
def frontier_end(in_language, runs):
    _found = [
        {key: row[key] for key in ("variant", "L0", "MCC", "F1")}
        for row in claims.recovered(runs)
        if row["data"] == "plain"
    ]
    takeaway(
        '"half as many features" means that half as many latents fire on a row, at equal '
        "reconstruction. It does not say that the dictionary is smaller, or truer.",
        In_one_sentence=mo.md(claims.verdict([*runs, *in_language])),
        How_much_of_the_truth_was_found=mo.md(
            "On the plain world, at FVU 0.2. MCC: mean cosine of true and learned directions, "
            "matched one to one. F1: of latents as detectors of their features. Gated detects "
            "better; its directions are about as true as those of Standard.\n\n"
            + measure.as_markdown(_found)
        ),
        How_training_starts=mo.md(r"""
        With $W_\text{enc} = W_\text{dec}^\top$ and half of all gates open,

        $$\mathbb E\,\hat x = \frac{d_\text{sae}}{2\, d_\text{in}}\, x$$

        over random dictionaries, which for a wide SAE is several times too long, and Adam spends
        the run on undoing it. So the encoder starts a tenth as long, and each gate opens at two
        standard deviations of its $z$. (In Flatland the factor is about 1: there it starts at
        full length.)
        """),
        The_code_of_a_training_step=source(gated_sae.start, gated_sae.step_on_unit_norm),
    )
    return


@app.cell(hide_code=True)
def jump_gist():
    _gist = mo.md(r"""
    ## 10 · Why attribution cannot see the jump

    Which latents matter to a model's output? Patching answers: change one, run the model, look.
    That takes a run per latent. *Attribution* answers for all at once, from gradients.
    *Integrated gradients* (IG) add the gradient up along the straight path from 0 to $z$, and for a
    continuous function they are complete: they sum to the change of the output.

    A JumpReLU is not continuous. Beside its jump it has the same slope everywhere as a ReLU shifted
    by $\theta$:

    $$\frac{d}{dz}\, z\,\mathbf 1[z > \theta] \;=\; \mathbf 1[z > \theta] \;=\;
    \frac{d}{dz}\, \mathrm{ReLU}(z - \theta)$$
    """)
    ask_10 = ask(
        "θ = 0.5, and z goes from 0 to 1.5, so the JumpReLU goes from 0 to 1.5. What do integrated "
        "gradients attribute to it?",
        ["0.5", "*1.0", "1.5"],
        "The slope is 0 up to θ and 1 from there to 1.5: that adds up to 1.0. At the jump there is "
        "no slope to add.",
    )
    mo.vstack([_gist, ask_10])
    return (ask_10,)


@app.cell(hide_code=True)
def jump_feedback(ask_10):
    answer(ask_10)
    return


@app.cell
def jump_controls():
    theta = slider("threshold θ", 0.5, 0.0, 1.5, 0.05)
    z_end = slider("z", 1.5, 0.05, 2.0, 0.05)
    mo.vstack([theta, z_end])
    return theta, z_end


@app.cell(hide_code=True)
def jump_picture(theta, z_end):
    picture(
        jump_chart(theta.value, z_end.value),
        "Output of a JumpReLU and of the shifted ReLU along the path; faint where the path does "
        "not go. Where both have left zero they are parallel: same slope, another height. A sum of "
        "slopes cannot tell one from the other.",
        jump_sentence(theta.value, z_end.value, jump_numbers(theta.value, z_end.value)),
    )
    return


@app.cell(hide_code=True)
def jump_end():
    takeaway(
        "attribution is made of gradients, and a jump has none. Gradients of a JumpReLU, and so of "
        "a Gated SAE, miss exactly θ for each latent that crosses its threshold. Patch where it "
        "matters.",
        The_code=source(claims.integrated_gradients, claims.attribution_patching),
    )
    return


@app.cell(hide_code=True)
def language_gist():
    _gist = mo.md("""
    ## 11 · In a language model

    Toy data is made to be found. So here is a transformer of one layer that predicts the next byte
    of Python's own help texts, and SAEs for what its MLP puts out. Their reconstruction goes back
    into the model in place of the original, and what counts is how well it then predicts text that
    neither has read: its cross-entropy (**CE**, nats per byte).
    """)
    ask_11 = ask(
        "In the toy world Gated needed about half the latents at equal FVU. And here, at equal CE?",
        ["*about half", "about as many", "more"],
        "The lead holds downstream, on one small model. At equal FVU it looks larger than it is: "
        "what counts for FVU is not quite what counts for the model.",
    )
    mo.vstack([_gist, ask_11])
    return (ask_11,)


@app.cell(hide_code=True)
def language_feedback(ask_11):
    answer(ask_11)
    return


@app.cell(hide_code=True)
def language_picture(in_language, spoken):
    _ce = spoken["ce"]
    _levels = [(_ce[k], n) for k, n in (("clean", "as it is"), ("zero", "zeros"), ("mean", "mean"))]
    picture(
        spliced_chart(spoken, "ce", "CE once spliced in, nats per byte", _levels),
        "Each point is an SAE with a λ of its own, spliced into the model, the mean of three "
        "models. Dashed: the model as it is, and with zeros or the mean in place of its MLP's "
        "output. Committed results; `python results/rebuild.py language` measures them again.",
        language_sentence(in_language),
    )
    return


@app.cell(hide_code=True)
def recovered_gist():
    _gist = mo.md(r"""
    ### Loss recovered

    *Loss recovered* sets that CE on a scale: 1 is as good as $x$ itself, 0 as bad as *ablating*,
    which is putting zeros, or the mean of $x$, in its place.

    $$\frac{\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{SAE}}
    {\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{clean}}$$
    """)
    ask_12 = ask(
        "Against which baseline do SAEs look better, and can the choice change which of two is "
        "ahead?",
        [
            "*the one that breaks the model more; no",
            "the one that breaks the model more; yes",
            "the one that breaks it less; no",
        ],
        "A worse baseline makes every SAE look better. But the score is a straight line, falling "
        "in the SAE's own loss, whichever baseline is used: the order stays.",
    )
    mo.vstack([_gist, ask_12])
    return (ask_12,)


@app.cell(hide_code=True)
def recovered_feedback(ask_12):
    answer(ask_12)
    return


@app.cell
def recovered_controls():
    ablation = mo.ui.radio(["zero", "mean"], value="zero", inline=True, label="ablated with")
    ablation
    return (ablation,)


@app.cell(hide_code=True)
def recovered_picture(ablation, spoken):
    _key, _title = f"recovered_{ablation.value}", f"loss recovered, {ablation.value} ablation"
    picture(
        spliced_chart(spoken, _key, _title),
        "Loss recovered by the same SAEs against the baseline you choose. Switch it: all points "
        "move, and none overtakes another.",
        recovered_sentence(spoken),
    )
    return


@app.cell(hide_code=True)
def recovered_end():
    takeaway(
        "always ask which ablation a loss recovered is measured against: it moves every score, and "
        "decides none. It is often said that zeros flatter; in this model the mean does.",
        The_code=source(gated_sae.loss_recovered, gated_sae.splice),
        The_model=source(language.LanguageModel),
    )
    return


@app.cell(hide_code=True)
def next_gist(claimed):
    _gist = mo.md("""
    ## 12 · Where the field went next, and what toy data cannot show

    **JumpReLU SAEs** ([arXiv 2407.14435](https://arxiv.org/abs/2407.14435)), three months later and
    in part by the same people, keep the activation of section 6, drop the auxiliary task, and train
    θ on L0 itself, with an estimate of the gradient that the step does not have. **TopK** SAEs
    ([2406.04093](https://arxiv.org/abs/2406.04093)) keep the k largest coefficients of each row:
    without a penalty there is nothing to shrink. **BatchTopK**
    ([2412.06410](https://arxiv.org/abs/2412.06410)) lets k vary from row to row, and runs as a
    JumpReLU once trained. SAELens, the library most used, marks Standard, TopK *and* Gated as
    "legacy architecture", and recommends BatchTopK or JumpReLU. In its words Gated SAEs are "not
    recommended for most use cases".

    What stays is the insight: *which* and *how strongly* are two questions, and a penalty on one
    should not touch the other. All of the successors act on it.

    **What toy data cannot show.** Here features exist, are known, and are straight lines. Whether a
    language model's are is the open question, and no toy answers it. Nor can toy data say whether
    latents can be *interpreted*, how large the gain is on a real model, whether the ranking of
    variants survives at scale, or what an SAE costs downstream. It can refute a mechanism, and
    check an identity. Where our measurements disagree with the paper or the discussion, the table
    below says so, and it may be the toy that is wrong.
    """)
    mo.vstack([_gist, mo.callout(mo.md(claims_sentence(claimed)), kind="info")])
    return


@app.cell(hide_code=True)
def claims_table(claimed):
    _gist = mo.md("""
    ### What was claimed, and what is measured

    The paper's announcement was discussed at length. The claims made there were measured, nearly
    all in the larger worlds and with 5 seeds, and what needs one in the language model, with 3.
    Verdicts are computed. Committed results; `python results/rebuild.py` measures them again.
    """)
    _places = itertools.product(("toy data", "language model"), ("disagrees", "agrees"))
    _lists = {f"{k}: {v}": mo.md(claims_list(claimed, k, v)) for k, v in _places}
    mo.vstack([_gist, mo.accordion(_lists)])
    return


# -- What the cells call: first the forms that all sections share ----------------------------------


@app.function
def ask(question, options, why):
    """A question to answer before looking; of the options, the right one is starred.

    The value of an answer is what is to be said of it.
    """
    (right,) = (option[1:] for option in options if option[0] == "*")
    wrong = mo.callout(mo.md(f"**No: {right}.** {why}"), kind="warn")
    said = dict.fromkeys((option.removeprefix("*") for option in options), wrong)
    said[right] = mo.callout(mo.md(f"**Right.** {why}"), kind="success")
    return mo.ui.radio(said, label=f"**Predict first.** {question}")


@app.function
def answer(asked):
    """Right or not, and why; nothing is given away before there is an answer."""
    return asked.value or mo.md("*Choose an answer to see whether it holds.*")


@app.function
def slider(label, value, start=None, stop=None, step=None, steps=None):
    """From start to stop, or one of the given steps."""
    if steps is None:
        steps = [round(start + k * step, 2) for k in range(round((stop - start) / step) + 1)]
    return mo.ui.slider(steps=steps, value=value, label=label, show_value=True, debounce=True)


@app.function
def picture(chart, caption, sentence):
    """A chart, what to see in it, and what it adds up to."""
    chart = chart.properties(description=caption)
    return mo.vstack([chart, mo.md(f"*{caption}*"), mo.callout(mo.md(sentence), kind="info")])


@app.function
def source(*things):
    """The code itself, as it stands."""
    return mo.md("\n".join(f"```python\n{inspect.getsource(thing)}```\n" for thing in things))


@app.function
def takeaway(text, **folds):
    """What to keep, and what a first reading may leave folded."""
    folds = {title.replace("_", " "): content for title, content in folds.items()}
    return mo.vstack([mo.md(f"**Keep:** {text}"), mo.accordion(folds)])


@app.function
def word(n):
    """A small number in words."""
    return dict(enumerate(("one", "two", "three", "four", "five", "six"), 1)).get(n, str(n))


# -- Charts ----------------------------------------------------------------------------------------


@app.function
def panel(chart, height=260, width="container"):
    """As wide as the page allows; nothing but the curves catches the eye, on white or on black."""
    chart = chart.properties(width=width, height=height, background="transparent")
    return chart.configure_axis(gridOpacity=0.3)


@app.function
def axis(channel, title, ticks=6, field=None, **scale):
    """An axis of numbers: alt.X or alt.Y, and its scale."""
    field = field or ("x" if channel is alt.X else "y")
    of = alt.Axis(values=ticks) if isinstance(ticks, list) else alt.Axis(tickCount=ticks)
    return channel(f"{field}:Q", title=title, axis=of, scale=alt.Scale(**scale))


@app.function
def rows_of(curves, x):
    """What `lines` draws: {name: numbers} over the numbers x."""
    pairs = ((name, zip(x, y, strict=True)) for name, y in curves.items())
    return [{"what": name, "x": float(a), "y": float(b)} for name, at in pairs for a, b in at]


@app.function
def lines(values, x, y, looks, dots=0, **more):
    """Lines against two axes; looks: (colour, shape or dashes) of each, in their order.

    With dots of some size, the lines differ by the shape of these, and else by dashes.
    """
    names, (colours, forms) = list({row["what"]: 0 for row in values}), zip(*looks, strict=True)
    legend = alt.Legend(title=None, orient="top", labelLimit=400, columns=len(names) % 4)
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


# -- Flatland: sections 1 to 7 ---------------------------------------------------------------------


@app.function
def flatland(n):
    """n features in the plane, evenly spread; each occurs on one row in twenty, at about 1."""
    angle = torch.arange(n) * (2 * math.pi / n) + math.pi / 8
    directions = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return SuperpositionData(2, n, dictionary=directions, firing=0.05, magnitude="log_normal")


@app.function
def learn(kind, n, l1, starts, steps):
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
    schedule = {"steps": steps, "lr": 3e-2, "log_every": max(1, steps // 10), "device": "cpu"}
    schedule |= {"resample_every": None}  # what dies is to be seen dead
    records = gated_sae.train(sae, data.batches(256, seed=0), l1=torch.tensor(l1), **schedule)
    for step in itertools.chain([0], (record.step for record in records if record.step > 1)):
        l0, W_dec = gated_sae.evaluate(sae, [held_out]).l0, sae.W_dec.detach().clone()
        norm = W_dec.norm(dim=-1).mean(-1)
        history.append({"step": step, "W_dec": W_dec, "l0": l0, "norm": norm})
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
def superposition_sentence(step, degrees, found, starts):
    """`degrees`: how far each true direction is from the nearest learned one."""
    n = word(len(degrees))
    return (
        f"After **{step}** steps, the {n} true directions are {min(degrees):.0f}° to "
        f"{max(degrees):.0f}° away from the nearest learned one. At the end of training, "
        f"**{found} of {starts}** starts have found all {n} to within 10°."
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
    squares = alt.Chart(alt.Data(values=rows_of({"f": found[:250]}, true[:250])))
    squares = squares.mark_square(size=22, opacity=0.6, color=orange, clip=True).encode(x, y)
    return panel(squares + lines(rows_of(curves, ends), x, y, looks), 300)


@app.function
def shrinkage_sentence(l1, true, found):
    """The closed form, and how far a trained SAE is from it."""
    off = (found - gated_sae.shrink(true, l1)).abs().mean().item()
    lost = (true - found)[true > l1].mean().item()
    return (
        f"With λ = {l1:.1f}, the closed form takes λ/2 = **{l1 / 2:.2f}** off every coefficient "
        f"that survives. The trained SAE took **{lost:.2f}** off those with a > λ, and lies "
        f"{off:.2f} from the closed form on average."
    )


@app.function
def strengths_chart(true, found):
    """Histograms: the true strengths, and what each kind recovered. found: {kind: coefficients}."""
    width, found = 0.15, {"truth": true, **found}
    edges = [k * width for k in range(21)]
    shares = {k: torch.histc(v, 20, 0.0, 20 * width) / len(true) for k, v in found.items()}
    values = rows_of({name: [*share, 0.0] for name, share in shares.items()}, edges)
    x, share = axis(alt.X, "strength, or coefficient"), alt.Axis(format="%")
    y = alt.Y("y:Q", stack=None, title="share of rows", axis=share)
    scale, legend = measure.colours(*found), alt.Legend(title=None, orient="top")
    look = {"fillOpacity": 0.12, "line": {"strokeWidth": 2.5}}
    chart = alt.Chart(alt.Data(values=values)).mark_area(interpolate="step-after", **look)
    return panel(chart.encode(x, y, alt.Color("what:N", scale=scale, legend=legend)))


@app.function
def strengths_sentence(l1, true, found):
    on = {kind: f > 0 for kind, f in found.items()}
    shares = {kind: (f.sum() / true[on[kind]].sum()).item() for kind, f in found.items()}
    given = " and ".join(f"**{kind} {100 * share:.0f}%**" for kind, share in shares.items())
    fires = " and ".join(f"{100 * fires.float().mean():.0f}%" for fires in on.values())
    return (
        f"At λ = {l1:.1f}, where the right latent fires, {given} of the true strength come back. "
        f"It fires on {fires} of these rows."
    )


@app.function
def history_chart(histories, key, i, looks, y, **more):
    """A number of SAE i over training. histories: {name: history}."""
    values = [
        {"what": name, "x": point["step"], "y": point[key][i].item()}
        for name, history in histories.items()
        for point in history
        if point["step"] <= min(h[-1]["step"] for h in histories.values())
    ]
    return panel(lines(values, axis(alt.X, "training step"), y, looks, dots=40, **more))


@app.function
def dying_sentence(reconstruct, sparsity, l0_first, l0_last, steps):
    """Gradients on b_gate of the two terms, one number for each latent; L0 before and after."""
    return (
        f"Before training, the reconstruction's gradient on the {word(len(sparsity))} gate biases "
        f"is **{max(abs(g) for g in reconstruct):.0f}, exactly**; the penalty's is "
        f"{min(sparsity):.2g} to {max(sparsity):.2g}, never negative, so every step lowers them. "
        f"L0 falls from {l0_first:.2f} to **{l0_last:.2f}** in {steps} steps."
    )


@app.function
def gradient_flow(sae, x, l1):
    """‖∂ term / ∂ parameter‖ for each term of the loss and each parameter."""
    reconstruct, sparsity, aux = sae.losses(x)
    terms = {"L_reconstruct": reconstruct, "λ L_sparsity": l1 * sparsity, "L_aux": aux}
    names = "W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"
    return {
        (term, name): gradient(sae, value, name).norm().item() if value.requires_grad else 0.0
        for (term, value), name in itertools.product(terms.items(), names)
    }


@app.function
def flow_chart(flow):
    """Which term of the loss reaches which parameter, and how strongly."""
    values = [
        {"term": term, "parameter": name, "norm": norm, "shown": f"{1000 * norm:.2g}"}
        for (term, name), norm in flow.items()
    ]
    x = alt.X("parameter:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=0))
    base = alt.Chart(alt.Data(values=values)).encode(x, alt.Y("term:N", sort=None, title=None))
    scale = alt.Scale(type="sqrt", range=["#cfe3f1", "#4c9ccb"], domainMin=0)
    shade, some = alt.Color("norm:Q", scale=scale, legend=None), "datum.norm > 0"
    shade = alt.condition(some, shade, alt.value("transparent"))
    ink = alt.condition(some, alt.value("#000000"), alt.value(GREY))
    cells = base.mark_rect(stroke=GREY, strokeWidth=0.5).encode(color=shade)
    return panel(cells + base.mark_text(fontSize=13).encode(text="shown:N", color=ink), 150)


@app.function
def flow_sentence(frozen, unfrozen):
    """From two tables of `gradient_flow`, on the same weights and rows."""
    return (
        f"The gate bias hears {frozen['L_reconstruct', 'b_gate']:.0f} from the reconstruction and "
        f"**{frozen['L_aux', 'b_gate']:.2g}** from L_aux. Unfrozen, L_aux would push W_dec with "
        f"**{unfrozen['L_aux', 'W_dec']:.2g}**, where the reconstruction, nearly content, pushes "
        f"with {frozen['L_reconstruct', 'W_dec']:.2g}. Frozen, with "
        f"**{frozen['L_aux', 'W_dec']:.0f}**. b_dec still hears L_aux through x - b_dec: "
        f"{frozen['L_aux', 'b_dec']:.2g}."
    )


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
    curves = lines(rows_of(curves, z), x, axis(alt.Y, None, domain=[0, 3]), looks)
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
def norms_sentence(setting, norm, steps, ratio, standard):
    """Flatland's mean norm after training; in the larger world, L0 over Gated's, and Standard's."""
    kept = "stayed near 1" if 0.7 < norm < 1.4 else "**collapsed**" if norm < 0.7 else "**swelled**"
    return (
        f"{setting[0].upper()}{setting[1:]}: after {steps} steps the norms, 1 at first, are "
        f"{norm:.2g} on average: they {kept}. In the larger world, where it counts, it needs "
        f"**{ratio:.2f} times** the active latents of a Gated SAE with unit norms. (Standard: "
        f"{standard:.2f} times.)"
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
def two_vectors_chart(degrees, length, trained):
    """x, x̂, the two best multiples, and the circle γ = 1. trained: [(kind, degrees, length)]."""

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
    dots = points([(kind, 0, polar(math.radians(turn), c)) for kind, turn, c in trained], *axes)
    kinds, green = [kind for kind, *_ in trained], "#009e73"
    key = {"legend": alt.Legend(title=None, orient="top", columns=2, symbolLimit=9)}
    faint = alt.condition("datum.what == 'x'", alt.value(0.45), alt.value(1))
    names = arrows.transform_filter("datum.k").mark_text(dx=12, dy=-10, fontSize=16, color=green)
    arrows = arrows.mark_line(strokeWidth=4, color=green)
    feet = feet.mark_point(size=80, color=GREY, filled=False, strokeWidth=2)
    chart = alt.layer(
        circle.mark_line(color=GREY).encode(order="k:Q"),
        drops.mark_line(color=GREY, strokeDash=[4, 3]).encode(detail="what:N", order="k:Q"),
        arrows.encode(detail="what:N", order="k:Q", opacity=faint),
        names.encode(text="what:N"),
        feet.encode(tooltip="what:N"),
        dots.mark_point(size=110, filled=True, opacity=1).encode(
            color=alt.Color("what:N", scale=measure.colours(*kinds), **key),
            shape=alt.Shape("what:N", scale=measure.shapes(*kinds), **key),
            tooltip="what:N",
        ),
    )
    return panel(chart, 300, 300)


@app.function
def two_vectors_sentence(degrees, m):
    return (
        f"γ = **{m.gamma:.2f}**, so {m.factor_on_x_hat:.2f} x̂ is the best multiple of x̂ (1/γ). The "
        f"best multiple of x is {m.factor_on_x:.2f} x. Were the two reciprocal, their product "
        f"would be 1; it is **{m.cosine_squared:.2f}**, the squared cosine of {degrees}°. The norm "
        f"ratio ‖x̂‖²/‖x‖² is {m.norm_ratio:.2f}."
    )


@app.function
def typical(rows, kinds=("Standard", "Gated")):
    """[(kind, degrees, length)] of x̂ to x at FVU 0.2, means over seeds, from results/runs.json."""
    keys = "cosine_squared", "norm_ratio"
    found = [measure.mean_at_fvu(rows, kind, keys=keys) for kind in kinds]
    return [
        (kind, math.degrees(math.acos(cosine_squared**0.5)), norm_ratio**0.5)
        for kind, (_, cosine_squared, norm_ratio) in zip(kinds, found, strict=True)
    ]


@app.function
def frontier_chart(rows):
    """FVU against L0, both logarithmic: a line, a colour and a shape for each variant."""
    rows = [row for row in rows if row["l0"] > 0.3]
    chart = measure.curves(rows, "fvu", "FVU: variance unexplained", legend="bottom")
    tips = [alt.Tooltip(f"{key}:Q", format=".3g") for key in ("l1", "l0", "fvu", "gamma")]
    return chart.encode(tooltip=["variant:N", *tips])


@app.function
def frontier_sentence(rows, world_name):
    """What "half as many features" comes to."""
    plain, wide = (
        measure.spread(measure.l0_ratios(rows, variant, "Gated", world_name))["mean"]
        for variant in ("Standard", "Standard 1.5x")
    )
    standard, gated = (
        measure.spread(measure.means(rows, kind, world_name))["mean"]
        for kind in ("Standard", "Gated")
    )
    return (
        f"At equal FVU, a Standard SAE has **{plain:.1f} times** as many latents firing on a row "
        f"as a Gated SAE, and one 1.5 times as wide {wide:.1f} times. γ is "
        f"{standard:.2f} for Standard and **{gated:.2f}** for Gated."
    )


@app.function
def small_world(seed):
    """40 features in 20 dimensions, 2 active: small enough to train on while you wait."""
    return SuperpositionData(20, 40, firing=2 / 40, seed=seed)


@app.function
def live_runs(sizes, steps, seed, n_l1=5):
    """A small sweep: (rows of the table, the trained SAE of each row). sizes: (variant, d_sae)s."""
    data, rows, saes = small_world(seed), [], []
    held_out = list(itertools.islice(data.batches(1000, seed + 20_000), 5))
    # Another seed than the data's: from the same one both would draw the same directions.
    options = {"d_in": 20, "seed": seed + 30_000, "lr": 3e-2}
    for variant, d_sae in sizes:
        recipe = EVIDENCE[variant]._replace(width=1)
        l1, options["d_sae"] = recipe.strengths(n_l1), d_sae
        swept = measure.swept(
            recipe, lambda offset: data.batches(256, seed + offset), l1, steps, held_out, **options
        )
        for at, sae, row in swept:
            rows.append({"variant": variant, "l1": round(l1[at].item(), 3)} | row)
            saes.append(sae)
    return rows, saes


@app.function
def live_chart(rows):
    """The frontier, with points that can be picked."""
    chart = frontier_chart(rows)
    pick = alt.selection_point(name="pick", fields=["variant", "l1"], nearest=True, on="click")
    marks = chart.mark_point(size=110, filled=True, opacity=1).add_params(pick)
    line = chart.mark_line(strokeWidth=2).encode(shape=alt.Undefined)
    return panel(alt.layer(line, marks), 320)


@app.function
def picked(rows, selections, chosen):
    """Which row was clicked in the chart, else the one chosen before."""
    pick, keys = selections.get("pick") or {}, ("variant", "l1")
    hits = (i for i, row in enumerate(rows) if all(row[key] in pick.get(key, []) for key in keys))
    return next(hits, chosen)


@app.function
def latents_of(sae, data, rows=4000):
    """For each latent that fires: the true feature it points at, and what it makes of it."""
    x, f = data.sample(rows, torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = sae.encode(x)
        directions = torch.nn.functional.normalize(sae.W_dec, dim=-1)
        cosine, feature = (directions @ data.dictionary.T).max(-1)
    true = f[:, feature]
    both = (found > 0) & (true > 0)
    share = (found * both).sum(0) / (true * both).sum(0).clamp_min(1e-9)
    fires = (found > 0).float().mean(0)
    table = zip(cosine.tolist(), share.tolist(), fires.tolist(), both.any(0).tolist(), strict=True)
    return [{"cosine": c, "share": s, "fires": p} for c, s, p, seen in table if seen]


@app.function
def latents_chart(latents, variant):
    colour, shape = PALETTE[variant]
    dots = alt.Chart(alt.Data(values=latents))
    dots = dots.mark_point(filled=True, size=70, opacity=0.6, color=colour, shape=shape)
    x = axis(alt.X, "cosine with the nearest true feature", 5, "cosine", zero=False, domainMax=1)
    y = axis(alt.Y, "coefficient / true strength", 6, "share", domain=[0, 1.4], clamp=True)
    tips = [alt.Tooltip(f"{k}:Q", format=".2f") for k in ("cosine", "share", "fires")]
    return panel(rule(y=1) + dots.encode(x, y, tooltip=tips), 240)


@app.function
def latents_sentence(row, latents):
    shares = torch.tensor([latent["share"] for latent in latents])
    true = sum(latent["cosine"] > 0.9 for latent in latents)
    return (
        f"**{row['variant']}, λ = {row['l1']:.2f}**: {row['l0']:.1f} latents fire on a row, FVU "
        f"{row['fvu']:.2f}, γ {row['gamma']:.2f}. {true} of the {len(latents)} latents that fire "
        f"point at a true feature (cosine above 0.9); the median latent gives back "
        f"**{100 * shares.median():.0f}%** of its feature's strength."
    )


@app.function
def jump_numbers(theta, z):
    """What IG and patching say of one latent that goes from 0 to z, as (JumpReLU, shifted ReLU)."""
    z, zero = torch.tensor([[z]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    bound = torch.tensor([theta], dtype=torch.float64)
    functions = (
        lambda v: gated_sae.jump_relu(v, bound).sum(-1),
        lambda v: (v - theta).relu().sum(-1),
    )
    paths = [claims.integrated_gradients(fn, z, zero, steps=500).item() for fn in functions]
    patches = [(fn(z) - fn(zero)).item() for fn in functions]
    return list(zip(paths, patches, strict=True))


@app.function
def jump_chart(theta, z):
    ends = {0.0, theta, theta + 1e-9, z, z + 1e-9, 2.0}  # they bend only there
    path = torch.tensor(sorted(ends), dtype=torch.float64)
    jump = gated_sae.jump_relu(path[:, None], torch.tensor([theta], dtype=torch.float64))[:, 0]
    curves = {"JumpReLU": jump, "ReLU(z - θ)": (path - theta).relu()}
    values = [row | {"travelled": row["x"] <= z} for row in rows_of(curves, path)]
    looks = [(PALETTE["JumpReLU"][0], [1, 0]), (GREY, [8, 4])]
    x = axis(alt.X, "pre-activation on its way from 0 to z", 5)
    faint = alt.condition("datum.travelled", alt.value(1), alt.value(0.25))
    more = {"opacity": faint, "detail": "travelled:N"}
    return panel(rule(x=z) + lines(values, x, axis(alt.Y, "output", domain=[0, 2]), looks, **more))


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
    found = [
        measure.spread(measure.l0_ratios(rows, v, "Gated", "language model", by))["mean"]
        for v, by in itertools.product(("Standard", "Standard 1.5x"), ("lost", "fvu"))
    ]
    return (
        f"At equal CE, a Standard SAE has **{found[0]:.2f} times** as many latents firing on a "
        f"byte as a Gated one, and one 1.5 times as wide {found[2]:.2f} times. At equal FVU it "
        f"looks like {found[1]:.2f} and {found[3]:.2f} times."
    )


@app.function
def spliced_chart(found, key, title, levels=()):
    """A column of the language model's table against L0; levels: (number, name), drawn across."""
    values = [{key: level, "name": name} for level, name in levels]
    names = alt.Chart(alt.Data(values=values)).encode(y=f"{key}:Q", text="name:N")
    names = names.mark_text(align="left", dx=4, dy=-7, x=0, color=GREY)
    curves = measure.curves(found["table"], key, title, per="byte", log=False)
    tips = [alt.Tooltip(f"{k}:Q", format=".3f") for k in ("l0", key)]
    across = [rule(y=level) for level, _ in levels]
    return panel(alt.layer(*across, names, curves.encode(tooltip=["variant:N", *tips])), 280)


@app.function
def recovered_sentence(found):
    """What the baseline moves, and what it cannot."""
    rows, names = found["table"], ("zero", "mean")
    gap = sorted(100 * abs(row["recovered_mean"] - row["recovered_zero"]) for row in rows)
    orders = [sorted(range(len(rows)), key=lambda i: rows[i][f"recovered_{a}"]) for a in names]
    kinder = "mean" if found["ce"]["mean"] > found["ce"]["zero"] else "zero"
    same = "the same" if orders[0] == orders[1] else "not the same"
    return (
        f"In this model the **{kinder}** is the worse thing to put in: CE "
        f"{found['ce']['zero']:.2f} with zeros, {found['ce']['mean']:.2f} with the mean. So the "
        f"scores against the {kinder} are {gap[0]:.1f} to {gap[-1]:.1f} points higher. The "
        f"order of the {len(rows)} SAEs is **{same}** under both."
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
    words = []
    for kind in ("toy data", "language model"):
        found = {row["id"]: row["verdict"][kind] for row in claimed if kind in row["verdict"]}
        wrong = [number for number, verdict in found.items() if verdict == "disagrees"]
        words.append(
            f"of {len(found)} claims measured on the {kind}, **{len(found) - len(wrong)}** agree "
            f"and {', '.join(wrong) or 'none'} disagree".replace("the toy", "toy")
        )
    return f"{words[0][0].upper()}{words[0][1:]}; {words[1]}."


if __name__ == "__main__":
    app.run()
