"""The lesson: `marimo run explainer.py`. Its experiment, as a table: `python explainer.py`."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Gated Sparse Autoencoders")

with app.setup:
    import argparse
    import inspect
    import itertools
    import json
    import math
    import sys
    import warnings
    from pydoc_data.topics import topics

    import altair as alt
    import marimo as mo
    import torch

    from gated_sae import (
        GatedSAE,
        JumpReLUSAE,
        Moments,
        NaturalGatedSAE,
        SigmoidGatedSAE,
        SoftCutoffSAE,
        StandardSAE,
        activation_patching,
        evaluate,
        gate,
        gated_losses,
        harvest,
        incorrect_losses,
        integrated_gradients,
        jump_relu,
        loss_recovered,
        moments,
        norm_penalty,
        rescale_and_shift,
        shrink,
        shuffle,
        splice,
        step_on_unit_norm,
        to_jumprelu,
        train,
        two_standard_losses,
    )
    from toy_data import SuperpositionData, random_directions, recovery, zipf

    RESULTS = mo.notebook_dir() / "results"
    D_IN, N_FEATURES, ACTIVE = 64, 256, 5
    # What is compared: (kind, d_sae, (least λ, most λ)). The ranges of L0 overlap; Gated needs
    # larger λ for the same L0. Its step has three products with a weight matrix where Standard has
    # two, so at equal training compute the Standard SAE may be 1.5 times as wide.
    COMPARED = {
        "Standard": (StandardSAE, N_FEATURES, (0.2, 1.6)),
        "Standard 1.5x": (StandardSAE, 3 * N_FEATURES // 2, (0.2, 1.6)),
        "Gated": (GatedSAE, N_FEATURES, (0.4, 2.8)),
    }
    # The evidence for the claims: (kind, options, (least λ, most λ)), then what becomes of some of
    # them once trained; `refit` trains without penalty.
    LOW, HIGH = (0.15, 1.2), (0.3, 2.4)
    EVIDENCE = {
        "Standard": (StandardSAE, {}, LOW),
        "Standard 1.5x": (StandardSAE, {"d_sae": 192}, LOW),
        "Gated": (GatedSAE, {}, HIGH),
        "rescale & shift": (StandardSAE, {}, (0.2, 2.4)),
        "rescale & shift, decoder too": (StandardSAE, {}, (0.2, 2.4)),
        "natural b_mag": (NaturalGatedSAE, {}, (0.6, 4.8)),
        "log penalty": (StandardSAE, {"penalty": "log"}, (0.3, 2.0)),
        "soft cutoff": (SoftCutoffSAE, {}, LOW),
        "JumpReLU": (JumpReLUSAE, {}, (0.05, 0.6)),
    }
    FINISH = {
        "rescale & shift": lambda sae, refit: refit(rescale_and_shift(sae)),
        "rescale & shift, decoder too": lambda sae, refit: refit(rescale_and_shift(sae, True)),
        "soft cutoff": lambda sae, refit: to_jumprelu(sae),
    }
    ABLATIONS = {
        "log penalty, a = 4": (StandardSAE, {"penalty": "log", "a": 4.0}, (0.06, 0.5)),
        "aux unfrozen": (GatedSAE, {"aux": "unfrozen"}, LOW),
        "without aux": (GatedSAE, {"aux": None}, HIGH),
        "without r_mag": (GatedSAE, {"freeze": "r_mag"}, HIGH),
        "untied": (GatedSAE, {"tied": False}, HIGH),
        "sigmoid gate, without aux": (SigmoidGatedSAE, {"aux": None}, LOW),
        "norms frozen, aux frozen": (GatedSAE, {"penalty": "norm_frozen"}, HIGH),
        "norms live, aux unfrozen": (GatedSAE, {"penalty": "norm_live", "aux": "unfrozen"}, LOW),
        "norms live, aux frozen": (GatedSAE, {"penalty": "norm_live"}, HIGH),
        "norms frozen, aux unfrozen": (
            GatedSAE,
            {"penalty": "norm_frozen", "aux": "unfrozen"},
            LOW,
        ),
        "encoder drawn apart": (GatedSAE, {"encoder": "apart"}, HIGH),
        "no λ warm-up": (GatedSAE, {"l1_warmup": 0.0}, HIGH),
    }
    # What is spliced into the language model, its MLP's 128 numbers: as COMPARED, 4 times as wide.
    SPLICED = {
        "Standard": (StandardSAE, 512, (0.5, 8.0)),
        "Standard 1.5x": (StandardSAE, 768, (0.5, 8.0)),
        "Gated": (GatedSAE, 512, (1.0, 16.0)),
    }
    STAR = "M0,-1L.25,-.3L1,-.3L.4,.15L.6,.9L0,.45L-.6,.9L-.4,.15L-1,-.3L-.25,-.3Z"
    # Colour and shape of each variant, the same in every picture: Okabe and Ito's colours, two of
    # them changed to be seen on black as well as on white.
    PALETTE = {
        "Standard": ("#d55e00", "square"),
        "Standard 1.5x": ("#e69f00", "triangle-up"),
        "Gated": ("#0072b2", "circle"),
        "rescale & shift": ("#009e73", "diamond"),
        "rescale & shift, decoder too": ("#56b4e9", "cross"),
        "natural b_mag": ("#cc79a7", "triangle-down"),
        "log penalty": ("#999999", "triangle-left"),
        "soft cutoff": ("#a39a00", "triangle-right"),
        "JumpReLU": ("#785ef0", STAR),
    }
    COLOURS, SHAPES = (
        alt.Scale(domain=list(COMPARED), range=[PALETTE[variant][i] for variant in COMPARED])
        for i in (0, 1)
    )
    GREY = "#888888"
    # Trained while the reader waits: d_sae for each variant, for 40 features in 20 dimensions.
    LIVE = {"Standard": 40, "Standard 1.5x": 60, "Gated": 40, "rescale & shift": 40, "JumpReLU": 40}


@app.function
def sweep(steps, seed=0, n_l1=10, batch=512, progress=lambda variant, steps: None):
    """Train each kind over a range of λ, as one stack; the rows of the results table.

    All see the same data in the same order, and are measured on the same 20 000 fresh rows.
    `progress` is told, now and then, how many steps of which kind were done since it was last told.
    """
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    data = SuperpositionData(D_IN, N_FEATURES, firing=ACTIVE / N_FEATURES, seed=seed, device=device)
    held_out = list(itertools.islice(data.batches(1000, seed=seed + 10_000), 20))
    table = []
    for name, (kind, d_sae, (least, most)) in COMPARED.items():
        l1 = torch.logspace(math.log10(least), math.log10(most), n_l1)
        sae = kind(D_IN, d_sae, stack=n_l1, generator=torch.Generator().manual_seed(seed))
        # On data this small a rate of 1e-2 learns in thousands of steps what the paper's 3e-4, made
        # for language models, does not reach in tens of thousands.
        done = 0
        for record in train(
            sae, data.batches(batch, seed), l1=l1, steps=steps, lr=1e-2, log_every=50
        ):
            progress(name, record.step - done)
            done = record.step
        measured = evaluate(sae, held_out)
        for i in range(n_l1):
            scalars = {
                key: round(getattr(measured, key)[i].item(), 5)
                for key in ("l0", "fvu", "gamma", "norm_ratio", "dead_fraction")
            }
            table.append({"variant": name, "d_sae": d_sae, "l1": round(l1[i].item(), 4)} | scalars)
    return table


@app.function
def frontier(table, variant):
    """Rows that no other of the variant beats in both FVU and L0, by rising FVU."""
    best = []
    for row in sorted((r for r in table if r["variant"] == variant), key=lambda r: r["fvu"]):
        if not best or row["l0"] < best[-1]["l0"]:
            best.append(row)
    return best


@app.function
def at_fvu(table, variant, fvu, keys=("gamma",)):
    """(L0, γ) where a variant's frontier reaches an FVU, between two of its points, or None.

    Log L0 and γ, or any other keys, are interpolated in log FVU.
    """
    for left, right in itertools.pairwise(frontier(table, variant)):
        if left["fvu"] <= fvu <= right["fvu"] and right["l0"] > 0:
            t = math.log(fvu / left["fvu"]) / math.log(right["fvu"] / left["fvu"])
            log_l0 = (1 - t) * math.log(left["l0"]) + t * math.log(right["l0"])
            return math.exp(log_l0), *((1 - t) * left[key] + t * right[key] for key in keys)
    return None


@app.function
def comparison(table, levels=(0.125, 0.15, 0.2, 0.25, 0.3, 0.4)):
    """At each FVU that all kinds reach: L0 and γ of each, and L0 as a multiple of Gated's."""
    rows = []
    for fvu in levels:
        found = {variant: at_fvu(table, variant, fvu) for variant in COMPARED}
        if all(found.values()):
            row = {"FVU": fvu}
            row |= {f"L0 {variant}": round(l0, 2) for variant, (l0, _) in found.items()}
            row |= {f"γ {variant}": round(gamma, 3) for variant, (_, gamma) in found.items()}
            for variant in list(COMPARED)[:-1]:
                row[f"{variant} / Gated"] = round(found[variant][0] / found["Gated"][0], 2)
            rows.append(row)
    return rows


@app.function
def verdict(table):
    """The sentence that the figures add up to, with its numbers computed from the table."""
    rows = comparison(table)
    if not rows:
        return "The kinds share no level of FVU, so they cannot be compared: train for longer."

    def span(column, digits):
        values = [row[column] for row in rows]
        return " to ".join(f"{value:.{digits}f}" for value in (min(values), max(values)))

    return (
        f"At equal FVU, Gated needs {span('Standard / Gated', 1)} times fewer active latents than "
        f"Standard, and {span('Standard 1.5x / Gated', 1)} times fewer than a Standard SAE "
        f"1.5 times as wide; γ is {span('γ Gated', 2)} for Gated and {span('γ Standard', 2)} for "
        f"Standard."
    )


@app.function
def pareto_chart(table):
    """FVU and γ against L0, a line for each variant."""
    base = (
        alt.Chart(alt.Data(values=[row for row in table if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2)
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                title="L0: latents active per row",
            ),
            color=alt.Color(
                "variant:N", scale=COLOURS, legend=alt.Legend(title=None, orient="top")
            ),
            shape=alt.Shape("variant:N", scale=SHAPES),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "fvu:Q", "gamma:Q", "dead_fraction:Q"],
        )
        .properties(width=330, height=280)
    )
    fvu = base.encode(
        y=alt.Y("fvu:Q", scale=alt.Scale(type="log"), title="FVU: variance unexplained")
    )
    one = alt.Chart(alt.Data(values=[{"one": 1}])).mark_rule(strokeDash=[4, 4]).encode(y="one:Q")
    gamma = base.encode(y=alt.Y("gamma:Q", scale=alt.Scale(zero=False), title="γ: at 1, no bias"))
    return fvu | (one + gamma)


@app.function
def as_markdown(rows):
    """Rows as a table that reads as well in a terminal as in a README."""
    columns = list(rows[0])
    lines = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "\n".join(f"| {' | '.join(map(str.rjust, line, widths))} |" for line in lines)


@app.function
def world(name, seed):
    """One of three data sets of 128 features in 32 dimensions, 4 active on average."""
    if name == "plain":
        return SuperpositionData(32, 128, firing=4 / 128, seed=seed)
    if name == "Zipf, correlated":
        return SuperpositionData(32, 128, firing=zipf(128, 4), correlation=0.3, seed=seed)
    # 32 parents with three children each, which fire on a quarter of their parent's occasions
    p = 4 / (32 * 1.75)
    parents = [-1] * 32 + [i // 3 for i in range(96)]
    return SuperpositionData(32, 128, firing=[p] * 32 + [p / 4] * 96, parents=parents, seed=seed)


@app.function
def measured_runs(name, make, options, span, seeds=5, steps=1500, n_l1=5, world_name="plain"):
    """Rows of metrics for each seed and λ, trained as one stack; each seed has data of its own."""
    options = dict(options)
    l1s = [round(v.item(), 4) for v in torch.logspace(*(math.log10(v) for v in span), n_l1)]
    data = [world(world_name, seed) for seed in range(seeds)]

    def stream(offset, batch=256):
        streams = [d.batches(batch, seed + offset) for seed, d in enumerate(data)]
        while True:
            x = torch.stack([next(one) for one in streams]).unsqueeze(1)
            yield x.expand(seeds, n_l1, batch, 32)

    frozen, encoder = options.pop("freeze", None), options.pop("encoder", None)
    schedule = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
    schedule |= {"l1_warmup": options.pop("l1_warmup", 0.1)}
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the combinations that fail are here to be seen failing
        sae = make(
            32, options.pop("d_sae", 128), stack=(seeds, n_l1), generator=generator, **options
        )
        if frozen:
            getattr(sae, frozen).requires_grad_(False)
        if encoder:
            sae.W_enc.data = make(32, 128, stack=(seeds, n_l1), generator=generator).W_enc.data
        list(train(sae, stream(0), l1=torch.tensor(l1s).expand(seeds, n_l1), **schedule))

        def refit(corrected):
            list(train(corrected, stream(10_000), l1=0.0, **schedule))
            return corrected

        sae = FINISH.get(name, lambda sae, refit: sae)(sae, refit)
        found = evaluate(sae, itertools.islice(stream(20_000, 1000), 10))
        rows = []
        for seed, j in itertools.product(range(seeds), range(n_l1)):
            member = type(sae)(**(sae.config | {"stack": ()}))
            member.load_state_dict({key: value[seed, j] for key, value in sae.state_dict().items()})
            scores = recovery(member, data[seed], rows=2000)
            row = {"world": world_name, "variant": name, "seed": seed, "l1": l1s[j]}
            for key in ("l0", "fvu", "gamma", "norm_ratio", "cosine_squared", "dead_fraction"):
                row[key] = round(getattr(found, key)[seed, j].item(), 5)
            row |= {"mcc": round(scores.mcc, 4), "f1": round(scores.f1, 4)}
            row["norm"] = round(member.W_dec.norm(dim=-1).mean().item(), 4)
            rows.append(row)
    return rows


@app.function
def spread(values):
    """Mean and standard error of one number per seed."""
    values = torch.tensor([float(value) for value in values], dtype=torch.float64)
    se = values.std() / len(values) ** 0.5 if len(values) > 1 else torch.zeros(())
    return {"mean": float(f"{values.mean().item():.4g}"), "se": float(f"{se.item():.2g}")}


@app.function
def l0_ratios(rows, variant, other, world_name="plain", levels=(0.1, 0.15, 0.2, 0.3)):
    """Per seed: L0 of a variant over that of another, geometric mean over the FVU both reach."""
    ratios = []
    for seed in sorted({row["seed"] for row in rows}):
        own = [row for row in rows if row["seed"] == seed and row["world"] == world_name]
        found = [(at_fvu(own, variant, fvu), at_fvu(own, other, fvu)) for fvu in levels]
        logs = [math.log(a[0] / b[0]) for a, b in found if a and b]
        if logs:
            ratios.append(math.exp(sum(logs) / len(logs)))
    return ratios


@app.function
def gammas(rows, variant, world_name="plain"):
    """Per seed: mean γ over the λ whose SAE explains between 60% and 95% of the variance."""
    kept = {}
    for row in rows:
        if (row["variant"], row["world"]) == (variant, world_name) and 0.05 < row["fvu"] < 0.4:
            kept.setdefault(row["seed"], []).append(row["gamma"])
    return [sum(values) / len(values) for values in kept.values()]


@app.function
def trained_pair(seeds=5, steps=1500):
    """(Standard, Gated, x): a stack over seeds of each, trained on the plain world; fresh rows."""
    data = [world("plain", seed) for seed in range(seeds)]

    def stream(offset, batch):
        streams = [d.batches(batch, seed + offset) for seed, d in enumerate(data)]
        while True:
            yield torch.stack([next(one) for one in streams])

    saes = []
    for kind, l1 in ((StandardSAE, 0.4), (GatedSAE, 0.9)):
        sae = kind(32, 128, stack=seeds, generator=torch.Generator().manual_seed(0))
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, stream(0, 256), l1=l1, **options))
        saes.append(sae.double())
    return *saes, next(stream(20_000, 5000)).double()


@app.function
def members(sae):
    """The single SAEs of a stack with one leading dimension."""
    for i in range(sae.stack[0]):
        member = type(sae)(**(sae.config | {"stack": ()}), dtype=sae.W_enc.dtype)
        member.load_state_dict({name: value[i] for name, value in sae.state_dict().items()})
        yield member


@app.function
def gradient(sae, value, name):
    """d value / d parameter, zeros where it does not reach."""
    (grad,) = torch.autograd.grad(
        value, [getattr(sae, name)], allow_unused=True, materialize_grads=True, retain_graph=True
    )
    return grad


@app.function
def exact_numbers(seeds=5, steps=1500):
    """What needs no sweep: {claim id: {quantity: one number per seed}}, on one trained pair."""
    standard, gated, x_all = trained_pair(seeds, steps)
    numbers = {}

    def note(claim, quantity, value):
        value = value.item() if isinstance(value, torch.Tensor) else value
        numbers.setdefault(claim, {}).setdefault(quantity, []).append(value)

    for seed, (s, g, x) in enumerate(zip(members(standard), members(gated), x_all, strict=True)):
        # S1: gradient descent on (a - f)² + λ f, f ≥ 0
        draw = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed)).double()
        a, l1, f = 4 * draw[0] - 1, draw[1], torch.ones(50).double()
        for _ in range(300):
            f = (f - 0.1 * (2 * (f - a) + l1)).clamp_min(0)
        note("S1", "largest distance to closed form", (f - (a - l1 / 2).clamp_min(0)).abs().max())

        x_hat = s(x).detach()
        m = moments(x, x_hat)
        grid = torch.linspace(0.5, 1.5, 100_001).double()
        cost = m.x_hat_sq / grid**2 - 2 * m.dot / grid + m.x_sq
        note("S2", "γ of Standard", m.gamma)
        note("S2", "its distance to the best of a grid", (grid[cost.argmin()] - m.gamma).abs())
        error_sq = (x - x_hat).square().sum(-1).mean()
        logged = Moments.from_norms(m.x_sq, m.x_hat_sq, error_sq)
        note("S3", "distance between the two γ", (logged.gamma - m.gamma).abs())
        rest = ((x_hat - m.factor_on_x * x) * x).sum(-1).mean() / m.dot
        note("S4", "factor on x", m.factor_on_x)
        note("S4", "what is left along x, relative", rest.abs())
        note("S5", "factor on x times factor on x̂", m.cosine_squared)
        note("S5", "factor on x̂ times γ", m.factor_on_x_hat * m.gamma)
        note("S6", "first preprint's value over γ, Standard", m.gamma_v1 / m.gamma)
        half = moments(torch.ones(1, 1).double(), torch.full((1, 1), 0.5).double())
        note("S6", "first preprint's value at x = 1, x̂ = 1/2", half.gamma_v1)
        n = moments(x, g(x).detach())
        note("S6", "first preprint's value over γ, Gated", n.gamma_v1 / n.gamma)
        note("S7", "γ of Gated", n.gamma)
        note("S7", "norm ratio of Gated", n.norm_ratio)

        losses = g.losses(x)
        note(
            "G1",
            "largest absolute gradient of reconstruct on b_gate",
            gradient(g, losses.reconstruct, "b_gate").abs().max(),
        )
        untied = GatedSAE(32, 128, tied=False, dtype=torch.float64)
        untied.load_state_dict(
            {n: getattr(g, n) for n in ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag")}
            | {"W_mag": g.W_enc * g.r_mag.exp()}
        )
        note(
            "G1",
            "the same on an untied W_gate",
            gradient(untied, untied.losses(x).reconstruct, "W_enc").abs().max(),
        )
        wrong = GatedSAE(32, 128, aux=None, dtype=torch.float64)
        wrong.load_state_dict(g.state_dict())
        note(
            "G2",
            "smallest gradient of L_incorrect on b_gate",
            gradient(wrong, wrong.losses(x).total(0.9), "b_gate").min(),
        )
        note(
            "G3",
            "largest absolute gradient of L_aux on W_dec",
            gradient(g, losses.aux, "W_dec").abs().max(),
        )
        note(
            "G3",
            "largest absolute gradient of L_aux on b_dec",
            gradient(g, losses.aux, "b_dec").abs().max(),
        )
        loose = GatedSAE(32, 128, aux="unfrozen", dtype=torch.float64)
        loose.load_state_dict(g.state_dict())
        pi_gate, pi_mag = loose.paths(x)
        both = two_standard_losses(
            x, loose.gate(pi_gate, pi_mag), pi_gate, loose.W_dec, loose.b_dec
        )
        two, three = (sum(part.total(0.9) for part in both), loose.losses(x).total(0.9))
        note(
            "G4",
            "largest distance of gradients",
            max(
                (gradient(loose, two, p) - gradient(loose, three, p)).abs().max()
                for p, _ in loose.named_parameters()
            ),
        )
        note(
            "G7",
            "largest distance of outputs",
            (to_jumprelu(g).encode(x) - g.encode(x)).abs().max(),
        )
        natural = NaturalGatedSAE(32, 128, dtype=torch.float64)
        natural.load_state_dict({n: v for n, v in g.state_dict().items() if n != "b_mag"})
        smooth = natural.r_mag.exp() * natural.paths(x)[0].relu()
        note(
            "G8",
            "largest distance to exp(r_mag) ReLU(π_gate)",
            (natural.encode(x) - smooth).abs().max(),
        )

        # A7: x and all biases times 3
        for normalize in (True, False):
            big = GatedSAE(32, 128, normalize=normalize, dtype=torch.float64)
            small = GatedSAE(32, 128, normalize=normalize, dtype=torch.float64)
            small.load_state_dict(g.state_dict())
            big.load_state_dict(
                {n: 3 * v if n.startswith("b_") else v for n, v in g.state_dict().items()}
            )
            with torch.no_grad():
                ratio = [b / a for a, b in zip(small.losses(x), big.losses(3 * x), strict=True)]
            name = "normalised" if normalize else "plain"
            note("A7", f"error at 3 x over error at x, {name}", ratio[0])
            note("A7", f"sparsity at 3 x over sparsity at x, {name}", ratio[1])

        # D1: a random softmax head reads x; its own samples are the labels
        generator = torch.Generator().manual_seed(seed)
        head = torch.randn(32, 50, generator=generator).double()
        labels = torch.multinomial((x @ head).softmax(-1), 1, generator=generator)[:, 0]
        ce = lambda v: torch.nn.functional.cross_entropy(v @ head, labels)  # noqa: B023, E731
        clean, zero, mean = ce(x), ce(0 * x), ce(x.mean(0).expand_as(x))
        for kind, sae in (("Standard", s), ("Gated", g)):
            for ablation, ablated in (("zero", zero), ("mean", mean)):
                note(
                    "D1",
                    f"{kind}, {ablation} ablation",
                    loss_recovered(ce(sae(x)), clean, ablated).detach(),
                )

        # D3: attributions to π_mag of the sum of f̃, from a baseline of 0
        jump = to_jumprelu(g)
        pi = (jump.project(x[:200]) + jump.b_enc).detach()
        out = lambda z: jump_relu(z, jump.threshold).sum(-1)  # noqa: B023, E731
        total = integrated_gradients(out, pi, torch.zeros_like(pi), steps=2000).sum(-1)
        jumps = ((pi > jump.threshold) * jump.threshold).sum(-1)
        gap = out(pi) - out(torch.zeros_like(pi)) - total
        note("D3", "completeness gap of IG", gap.mean().detach())
        note("D3", "sum of the jumps crossed", jumps.mean().detach())
    return numbers


@app.function
def dead_latents(seeds=5, steps=1500):
    """Share of latents that do not fire after training with half of them started dead."""
    shares = {}
    for name, every in (
        ("without resampling", None),
        ("resampled every tenth of the run", steps // 10),
    ):
        data = [world("plain", seed) for seed in range(seeds)]

        def stream(offset, data=data):
            streams = [d.batches(256, seed + offset) for seed, d in enumerate(data)]
            while True:
                yield torch.stack([next(one) for one in streams])

        sae = GatedSAE(32, 128, stack=seeds, generator=torch.Generator().manual_seed(0))
        sae.b_gate.data[:, ::2] = -1e3
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, stream(0), l1=0.6, resample_every=every, **options))
        found = evaluate(sae, itertools.islice(stream(20_000), 40))
        shares[f"dead latents {name}"] = found.dead_fraction.tolist()
    return shares


@app.function
def claims(rows, numbers):
    """The table: each claim of the discussion, what was measured of it here, and whether it agrees.

    `rows` are those of `measured_runs`, `numbers` those of `exact_numbers` and `dead_latents`. A
    verdict is computed, never written: `agrees` if the stated inequality holds for the mean by two
    standard errors (exact claims: to rounding), `disagrees` if not.
    """
    plain = [row for row in rows if row["world"] == "plain"]

    def ratio(variant, other="Gated", world_name="plain"):
        return l0_ratios(rows, variant, other, world_name)

    def final(variant, key, chosen=max):
        """Per seed, a metric at the largest (or smallest) λ."""
        own = [row for row in plain if row["variant"] == variant]
        l1 = chosen(row["l1"] for row in own)
        return [row[key] for row in own if row["l1"] == l1]

    def above(values, bound):
        found = spread(values)
        return found["mean"] - 2 * found["se"] > bound

    def below(values, bound):
        found = spread(values)
        return found["mean"] + 2 * found["se"] < bound

    def near(values, bound, within):
        return all(abs(value - bound) <= within for value in values)

    table = []

    def row(claim, text, setting, measured, holds):
        measured = {name: values for name, values in measured.items() if values}
        table.append(
            {
                "id": claim,
                "claim": text,
                "setting": setting,
                "seeds": max((len(v) for v in measured.values()), default=0),
                "measured": {name: spread(values) for name, values in measured.items()},
                "verdict": {True: "agrees", False: "disagrees"}.get(
                    holds, "not decidable on toy data"
                ),
            }
        )

    pair = "one Standard (λ 0.4) and one Gated (λ 0.9) SAE a seed, plain world, float64"
    sweep_of = "sweep over λ; L0 at equal FVU (0.1 to 0.3), as a ratio to"
    n = numbers
    s1, s2, s3, s4, s5, s6, s7 = (list(n[f"S{i}"].values()) for i in range(1, 8))
    row(
        "S1",
        "L1 shrinks: gradient descent finds max(0, a - λ/2)",
        "50 random a, λ a seed",
        n["S1"],
        near(s1[0], 0, 1e-9),
    )
    row("S2", "γ = E‖x̂‖²/E[x̂·x] is the best rescaling of x̂", pair, n["S2"], near(s2[1], 0, 1e-5))
    row("S3", "γ follows from three logged numbers", pair, n["S3"], near(s3[0], 0, 1e-9))
    row("S4", "E[x̂·x]/E‖x‖² projects x̂ on x", pair, n["S4"], near(s4[1], 0, 1e-9))
    row(
        "S5",
        "the two best factors are not reciprocal; the one on x̂ is 1/γ",
        pair,
        n["S5"],
        below(s5[0], 1) and near(s5[1], 1, 1e-9),
    )
    row(
        "S6",
        "the first preprint's formula is right at γ = 1 only; it gave 1/√3 for 1/2",
        pair,
        n["S6"],
        near(s6[1], 3**-0.5, 1e-9) and above(s6[0], 1) and near(s6[2], 1, 1e-2),
    )
    row(
        "S7",
        "an unbiased SAE has a norm ratio below 1",
        pair,
        n["S7"],
        near(s7[0], 1, 0.02) and below(s7[1], 0.98),
    )
    g1, g3 = list(n["G1"].values()), list(n["G3"].values())
    row(
        "G1",
        "reconstruction gives the gate no gradient: exactly 0",
        pair,
        n["G1"],
        near(g1[0] + g1[1], 0, 0),
    )
    dying = {
        "L0 without aux": final("without aux", "l0", min),
        "L0 with aux, same λ": final("Gated", "l0", min),
    } | n["G2"]
    row(
        "G2",
        "without L_aux the gradient on b_gate is never negative, and the gates close",
        "smallest λ of the sweep; gradients: " + pair,
        dying,
        min(n["G2"]["smallest gradient of L_incorrect on b_gate"]) >= 0
        and above(
            [
                a / max(b, 1e-9)
                for a, b in zip(dying["L0 with aux, same λ"], dying["L0 without aux"], strict=True)
            ],
            10,
        ),
    )
    row(
        "G3",
        "L_aux with the frozen decoder: W_dec gets exactly 0, b_dec does not",
        pair,
        n["G3"],
        near(g3[0], 0, 0) and min(g3[1]) > 0,
    )
    row(
        "G4",
        "two usual losses have the gradient of three terms, aux unfrozen",
        pair,
        n["G4"],
        near(next(iter(n["G4"].values())), 0, 1e-9),
    )
    alive = {
        "dead latents": final("sigmoid gate, without aux", "dead_fraction"),
        "L0": final("sigmoid gate, without aux", "l0"),
        "FVU": final("sigmoid gate, without aux", "fvu"),
    }
    row(
        "G5",
        "a sigmoid gate trained with L_incorrect alone stays alive (sparse or not: see L0)",
        "largest λ of the sweep",
        alive,
        below(alive["dead latents"], 0.1) and below(alive["FVU"], 0.5),
    )
    ablated = {f"L0 {v} / Gated": ratio(v) for v in ("aux unfrozen", "without r_mag", "untied")}
    row(
        "G6",
        "freezing helps, r_mag helps, untying does not",
        f"{sweep_of} Gated",
        ablated,
        above(ablated["L0 aux unfrozen / Gated"], 1)
        and above(ablated["L0 without r_mag / Gated"], 1)
        and not below(ablated["L0 untied / Gated"], 1),
    )
    row(
        "G7",
        "a tied Gated SAE is a JumpReLU",
        pair,
        n["G7"],
        near(next(iter(n["G7"].values())), 0, 1e-9),
    )
    row(
        "G8",
        "b_mag = exp(r_mag) b_gate removes the jump",
        pair,
        n["G8"],
        near(next(iter(n["G8"].values())), 0, 1e-9),
    )
    a1 = {}
    for variant in ("rescale & shift", "rescale & shift, decoder too"):
        a1 |= {f"γ, {variant}": gammas(rows, variant), f"L0 {variant} / Gated": ratio(variant)}
    row(
        "A1",
        "rescale & shift cures shrinkage but stays behind Gated",
        f"{sweep_of} Gated",
        a1,
        all(near(v, 1, 0.03) for k, v in a1.items() if k[0] == "γ")
        and all(above(v, 1) for k, v in a1.items() if k[0] == "L"),
    )
    a2 = {
        "L0 natural b_mag / Gated": ratio("natural b_mag"),
        "L0 natural b_mag / rescale & shift": ratio("natural b_mag", "rescale & shift"),
        "γ": gammas(rows, "natural b_mag"),
    }
    row(
        "A2",
        "without the Heaviside, y = x̂(t ⊙ f): less expressive than rescale & shift",
        f"{sweep_of} Gated, and to rescale & shift",
        a2,
        above(a2["L0 natural b_mag / rescale & shift"], 1),
    )
    a3 = {
        "γ, log penalty": gammas(rows, "log penalty"),
        "γ, Standard": gammas(rows, "Standard"),
        "L0 log penalty / Standard": ratio("log penalty", "Standard"),
        "γ, a = 4": gammas(rows, "log penalty, a = 4"),
        "L0, a = 4 / Standard": ratio("log penalty, a = 4", "Standard"),
    }
    row(
        "A3",
        "log(1 + a f) in place of L1 lessens shrinkage of the Standard SAE",
        "sweep over λ, a = 1; γ where 60% to 95% of the variance is explained",
        a3,
        above([a - b for a, b in zip(a3["γ, log penalty"], a3["γ, Standard"], strict=True)], 0),
    )
    a4 = {
        "L0 soft cutoff / Standard": ratio("soft cutoff", "Standard"),
        "L0 soft cutoff / Gated": ratio("soft cutoff"),
        "γ": gammas(rows, "soft cutoff"),
    }
    row(
        "A4",
        "the soft cutoff trains, and becomes a JumpReLU as s falls",
        "trained at s = 0.1, measured at its limit s → 0",
        a4,
        bool(a4["L0 soft cutoff / Standard"]) and below(final("soft cutoff", "fvu", min), 0.2),
    )
    fours = (
        "norms frozen, aux frozen",
        "norms live, aux unfrozen",
        "norms live, aux frozen",
        "norms frozen, aux unfrozen",
    )
    a5 = {}
    for variant in fours:
        a5 |= {
            f"L0 {variant} / Gated": ratio(variant),
            f"mean norm, {variant}": final(variant, "norm", min),
        }
    mixed = (
        ratio("norms live, aux frozen", "norms live, aux unfrozen"),
        ratio("norms frozen, aux unfrozen", "norms live, aux unfrozen"),
    )
    row(
        "A5",
        "decoder-norm penalty: freeze in both or neither; in one only is worse",
        f"{sweep_of} Gated; norms at the smallest λ",
        a5,
        all(above(m, 1) for m in mixed if m)
        and below(a5["mean norm, norms live, aux frozen"], 0.5),
    )
    a6 = {f"L0 {v} / Gated": ratio(v) for v in ("encoder drawn apart", "no λ warm-up")}
    row(
        "A6",
        "W_enc starting as W_dec transposed, and warming λ up, help",
        f"{sweep_of} Gated",
        a6,
        all(above(v, 1) for v in a6.values()),
    )
    row(
        "A7",
        "dividing the L2 loss by E‖x‖² carries hyper-parameters over",
        "x and biases times 3: " + pair,
        n["A7"],
        near(n["A7"]["error at 3 x over error at x, normalised"], 1, 1e-9)
        and near(n["A7"]["sparsity at 3 x over sparsity at x, normalised"], 1, 1e-9),
    )
    row(
        "A8",
        "resampling revives dead latents: fewer than half as many are left",
        "Gated, λ 0.6, half the gates started at -1000",
        n["A8"],
        below([b - a / 2 for a, b in zip(*n["A8"].values(), strict=True)], 0),
    )
    wide = {
        f"L0 Standard 1.5x / Gated, {w}": ratio("Standard 1.5x", "Gated", w)
        for w in ("plain", "Zipf, correlated", "hierarchical")
    }
    row(
        "A9",
        "at equal training compute (Standard 1.5 times as wide) Gated is ahead",
        f"{sweep_of} Gated",
        wide,
        all(above(v, 1) for v in wide.values()),
    )
    d1 = n["D1"]
    order = [
        (a > b) == (c > d)
        for a, b, c, d in zip(
            *(
                d1[k]
                for k in (
                    "Standard, zero ablation",
                    "Gated, zero ablation",
                    "Standard, mean ablation",
                    "Gated, mean ablation",
                )
            ),
            strict=True,
        )
    ]
    row(
        "D1",
        "zero ablation inflates loss recovered, and never changes which SAE is ahead",
        "a random softmax head of 50 classes reads x; " + pair,
        d1,
        all(order)
        and above(
            [
                a - b
                for a, b in zip(d1["Gated, zero ablation"], d1["Gated, mean ablation"], strict=True)
            ],
            0,
        ),
    )
    row(
        "D2",
        "compute-efficiency hit, off a scaling curve",
        "needs language models of several sizes",
        {},
        None,
    )
    d3 = n["D3"]
    row(
        "D3",
        "integrated gradients miss exactly the jumps",
        "Gated as JumpReLU, sum of f̃, 200 rows, 2000 steps",
        d3,
        near([a / b for a, b in zip(*d3.values(), strict=True)], 1, 0.01),
    )
    d4 = {
        f"L0 Standard / Gated, {w}": ratio("Standard", "Gated", w)
        for w in ("plain", "Zipf, correlated", "hierarchical")
    }
    d4["γ, Gated"], d4["γ, Standard"] = gammas(rows, "Gated"), gammas(rows, "Standard")
    row(
        "D4",
        "about half as many latents at equal reconstruction, and γ near 1",
        f"{sweep_of} Gated",
        d4,
        all(above(v, 1.5) for k, v in d4.items() if k[0] == "L") and near(d4["γ, Gated"], 1, 0.02),
    )
    return table


@app.function
def evidence(steps=1500, progress=lambda what: None):
    """(claims, rows of every run): all that the table of claims rests on."""
    rows = []
    for name in ("plain", "Zipf, correlated", "hierarchical"):
        for variant, run in (EVIDENCE | (ABLATIONS if name == "plain" else {})).items():
            rows += measured_runs(variant, *run, steps=steps, world_name=name)
            progress(f"{variant}, {name}")
    numbers = exact_numbers(steps=steps) | {"A8": dead_latents(steps=steps)}
    progress("single numbers")
    return claims(rows, numbers), rows


@app.function
def condensed(claimed):
    """The table of claims for the README: at most three numbers a row."""
    return [
        {
            "": row["id"],
            "claim": row["claim"],
            "measured": "; ".join(
                f"{name} {value['mean']:.3g}" + (f" ± {value['se']:.1g}" if value["se"] else "")
                for name, value in list(row["measured"].items())[:3]
            ),
            "verdict": row["verdict"],
        }
        for row in claimed
    ]


@app.function
def recovered(rows, fvu=0.2):
    """At one FVU, means over seeds: what each variant costs, and how much of the truth it found."""
    table = []
    for name, variant in itertools.product(("plain", "Zipf, correlated", "hierarchical"), EVIDENCE):
        found = [
            at_fvu(
                [row for row in rows if row["world"] == name and row["seed"] == seed],
                variant,
                fvu,
                ("gamma", "mcc", "f1"),
            )
            for seed in sorted({row["seed"] for row in rows})
        ]
        found = torch.tensor([values for values in found if values])
        cells = [f"{value:.2f}" for value in found.mean(0)] if len(found) else ["-"] * 4
        table.append(
            {"data": name, "variant": variant}
            | dict(zip(("L0", "γ", "MCC", "F1"), cells, strict=True))
        )
    return table


@app.function
def evidence_chart(rows):
    """FVU against L0 for every variant on the three data sets; means over seeds."""
    means = {}
    for row in rows:
        if row["variant"] in EVIDENCE:
            means.setdefault((row["world"], row["variant"], row["l1"]), []).append(row)
    values = [
        {"data": name, "variant": variant, "l1": l1}
        | {key: sum(row[key] for row in group) / len(group) for key in ("l0", "fvu", "gamma")}
        for (name, variant, l1), group in means.items()
    ]
    return (
        alt.Chart(alt.Data(values=[value for value in values if value["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=35, filled=True))
        .encode(
            x=alt.X("l0:Q", scale=alt.Scale(type="log", nice=False, padding=8), title="L0"),
            y=alt.Y("fvu:Q", scale=alt.Scale(type="log"), title="FVU"),
            color=alt.Color("variant:N", scale=colours(*EVIDENCE), title=None),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "fvu:Q", "gamma:Q"],
        )
        .properties(width=230, height=240)
        .facet(
            column=alt.Column(
                "data:N", sort=["plain", "Zipf, correlated", "hierarchical"], title=None
            )
        )
    )


@app.function
def english():
    """(read, held_out): bytes of Python's own help texts; the last tenth is held out.

    Topics quote each other, so a paragraph is kept only where it first comes: or else one byte in
    seven of what is held out would stand in a stretch of 40 that has been read.
    """
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = torch.frombuffer(bytearray("\n\n".join(paragraphs).encode()), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


@app.class_definition
class LanguageModel(torch.nn.Module):
    """A transformer of one layer, GELU: bytes (batch, tokens) -> logits (batch, tokens, 256).

    The logits at a byte are for the next one. At most `context` bytes are read at once.
    """

    def __init__(self, d_model=128, n_heads=8, context=128):
        super().__init__()
        self.n_heads, self.context = n_heads, context
        self.byte = torch.nn.Embedding(256, d_model)
        self.position = torch.nn.Embedding(context, d_model)
        self.attention_norm, self.mlp_norm, self.last_norm = (
            torch.nn.LayerNorm(d_model) for _ in range(3)
        )
        self.qkv = torch.nn.Linear(d_model, 3 * d_model)
        self.project = torch.nn.Linear(d_model, d_model)
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(d_model, 4 * d_model),
            torch.nn.GELU(),
            torch.nn.Linear(4 * d_model, d_model),
        )
        self.unembed = torch.nn.Linear(d_model, 256, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                torch.nn.init.normal_(weight, std=0.02)

    def attend(self, x):
        """Each position reads from itself and those before it."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (batch, tokens, 3, heads, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, d)
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, d_model)

    def forward(self, ids):
        x = self.byte(ids) + self.position.weight[: ids.shape[1]]  # (batch, tokens, d_model)
        x = x + self.attend(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return self.unembed(self.last_norm(x))  # (batch, tokens, 256)


@app.function
def cross_entropy(model, ids):
    """Of each byte given those before it in its row of (batch, tokens): nats per byte."""
    logits, following = model(ids)[:, :-1], ids[:, 1:]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


@app.function
def stretches(text, length, batch, seed):
    """Stretches of the text that start anywhere, without end: (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
        yield text[start + torch.arange(length)]


@app.function
def trained_language_model(text, steps=1200, seed=0, progress=lambda: None):
    """A LanguageModel that has read 16 stretches of 128 bytes a step; its weights are frozen."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator
        torch.manual_seed(seed)
        model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for ids in itertools.islice(stretches(text, model.context, 16, seed), steps):
        loss = cross_entropy(model, ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
        progress()
    return model.requires_grad_(False)


@app.function
def guessing(text, held_out):
    """CE in nats per byte without a model: from counts of bytes, and of bytes after a byte.

    A byte after a byte counts once more in all, spread as single bytes are.
    """
    single = torch.bincount(text, minlength=256) + 1.0
    single /= single.sum()
    pairs = torch.bincount(256 * text[:-1] + text[1:], minlength=256**2).view(256, 256) + single
    pairs /= pairs.sum(1, keepdim=True)
    before, after = held_out[:-1], held_out[1:]
    return {
        "unigram": -single[after].log().mean().item(),
        "bigram": -pairs[before, after].log().mean().item(),
    }


@app.function
def language(model_steps=1200, steps=1500, seed=0, n_l1=7, progress=lambda what: None):
    """SAEs spliced into a language model: its own CE, and a row for each SAE on its MLP's output.

    CE is in nats per byte of held-out text: clean, with the MLP's output ablated (zeros, or its
    mean), and with x̂ in its place. `progress` is told after every step what was trained.
    """
    read, held_out = english()
    model = trained_language_model(read, model_steps, seed, lambda: progress("language model"))
    ids = held_out[: len(held_out) // model.context * model.context].view(-1, model.context)
    x = torch.cat(list(harvest(model, model.mlp, ids.split(64))))

    def spliced(put):
        with splice(model.mlp, put), torch.no_grad():
            return cross_entropy(model, ids).item()

    ce = guessing(read, held_out) | {"clean": cross_entropy(model, ids).item()}
    ce |= {"zero": spliced("zero"), "mean": spliced(x.mean(0))}
    table = []
    for name, (kind, d_sae, (least, most)) in SPLICED.items():
        l1 = torch.logspace(math.log10(least), math.log10(most), n_l1)
        sae = kind(x.shape[1], d_sae, stack=n_l1, generator=torch.Generator().manual_seed(seed))
        inputs = stretches(read, model.context, 64, seed)
        rows = shuffle(harvest(model, model.mlp, inputs), 512, held=2**16, seed=seed)
        options = {"steps": steps, "lr": 1e-2, "log_every": steps, "device": "cpu"}
        list(train(sae, map(lambda x: progress(name) or x, rows), l1=l1, **options))
        found = evaluate(sae, x.split(1024))
        for i, member in enumerate(members(sae)):
            row = {"variant": name, "d_sae": d_sae, "l1": l1[i].item()}
            row |= {
                key: getattr(found, key)[i].item()
                for key in ("l0", "fvu", "gamma", "dead_fraction")
            }
            row["ce"] = spliced(member)
            for ablated in ("zero", "mean"):
                row[f"recovered_{ablated}"] = loss_recovered(row["ce"], ce["clean"], ce[ablated])
            table.append(row)
    ce, *table = (
        {key: round(v, 5) if isinstance(v, float) else v for key, v in row.items()}
        for row in (ce, *table)
    )
    return {
        "python": sys.version.split()[0],  # whose help texts these are
        "steps": {"language model": model_steps, "SAEs": steps},
        "seed": seed,
        "ce": ce,
        "table": table,
    }


@app.function
def language_comparison(found, levels=(0.8, 0.9, 0.95, 0.98)):
    """At each share of the loss recovered (mean ablation) that all kinds reach: L0, γ and FVU.

    At equal CE, that is. The same CE recovers another share of the loss beside zero ablation.
    """
    ce, rows = found["ce"], []
    # `at_fvu` finds a level of what splicing adds to CE just as well.
    added = [row | {"fvu": row["ce"] - ce["clean"], "FVU": row["fvu"]} for row in found["table"]]
    for level in levels:
        allowed = (1 - level) * (ce["mean"] - ce["clean"])
        at = {variant: at_fvu(added, variant, allowed, ("gamma", "FVU")) for variant in COMPARED}
        if all(at.values()):
            zero = 1 - allowed / (ce["zero"] - ce["clean"])
            row = {"recovered, mean": level, "recovered, zero": round(zero, 3)}
            row["CE"] = round(ce["clean"] + allowed, 3)
            row |= {f"L0 {variant}": round(l0, 2) for variant, (l0, _, _) in at.items()}
            for variant in ("Standard", "Gated"):
                _, gamma, fvu = at[variant]
                row |= {f"γ {variant}": round(gamma, 3), f"FVU {variant}": round(fvu, 3)}
            for variant in list(COMPARED)[:-1]:
                row[f"{variant} / Gated"] = round(at[variant][0] / at["Gated"][0], 2)
            rows.append(row)
    return rows


@app.function
def language_losses(found):
    """How good the model is, and what ablating its MLP costs it, in words."""
    ce = {key: f"{value:.2f}" for key, value in found["ce"].items()}
    worse = "more" if found["ce"]["zero"] > found["ce"]["mean"] else "less"
    return (
        f"The model's CE is {ce['clean']}; counts of bytes give {ce['unigram']}, of pairs of "
        f"bytes {ce['bigram']}. With its MLP's output set to zero it is {ce['zero']}, to its "
        f"mean {ce['mean']}: here zeros cost {worse} than the mean."
    )


@app.function
def language_verdict(found):
    """Who is ahead at equal CE, with the numbers computed from the table."""
    rows = language_comparison(found)
    if not rows:
        return "The kinds share no level of CE, so they cannot be compared: train for longer."

    def against(variant):
        ratios = [row[f"{variant} / Gated"] for row in rows]
        if min(ratios) > 1:
            who = "Gated is ahead"
        elif max(ratios) < 1:
            who = "Gated is behind"
        else:
            who = "neither is ahead at every level"
        return f"{variant} has {min(ratios):.2f} to {max(ratios):.2f} times its L0 ({who})"

    least, most = rows[0]["recovered, mean"], rows[-1]["recovered, mean"]
    return (
        f"Beside Gated, at equal CE ({least:.0%} to {most:.0%} of the loss recovered, "
        "against mean ablation): "
        + "; ".join(against(variant) for variant in list(COMPARED)[:-1])
        + "."
    )


@app.function
def language_chart(found):
    """CE with x̂ spliced in, and FVU, against L0; rules at CE clean and ablated."""
    base = (
        alt.Chart(alt.Data(values=[row for row in found["table"] if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True), strokeWidth=2)
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                title="L0: latents active per byte",
            ),
            color=alt.Color(
                "variant:N", scale=COLOURS, legend=alt.Legend(title=None, orient="top")
            ),
            shape=alt.Shape("variant:N", scale=SHAPES),
            order="l1:Q",
            tooltip=["variant:N", "l1:Q", "l0:Q", "ce:Q", "fvu:Q", "gamma:Q", "dead_fraction:Q"],
        )
        .properties(width=330, height=280)
    )
    names = {"clean": "clean", "mean": "mean-ablated", "zero": "zero-ablated"}
    levels = [{"ce": found["ce"][key], "name": name} for key, name in names.items()]
    rules = alt.Chart(alt.Data(values=levels)).encode(y="ce:Q")
    ce = (
        rules.mark_rule(strokeDash=[4, 4])
        + rules.mark_text(align="left", dx=4, dy=-6, x=0).encode(text="name:N")
        + base.encode(
            y=alt.Y("ce:Q", scale=alt.Scale(zero=False), title="CE once spliced in, nats per byte")
        )
    )
    fvu = base.encode(
        y=alt.Y(
            "fvu:Q",
            scale=alt.Scale(type="log", nice=False, padding=12),
            title="FVU: variance unexplained",
        )
    )
    return ce | fvu


@app.function
def main(arguments):
    """What `python explainer.py` does: train and print the table; `rebuild` remakes results/."""
    from tqdm import tqdm

    parser = argparse.ArgumentParser(
        prog="explainer.py",
        description="Train Standard and Gated SAEs on toy data over a range of λ; compare them.",
    )
    parser.add_argument(
        "what",
        nargs="?",
        choices=["print", "rebuild"],
        default="print",
        help="rebuild: measure every claim too, and write results/",
    )
    parser.add_argument(
        "only",
        nargs="?",
        choices=["language"],
        help="with rebuild: remake the language model's results, and nothing else",
    )
    parser.add_argument("--steps", type=int, default=4000, help="training steps (default: 4000)")
    parser.add_argument("--seed", type=int, default=0, help="of data and initialisation")
    args = parser.parse_args(arguments)
    if args.only and args.what != "rebuild":
        parser.error(f"{args.only} goes with rebuild")
    if args.only:
        rebuild_language(args.steps, args.seed)
        return
    with tqdm(total=len(COMPARED) * args.steps, unit="step", disable=None) as bar:

        def progress(variant, steps):
            bar.set_description(variant, refresh=False)
            bar.update(steps)

        table = sweep(args.steps, args.seed, progress=progress)
    compared = comparison(table)
    print(as_markdown(table), *([as_markdown(compared)] if compared else []), sep="\n\n")
    print(f"\n{verdict(table)}")
    if args.what == "rebuild":
        with tqdm(total=3 * len(EVIDENCE) + len(ABLATIONS) + 1, unit="run", disable=None) as bar:

            def progress_of_runs(what):
                bar.set_description(what, refresh=False)
                bar.update()

            claimed, rows = evidence(min(args.steps, 1500), progress_of_runs)
        print(f"\n{as_markdown(condensed(claimed))}")
        write_results({"steps": args.steps, "seed": args.seed, "table": table}, claimed, rows)
        rebuild_language(args.steps, args.seed)


@app.function
def write_results(compared, claimed, rows):
    """All that results/ holds, but the language model's."""
    RESULTS.mkdir(exist_ok=True)
    for name, content in (("pareto", compared), ("claims", claimed), ("runs", rows)):
        text = json.dumps(content, indent=1, ensure_ascii=False)
        if name == "runs":  # one line a run
            text = "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]"
        (RESULTS / f"{name}.json").write_text(text + "\n")
    pareto_chart(compared["table"]).save(RESULTS / "pareto.svg")
    evidence_chart(rows).save(RESULTS / "claims.svg")


@app.function
def rebuild_language(steps, seed):
    """Train, print and write what results/ holds of the language model."""
    from tqdm import tqdm

    model_steps, steps = min(steps, 1200), min(steps, 1500)
    with tqdm(total=model_steps + len(SPLICED) * steps, unit="step", disable=None) as bar:

        def progress(what):
            bar.set_description(what, refresh=False)
            bar.update()

        found = language(model_steps, steps, seed, progress=progress)
    compared = language_comparison(found)
    shown = [found["table"], compared] if compared else [found["table"]]
    said = language_losses(found), language_verdict(found)
    print("", *map(as_markdown, shown), *said, sep="\n\n")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "language.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    language_chart(found).save(RESULTS / "language.svg")


# The lesson: its worlds, its pictures, and the sentences computed from them.


@app.function
def ask(question, options):
    """A question to answer before looking."""
    return mo.ui.radio(options, label=f"**Predict first.** {question}")


@app.function
def penalty_slider(strengths, value):
    return mo.ui.slider(
        steps=strengths, value=value, label="penalty weight λ", show_value=True, debounce=True
    )


@app.function
def feedback(answer, right, why):
    """Right or not, and why; nothing is given away before there is an answer."""
    if answer is None:
        return mo.md("*Choose an answer to see whether it holds.*")
    verdict, kind = ("Right.", "success") if answer == right else (f"No: {right}.", "warn")
    return mo.callout(mo.md(f"**{verdict}** {why}"), kind=kind)


@app.function
def picture(chart, caption, sentence):
    """A chart, what to see in it, and what it adds up to."""
    if isinstance(chart, alt.TopLevelMixin):
        chart = chart.properties(description=caption)
    return mo.vstack([chart, mo.md(f"*{caption}*"), mo.callout(mo.md(sentence), kind="info")])


@app.function
def source(*things):
    """The code itself, as it stands in gated_sae.py."""
    return mo.md("\n".join(f"```python\n{inspect.getsource(thing)}```\n" for thing in things))


@app.function
def takeaway(text, **folds):
    """What to keep, and what a first reading may leave folded."""
    folds = {title.replace("_", " "): content for title, content in folds.items()}
    return mo.vstack([mo.md(f"**Keep:** {text}"), mo.accordion(folds)])


@app.function
def colours(*variants):
    return alt.Scale(domain=list(variants), range=[PALETTE.get(v, (GREY,))[0] for v in variants])


@app.function
def panel(chart, height=260):
    """As wide as the page allows, on whatever background it has."""
    return quiet(chart.properties(width="container", height=height))


@app.function
def quiet(chart):
    """Nothing but the curves should catch the eye, on white or on black."""
    return chart.properties(background="transparent").configure_axis(gridOpacity=0.3)


@app.function
def flatland():
    """Four features in the plane, 90° apart; each occurs on one row in twenty, at about 1."""
    angle = torch.arange(4) * math.pi / 2 + math.pi / 8
    directions = torch.stack([angle.cos(), angle.sin()], dim=-1)
    return SuperpositionData(2, 4, dictionary=directions, firing=0.05, magnitude="log_normal")


@app.function
def learn(kind, l1, starts, steps, **options):
    """A stack of SAEs in Flatland, one for each λ and start: (the stack, what it was on the way).

    A start is a seed: the same seed is the same first dictionary, whatever the kind.
    """
    sae = kind(2, 4, stack=(len(starts),), **options)
    first = [random_directions(4, 2, torch.Generator().manual_seed(seed)) for seed in starts]
    with torch.no_grad():
        sae.W_dec.copy_(torch.stack(first))
        sae.W_enc.copy_(sae.W_dec.mT)
        if not getattr(sae, "tied", True):
            sae.W_mag.copy_(sae.W_enc)
    data, history = flatland(), []
    held_out = next(data.batches(2000, seed=1))

    def note(step):
        found = evaluate(sae, [held_out])
        W_dec = sae.W_dec.detach().clone()
        history.append({"step": step, "W_dec": W_dec, "l0": found.l0, "fvu": found.fvu})

    note(0)
    schedule = {"steps": steps, "lr": 3e-2, "log_every": max(1, steps // 10), "device": "cpu"}
    l1 = torch.tensor(l1)
    for record in train(sae, data.batches(256, seed=0), l1=l1, sparse=False, **schedule):
        if record.step > 1:
            note(record.step)
    return sae, history


@app.function
def misses(W_dec):
    """Degrees between each of the four true directions and the learned one nearest to it."""
    cosines = torch.nn.functional.normalize(W_dec, dim=-1) @ flatland().dictionary.T
    return cosines.max(-2).values.clamp(-1, 1).arccos().rad2deg()


@app.function
def superposition_chart(W_dec):
    """The plane: rows x, the four true directions, the four learned ones."""
    data = flatland()
    x, _ = data.sample(2500, torch.Generator().manual_seed(2))
    x = x[x.abs().sum(-1) > 0]
    at = {
        "x": alt.X("x:Q", scale=alt.Scale(domain=[-2.2, 2.2]), title="first dimension of x"),
        "y": alt.Y("y:Q", scale=alt.Scale(domain=[-2.2, 2.2]), title="second dimension of x"),
    }
    names = ["true direction", "learned direction"]
    values = [
        {"what": what, "i": i, "x": scale * d[0], "y": scale * d[1]}
        for what, D in zip(names, (data.dictionary, W_dec), strict=True)
        for i, d in enumerate(D.tolist())
        for scale in (0.0, 1.0)
    ]
    rows = alt.Chart(alt.Data(values=[{"x": a, "y": b} for a, b in x.tolist()]))
    base = alt.Chart(alt.Data(values=values)).encode(
        **at,
        color=alt.Color(
            "what:N",
            scale=alt.Scale(domain=names, range=[GREY, PALETTE["Standard"][0]]),
            legend=alt.Legend(title=None, orient="top"),
        ),
    )
    learned = base.transform_filter("datum.what == 'learned direction'")
    tips = base.transform_filter("datum.x != 0 || datum.y != 0")
    chart = alt.layer(
        rows.mark_circle(size=12, opacity=0.35, color=GREY, clip=True).encode(**at),
        learned.mark_line(strokeWidth=4).encode(detail="i:N"),
        tips.mark_point(size=130, strokeWidth=3, opacity=1),
    )
    return quiet(chart.properties(width=290, height=290))


@app.function
def superposition_sentence(step, degrees, found, starts):
    """`degrees`: how far each true direction is from the nearest learned one."""
    return (
        f"After **{step}** steps, the four true directions are {min(degrees):.0f}° to "
        f"{max(degrees):.0f}° away from the nearest learned one. At the end of training, "
        f"**{found} of {starts}** starts have found all four to within 10°."
    )


@app.function
def lone_strengths(sae, rows=20_000):
    """Flatland's rows with one feature only: (true strength, coefficient of the latent that points
    its way: one column for each SAE of a stack)."""
    data = flatland()
    x, f = data.sample(rows, torch.Generator().manual_seed(3))
    alone = (f > 0).sum(-1) == 1
    x, true, feature = x[alone], f[alone].max(-1).values, f[alone].argmax(-1)
    with torch.no_grad():
        latent = (sae.W_dec @ data.dictionary.T).argmax(-2)  # (stack, 5): the best for each feature
        found = sae.encode(x).gather(-1, latent[:, feature].unsqueeze(-1)).squeeze(-1)
    return true, found.T


@app.function
def shrinkage_chart(true, found, l1):
    """Coefficients against true strengths, and the closed form."""
    ends = torch.tensor([0.0, l1 / 2, 3.0])
    lines = [
        {"what": what, "a": a, "f": f}
        for what, values in (("no shrinkage", ends), ("max(0, a - λ/2)", shrink(ends, l1)))
        for a, f in zip(ends.tolist(), values.tolist(), strict=True)
    ]
    points = [{"a": a, "f": f} for a, f in zip(true[:250].tolist(), found.tolist(), strict=False)]
    at = {
        "x": alt.X(
            "a:Q",
            scale=alt.Scale(domain=[0, 3]),
            axis=alt.Axis(tickCount=6),
            title="a: true strength",
        ),
        "y": alt.Y("f:Q", scale=alt.Scale(domain=[0, 3]), title="f: coefficient"),
    }
    names = ["no shrinkage", "max(0, a - λ/2)"]
    closed = (
        alt.Chart(alt.Data(values=lines))
        .mark_line(strokeWidth=2)
        .encode(
            **at,
            color=alt.Color(
                "what:N",
                scale=alt.Scale(domain=names, range=[GREY, PALETTE["Standard"][0]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            strokeDash=alt.StrokeDash(
                "what:N",
                scale=alt.Scale(domain=names, range=[[6, 4], [1, 0]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
        )
    )
    learned = alt.Chart(alt.Data(values=points)).mark_square(
        size=22, opacity=0.6, color=PALETTE["Standard"][0], clip=True
    )
    return panel(alt.layer(learned.encode(**at), closed), 300)


@app.function
def shrinkage_sentence(l1, true, found):
    """The closed form, and how far a trained SAE is from it."""
    off = (found - shrink(true, l1)).abs().mean().item()
    lost = (true - found)[true > l1].mean().item()
    return (
        f"With λ = {l1:.1f}, the closed form takes λ/2 = **{l1 / 2:.2f}** off every coefficient "
        f"that survives. The trained SAE took **{lost:.2f}** off those with a > λ, and lies "
        f"{off:.2f} from the closed form on average."
    )


@app.function
def strengths_chart(true, found):
    """Histograms: the true strengths, and what each kind recovered. found: {kind: coefficients}."""
    width, values = 0.15, []
    for what, numbers in {"truth": true, **found}.items():
        counts = torch.histc(numbers, bins=20, min=0.0, max=20 * width) / len(true)
        values += [
            {"what": what, "from": i * width, "share": share}
            for i, share in enumerate([*counts.tolist(), 0.0])
        ]
    names = ["truth", *found]
    return panel(
        alt.Chart(alt.Data(values=values))
        .mark_area(interpolate="step-after", fillOpacity=0.12, line={"strokeWidth": 2.5})
        .encode(
            x=alt.X("from:Q", title="strength, or coefficient", axis=alt.Axis(tickCount=6)),
            y=alt.Y("share:Q", stack=None, title="share of rows", axis=alt.Axis(format="%")),
            color=alt.Color(
                "what:N", scale=colours(*names), legend=alt.Legend(title=None, orient="top")
            ),
        )
    )


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
def dying_chart(histories, member):
    """L0 over training. histories: {kind: history of a stack}."""
    values = [
        {"kind": kind, "step": point["step"], "l0": point["l0"][member].item()}
        for kind, history in histories.items()
        for point in history
        if point["step"] <= min(h[-1]["step"] for h in histories.values())
    ]
    names = list(histories)
    look = [PALETTE["Standard"][0], PALETTE["Gated"][0]]
    return panel(
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=2.5, point=alt.OverlayMarkDef(size=40, filled=True))
        .encode(
            x=alt.X("step:Q", title="training step", axis=alt.Axis(tickCount=6)),
            y=alt.Y("l0:Q", title="L0: latents firing per row"),
            color=alt.Color(
                "kind:N",
                scale=alt.Scale(domain=names, range=look),
                legend=alt.Legend(title=None, orient="top", labelLimit=400),
            ),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=names, range=["square", "circle"]),
                legend=alt.Legend(title=None, orient="top", labelLimit=400),
            ),
        )
    )


@app.function
def dying_sentence(reconstruct, sparsity, l0_first, l0_last, steps):
    """Gradients on b_gate of the two terms, one number for each latent; L0 before and after."""
    return (
        f"Before training, the reconstruction's gradient on the four gate biases is "
        f"**{max(abs(g) for g in reconstruct):.0f}, exactly**; the penalty's is "
        f"{min(sparsity):.2f} to {max(sparsity):.2f}, never negative, so every step lowers them. "
        f"L0 falls from "
        f"{l0_first:.2f} to **{l0_last:.2f}** in {steps} steps."
    )


@app.function
def gradient_flow(sae, x, l1):
    """‖∂ term / ∂ parameter‖ for each term of the loss and each parameter."""
    losses = sae.losses(x)
    terms = {
        "L_reconstruct": losses.reconstruct,
        "λ L_sparsity": l1 * losses.sparsity,
        "L_aux": losses.aux,
    }
    return [
        {
            "term": term,
            "parameter": name,
            "norm": gradient(sae, value, name).norm().item() if value.requires_grad else 0.0,
        }
        for term, value in terms.items()
        for name in ("W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec")
    ]


@app.function
def flow_chart(flow):
    """Which term of the loss reaches which parameter, and how strongly."""
    values = [
        cell | {"shown": f"{1000 * cell['norm']:.2g}" if cell["norm"] else "0"} for cell in flow
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("parameter:N", sort=None, title=None, axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("term:N", sort=None, title=None),
    )
    cells = base.mark_rect(stroke=GREY, strokeWidth=0.5).encode(
        color=alt.condition(
            "datum.norm > 0",
            alt.Color(
                "norm:Q",
                scale=alt.Scale(type="sqrt", range=["#cfe3f1", "#4c9ccb"], domainMin=0),
                legend=None,
            ),
            alt.value("transparent"),
        )
    )
    numbers = base.mark_text(fontSize=13).encode(
        text="shown:N",
        color=alt.condition("datum.norm > 0", alt.value("#000000"), alt.value(GREY)),
    )
    return panel(cells + numbers, 150)


@app.function
def flow_sentence(frozen, unfrozen):
    """From two tables of `gradient_flow`, on the same weights and rows."""
    frozen, unfrozen = (
        {(cell["term"], cell["parameter"]): cell["norm"] for cell in flow}
        for flow in (frozen, unfrozen)
    )
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
    z = torch.tensor(sorted(ends), dtype=torch.float64)[:, None]
    pi_gate, pi_mag = z + b_gate, math.exp(r_mag) * z + b_mag
    theta = torch.tensor([b_mag - math.exp(r_mag) * b_gate], dtype=torch.float64)
    f = gate(pi_gate, pi_mag)
    curves = {"open gate": (pi_gate > 0).double(), "ReLU(π_mag)": pi_mag.relu(), "output f̃": f}
    many = torch.linspace(-1.5, 2.0, 1000, dtype=torch.float64)[:, None]
    pi_gate, pi_mag = many + b_gate, math.exp(r_mag) * many + b_mag
    same = (gate(pi_gate, pi_mag) - jump_relu(pi_mag, theta)).abs().max().item()
    return {name: values[:, 0] for name, values in curves.items()}, z[:, 0], theta.item(), same


@app.function
def latent_chart(curves, z, opens_at):
    names = list(curves)
    values = [
        {"curve": name, "z": at, "value": value}
        for name in names
        for at, value in zip(z.tolist(), curves[name].tolist(), strict=True)
    ]
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=3, clip=True)
        .encode(
            x=alt.X(
                "z:Q",
                title="z = (x - b_dec) W_enc",
                scale=alt.Scale(domain=[-1.5, 2]),
                axis=alt.Axis(tickCount=7),
            ),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(domain=[0, 3])),
            color=alt.Color(
                "curve:N",
                scale=alt.Scale(domain=names, range=[GREY, "#56b4e9", PALETTE["Gated"][0]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            strokeDash=alt.StrokeDash(
                "curve:N",
                scale=alt.Scale(domain=names, range=[[2, 3], [8, 4], [1, 0]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
        )
    )
    rule = alt.Chart(alt.Data(values=[{"z": opens_at}])).mark_rule(color=GREY, strokeDash=[4, 4])
    return panel(alt.layer(rule.encode(x="z:Q"), lines))


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
    """Mean decoder norm over training. histories: {setting: history of a stack of one}."""
    values = [
        {
            "setting": setting,
            "step": point["step"],
            "norm": point["W_dec"].norm(dim=-1).mean().item(),
            "width": 4 if setting == chosen else 2,
        }
        for setting, history in histories.items()
        for point in history
    ]
    names = list(histories)
    return panel(
        alt.Chart(alt.Data(values=values))
        .mark_line(point=alt.OverlayMarkDef(size=35, filled=True))
        .encode(
            x=alt.X("step:Q", title="training step", axis=alt.Axis(tickCount=6)),
            y=alt.Y(
                "norm:Q",
                scale=alt.Scale(type="log", domain=[0.05, 5]),
                axis=alt.Axis(values=[0.05, 0.1, 0.2, 0.5, 1, 2, 5]),
                title="mean length of d_i",
            ),
            color=alt.condition(
                f"datum.setting == '{chosen}'", alt.value(PALETTE["Gated"][0]), alt.value(GREY)
            ),
            shape=alt.Shape(
                "setting:N",
                scale=alt.Scale(domain=names),
                legend=alt.Legend(title=None, orient="top", columns=1, labelLimit=400),
            ),
            strokeWidth=alt.StrokeWidth("width:Q", scale=None, legend=None),
            detail="setting:N",
        )
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


@app.function
def two_vectors(degrees, length):
    """Moments of x = (1, 0) and an x̂ at an angle to it."""
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    angle = math.radians(degrees)
    x_hat = length * torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    return moments(x, x_hat)


@app.function
def two_vectors_chart(degrees, length, trained):
    """x, x̂, the two best multiples, and the circle γ = 1. trained: [(kind, degrees, length)]."""
    m, angle = two_vectors(degrees, length), math.radians(degrees)
    tip = (length * math.cos(angle), length * math.sin(angle))
    up = m.factor_on_x_hat.item()
    on_x_hat, on_x = (up * tip[0], up * tip[1]), (m.factor_on_x.item(), 0.0)
    domain_x, domain_y = alt.Scale(domain=[-0.1, 1.3]), alt.Scale(domain=[-0.2, 1.2])
    at = {
        "x": alt.X("x:Q", scale=domain_x, title=None, axis=alt.Axis(tickCount=4)),
        "y": alt.Y("y:Q", scale=domain_y, title=None, axis=alt.Axis(tickCount=4)),
    }
    turn = [math.pi * k / 60 for k in range(61)]
    circle = [{"x": 0.5 + 0.5 * math.cos(t), "y": 0.5 * math.sin(t), "k": t} for t in turn]
    arrows = [
        {"v": v, "x": end[0], "y": end[1], "k": k}
        for v, to in (("x", (1.0, 0.0)), ("x̂", tip))
        for k, end in enumerate(((0.0, 0.0), to))
    ]
    drops = [
        {"v": v, "x": end[0], "y": end[1], "k": k}
        for v, ends in (("a", ((1.0, 0.0), on_x_hat)), ("b", (tip, on_x)))
        for k, end in enumerate(ends)
    ]
    feet = [
        {"x": on_x_hat[0], "y": on_x_hat[1], "name": "best multiple of x̂"},
        {"x": on_x[0], "y": on_x[1], "name": "best multiple of x"},
    ]
    dots = [
        {"kind": k, "x": c * math.cos(math.radians(d)), "y": c * math.sin(math.radians(d))}
        for k, d, c in trained
    ]
    legend = alt.Legend(title=None, orient="top", columns=2, symbolLimit=9)
    chart = alt.layer(
        alt.Chart(alt.Data(values=circle)).mark_line(color=GREY).encode(**at, order="k:Q"),
        alt.Chart(alt.Data(values=drops))
        .mark_line(color=GREY, strokeDash=[4, 3])
        .encode(**at, detail="v:N", order="k:Q"),
        alt.Chart(alt.Data(values=arrows))
        .mark_line(strokeWidth=4, color="#009e73")
        .encode(
            **at,
            detail="v:N",
            order="k:Q",
            opacity=alt.condition("datum.v == 'x'", alt.value(0.45), alt.value(1)),
        ),
        alt.Chart(alt.Data(values=[a for a in arrows if a["k"]]))
        .mark_text(dx=12, dy=-10, fontSize=16, color="#009e73")
        .encode(**at, text="v:N"),
        alt.Chart(alt.Data(values=feet))
        .mark_point(size=80, color=GREY, filled=False, strokeWidth=2)
        .encode(**at, tooltip="name:N"),
        alt.Chart(alt.Data(values=dots))
        .mark_point(size=110, filled=True, opacity=1)
        .encode(
            **at,
            color=alt.Color("kind:N", scale=colours("Standard", "Gated"), legend=legend),
            shape=alt.Shape(
                "kind:N",
                scale=alt.Scale(domain=["Standard", "Gated"], range=["square", "circle"]),
                legend=legend,
            ),
            tooltip="kind:N",
        ),
    )
    return quiet(chart.properties(width=300, height=300))


@app.function
def two_vectors_sentence(degrees, m):
    gamma, up, down, both, norm = (
        getattr(m, key).item()
        for key in ("gamma", "factor_on_x_hat", "factor_on_x", "cosine_squared", "norm_ratio")
    )
    return (
        f"γ = **{gamma:.2f}**, so {up:.2f} x̂ is the best multiple of x̂ (1/γ). The best multiple of "
        f"x is {down:.2f} x. Were the two reciprocal, their product would be 1; it is "
        f"**{both:.2f}**, the squared cosine of {degrees}°. The norm ratio ‖x̂‖²/‖x‖² is {norm:.2f}."
    )


@app.function
def frontier_chart(rows, world_name):
    """FVU against L0 for every variant on one world; means over seeds. From results/runs.json."""
    means = {}
    for row in rows:
        if row["variant"] in EVIDENCE and row["world"] == world_name:
            means.setdefault((row["variant"], row["l1"]), []).append(row)
    values = [
        {"variant": variant, "l1": l1}
        | {key: sum(row[key] for row in group) / len(group) for key in ("l0", "fvu", "gamma")}
        for (variant, l1), group in means.items()
    ]
    return panel(lines_of_variants([v for v in values if v["l0"] > 0.3], list(EVIDENCE)), 340)


@app.function
def lines_of_variants(values, names):
    """L0 and FVU, logarithmic; a line, a colour and a shape for each variant."""
    legend = alt.Legend(title=None, orient="bottom", columns=2, labelLimit=180)
    tips = [alt.Tooltip(f"{key}:Q", format=".3g") for key in ("l1", "l0", "fvu", "gamma")]
    return (
        alt.Chart(alt.Data(values=values))
        .mark_line(point=alt.OverlayMarkDef(size=60, filled=True))
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=10),
                title="L0: latents firing per row",
            ),
            y=alt.Y(
                "fvu:Q",
                scale=alt.Scale(type="log", nice=False, padding=10),
                title="FVU: variance unexplained",
            ),
            color=alt.Color("variant:N", scale=colours(*names), legend=legend),
            shape=alt.Shape(
                "variant:N",
                scale=alt.Scale(domain=names, range=[PALETTE[name][1] for name in names]),
                legend=legend,
            ),
            order="l1:Q",
            tooltip=["variant:N", *tips],
        )
    )


@app.function
def frontier_sentence(rows, world_name):
    """What "half as many features" comes to."""
    plain, wide = (
        spread(l0_ratios(rows, variant, "Gated", world_name))["mean"]
        for variant in ("Standard", "Standard 1.5x")
    )
    bias = {kind: spread(gammas(rows, kind, world_name))["mean"] for kind in ("Standard", "Gated")}
    return (
        f"At equal FVU, a Standard SAE has **{plain:.1f} times** as many latents firing on a row "
        f"as a Gated SAE, and one 1.5 times as wide {wide:.1f} times. γ is "
        f"{bias['Standard']:.2f} for Standard and **{bias['Gated']:.2f}** for Gated."
    )


@app.function
def small_world(seed):
    """40 features in 20 dimensions, 2 active: small enough to train on while you wait."""
    return SuperpositionData(20, 40, firing=2 / 40, seed=seed)


@app.function
def live_runs(steps, seed, n_l1=5, progress=lambda variant: None):
    """A small sweep: (rows of the table, the trained SAE of each row)."""
    data, rows, saes = small_world(seed), [], []
    held_out = list(itertools.islice(data.batches(1000, seed + 20_000), 5))
    schedule = {"steps": steps, "lr": 3e-2, "log_every": steps, "device": "cpu", "sparse": False}
    for variant, d_sae in LIVE.items():
        kind, _, span = EVIDENCE[variant]
        progress(variant)
        l1 = torch.logspace(*(math.log10(value) for value in span), n_l1)
        # Another seed than the data's: from the same one both would draw the same directions.
        generator = torch.Generator().manual_seed(seed + 30_000)
        sae = kind(20, d_sae, stack=n_l1, generator=generator)
        list(train(sae, data.batches(256, seed), l1=l1, **schedule))
        if variant in FINISH:

            def refit(corrected):
                list(train(corrected, data.batches(256, seed + 10_000), l1=0.0, **schedule))
                return corrected

            sae = FINISH[variant](sae, refit)
        found = evaluate(sae, held_out)
        for i, member in enumerate(members(sae)):
            row = {"variant": variant, "l1": round(l1[i].item(), 3)}
            for key in ("l0", "fvu", "gamma", "dead_fraction"):
                row[key] = round(getattr(found, key)[i].item(), 4)
            rows.append(row)
            saes.append(member)
    return rows, saes


@app.function
def live_chart(rows):
    """The frontier, with points that can be picked."""
    names = list(LIVE)
    chart = lines_of_variants([row for row in rows if row["l0"] > 0.1], names)
    pick = alt.selection_point(name="pick", fields=["variant", "l1"], nearest=True, on="click")
    marks = chart.mark_point(size=110, filled=True, opacity=1).add_params(pick)
    line = chart.mark_line(strokeWidth=2).encode(shape=alt.Undefined)
    return panel(alt.layer(line, marks), 320)


@app.function
def picked(rows, selections, chosen):
    """Which row was clicked in the chart, else the one chosen before."""
    pick = selections.get("pick") or {}
    for i, row in enumerate(rows):
        if pick and row["variant"] in pick.get("variant", []) and row["l1"] in pick.get("l1", []):
            return i
    return chosen


@app.function
def latents_of(sae, data, rows=4000):
    """For each latent that fires: the true feature it points at, and what it makes of it."""
    x, f = data.sample(rows, torch.Generator().manual_seed(5))
    with torch.no_grad():
        found = sae.encode(x)
        cosine, feature = (
            torch.nn.functional.normalize(sae.W_dec, dim=-1) @ data.dictionary.T
        ).max(-1)
    true = f[:, feature]
    both = (found > 0) & (true > 0)
    share = (found * both).sum(0) / (true * both).sum(0).clamp_min(1e-9)
    fires = (found > 0).float().mean(0)
    table = zip(cosine.tolist(), share.tolist(), fires.tolist(), both.any(0).tolist(), strict=True)
    return [{"cosine": c, "share": s, "fires": p} for c, s, p, seen in table if seen]


@app.function
def latents_chart(latents, variant):
    one = alt.Chart(alt.Data(values=[{"y": 1}])).mark_rule(strokeDash=[4, 4], color=GREY)
    dots = (
        alt.Chart(alt.Data(values=latents))
        .mark_point(
            filled=True, size=70, opacity=0.6, color=PALETTE[variant][0], shape=PALETTE[variant][1]
        )
        .encode(
            x=alt.X(
                "cosine:Q",
                scale=alt.Scale(zero=False, domainMax=1),
                axis=alt.Axis(tickCount=5),
                title="cosine with the nearest true feature",
            ),
            y=alt.Y(
                "share:Q",
                scale=alt.Scale(domain=[0, 1.4], clamp=True),
                title="coefficient / true strength",
            ),
            tooltip=[alt.Tooltip(f"{k}:Q", format=".2f") for k in ("cosine", "share", "fires")],
        )
    )
    return panel(one.encode(y="y:Q") + dots, 240)


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
    functions = (lambda v: jump_relu(v, bound).sum(-1), lambda v: (v - theta).relu().sum(-1))
    return [
        (
            integrated_gradients(fn, z, zero, steps=500).item(),
            activation_patching(fn, zero, z).item(),
        )
        for fn in functions
    ]


@app.function
def jump_chart(theta, z):
    ends = {0.0, theta, theta + 1e-9, z, z + 1e-9, 2.0}  # they bend only there
    path = torch.tensor(sorted(ends), dtype=torch.float64)
    bound = torch.tensor([theta], dtype=torch.float64)
    curves = {
        "JumpReLU": jump_relu(path[:, None], bound)[:, 0],
        "ReLU(z - θ)": (path - theta).relu(),
    }
    values = [
        {"function": name, "z": at, "out": out, "travelled": at <= z}
        for name, outs in curves.items()
        for at, out in zip(path.tolist(), outs.tolist(), strict=True)
    ]
    names = list(curves)
    lines = (
        alt.Chart(alt.Data(values=values))
        .mark_line(strokeWidth=3)
        .encode(
            x=alt.X(
                "z:Q",
                title="pre-activation on its way from 0 to z",
                axis=alt.Axis(tickCount=5),
            ),
            y=alt.Y("out:Q", title="output", scale=alt.Scale(domain=[0, 2])),
            color=alt.Color(
                "function:N",
                scale=alt.Scale(domain=names, range=[PALETTE["JumpReLU"][0], GREY]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            strokeDash=alt.StrokeDash(
                "function:N",
                scale=alt.Scale(domain=names, range=[[1, 0], [8, 4]]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            opacity=alt.condition("datum.travelled", alt.value(1), alt.value(0.25)),
            detail="travelled:N",
        )
    )
    end = alt.Chart(alt.Data(values=[{"z": z}])).mark_rule(color=GREY, strokeDash=[4, 4])
    return panel(alt.layer(end.encode(x="z:Q"), lines))


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
def spliced_chart(found, key, title, rules=()):
    """A column of the language model's table against L0; `rules`: (level, name), drawn across."""
    names = list(dict.fromkeys(row["variant"] for row in found["table"]))
    curves = (
        alt.Chart(alt.Data(values=[row for row in found["table"] if row["l0"] > 0.1]))
        .mark_line(point=alt.OverlayMarkDef(size=70, filled=True, opacity=1), strokeWidth=2)
        .encode(
            x=alt.X(
                "l0:Q",
                scale=alt.Scale(type="log", nice=False, padding=12),
                axis=alt.Axis(values=[1, 2, 5, 10, 20, 50, 100]),
                title="L0: latents that fire per byte",
            ),
            y=alt.Y(f"{key}:Q", scale=alt.Scale(zero=False), title=title),
            color=alt.Color(
                "variant:N", scale=colours(*names), legend=alt.Legend(title=None, orient="top")
            ),
            shape=alt.Shape(
                "variant:N",
                scale=alt.Scale(domain=names, range=[PALETTE[name][1] for name in names]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            order="l1:Q",
            tooltip=["variant:N", *(alt.Tooltip(f"{k}:Q", format=".3f") for k in ("l0", key))],
        )
    )
    levels = alt.Chart(alt.Data(values=[{key: level, "name": name} for level, name in rules]))
    levels = levels.encode(y=f"{key}:Q")
    labels = levels.mark_text(align="left", dx=4, dy=-7, x=0, color=GREY).encode(text="name:N")
    return panel(levels.mark_rule(strokeDash=[4, 4], color=GREY) + labels + curves, 280)


@app.function
def recovered_chart(found, ablation):
    """The loss recovered by every SAE spliced into the language model, against one baseline."""
    return spliced_chart(found, f"recovered_{ablation}", f"loss recovered, {ablation} ablation")


@app.function
def recovered_sentence(found):
    """What the baseline moves, and what it cannot."""
    rows, names = found["table"], ("zero", "mean")
    gap = [100 * (row["recovered_mean"] - row["recovered_zero"]) for row in rows]
    orders = [sorted(range(len(rows)), key=lambda i: rows[i][f"recovered_{a}"]) for a in names]
    kinder = "mean" if found["ce"]["mean"] > found["ce"]["zero"] else "zero"
    low, high = sorted((min(gap, key=abs), max(gap, key=abs)), key=abs)
    same = "the same" if orders[0] == orders[1] else "not the same"
    return (
        f"In this model the **{kinder}** is the worse thing to put in: CE "
        f"{found['ce']['zero']:.2f} with zeros, {found['ce']['mean']:.2f} with the mean. So the "
        f"scores against the {kinder} are {abs(low):.1f} to {abs(high):.1f} points higher. The "
        f"order of the {len(rows)} SAEs is **{same}** under both."
    )


@app.function
def typical(rows, world_name="plain", fvu=0.2):
    """[(kind, degrees, length)] of x̂ to x at one FVU, means over seeds, from results/runs.json."""
    found = []
    for kind in ("Standard", "Gated"):
        own = [row for row in rows if row["variant"] == kind and row["world"] == world_name]
        keys = ("cosine_squared", "norm_ratio")
        at = [
            at_fvu([row for row in own if row["seed"] == seed], kind, fvu, keys)
            for seed in sorted({row["seed"] for row in own})
        ]
        _, cosine_squared, norm_ratio = torch.tensor([one for one in at if one]).mean(0).tolist()
        found.append((kind, math.degrees(math.acos(cosine_squared**0.5)), norm_ratio**0.5))
    return found


@app.function
def claims_list(claimed, verdict):
    """The claims of one verdict, and what was measured."""
    return "\n".join(
        f"- **{row['']}** {row['claim']}. " + (f"*{row['measured']}*" if row["measured"] else "")
        for row in condensed([row for row in claimed if row["verdict"] == verdict])
    )


@app.function
def claims_sentence(claimed):
    counts = {
        verdict: [row["id"] for row in claimed if row["verdict"] == verdict]
        for verdict in ("agrees", "disagrees", "not decidable on toy data")
    }
    return (
        f"Of {len(claimed)} claims, **{len(counts['agrees'])}** agree with what is measured here; "
        f"{', '.join(counts['disagrees']) or 'none'} disagree; "
        f"{', '.join(counts['not decidable on toy data']) or 'none'} cannot be decided on toy data."
    )


@app.cell
def command_line():
    arguments = sys.argv[1:] if mo.app_meta().mode == "script" else None
    return (arguments,)


@app.cell
def script(arguments):
    if arguments is not None:
        main(arguments)
    return


@app.cell(hide_code=True)
def title():
    mo.md(r"""
    # Gated Sparse Autoencoders

    A language model packs more features into its activations than there are dimensions. A *sparse
    autoencoder* (SAE) tries to list them: it writes each activation vector $x$ as a sum of a few
    directions out of a large learned dictionary.

    The usual way to train one makes every term of that sum too small. A **Gated** SAE
    ([arXiv 2404.16014](https://arxiv.org/abs/2404.16014)) mends this: it decides *which* directions
    to use apart from *how strongly*, and pays for the first alone.

    This page shows why that is needed, how it works, what it buys, and what it does not. It takes
    about twenty minutes, and you need PyTorch, not SAEs. Every section goes the same way: the gist,
    a question to answer *before* you look, a control, a picture, a sentence computed from it, and
    what to keep. Derivations and code are folded away. The code is that of `gated_sae.py`, whose
    sections have the same numbers.
    """)
    return


@app.cell(hide_code=True)
def questions():
    mo.accordion(
        {
            "What you will be able to answer": mo.md("""
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
            11. Where did the field go next, and what can toy data not show? (11)
            """)
        }
    )
    return


@app.cell
def settings(arguments):
    mo.stop(arguments is not None)  # as a script: the table alone, not the lesson
    torch.set_num_threads(1)  # models this small only wait for a second one
    steps, live_steps = 200, 150  # of each training in the lesson: seconds
    strengths = [0.4, 0.6, 0.8, 1.0, 1.2]  # the λ that sliders offer
    return live_steps, steps, strengths


@app.cell(hide_code=True)
def world_gist():
    mo.md(r"""
    ## 1 · Four features in the plane

    Suppose that activations had two dimensions, and that there were **four** things to say about
    them: four *features*, each with a direction of its own. A feature is rare, it occurs on one row
    in twenty, with a strength of about 1. Then $x$ is its strength times its direction, or the sum
    if several occur at once.

    Four directions in a plane cannot all be perpendicular; here they are two pairs of opposites.
    This crowding is called *superposition*. It works because features are rare, and seldom meet.

    An SAE sees the points $x$ and nothing else. It has four *latents*. Latent $i$ has a direction
    $d_i$ of length 1 and a coefficient $f_i \ge 0$, and *fires* where $f_i > 0$. The encoder
    computes the coefficients, the decoder adds the directions up:

    $$\begin{aligned} f &= \mathrm{ReLU}\big((x - b_\text{dec})\,W_\text{enc} + b_\text{enc}\big) \\
    \hat x &= \textstyle\sum_i f_i\, d_i + b_\text{dec} \end{aligned}$$

    This small world comes along through the whole page; let us call it *Flatland*. What two
    dimensions cannot show is measured in larger worlds, and said to be.
    """)
    return


@app.cell
def world_question():
    ask_1 = ask(
        "A row has two numbers, and there are four directions. Can an SAE find them?",
        ["no, at most two", "from most starts, not from all", "always"],
    )
    ask_1
    return (ask_1,)


@app.cell
def world_feedback(ask_1):
    feedback(
        ask_1.value,
        "from most starts, not from all",
        "Most rows that are not empty show one feature alone, so the points lie on four rays. But "
        "descent can get stuck with two latents on one ray, or one between two. (Try start 1.)",
    )
    return


@app.cell
def world_controls(steps):
    starts = list(range(12))
    _step = max(1, steps // 10)
    step = mo.ui.slider(
        0,
        steps // _step * _step,
        step=_step,
        value=0,
        label="training step",
        show_value=True,
        debounce=True,
    )
    start = mo.ui.dropdown([str(seed) for seed in starts], value="5", label="start")
    mo.hstack([step, start], justify="start", wrap=True)
    return start, starts, step


@app.cell
def world_training(starts, steps):
    _, first_history = learn(StandardSAE, [0.8] * len(starts), starts, steps)
    return (first_history,)


@app.cell
def world_picture(first_history, start, starts, step):
    _member = starts.index(int(start.value))
    _point = min(first_history, key=lambda point: abs(point["step"] - step.value))
    _final = misses(first_history[-1]["W_dec"])
    picture(
        superposition_chart(_point["W_dec"][_member]),
        "Grey points: rows of x. Open circles: the four true directions. Solid lines: those that "
        "the SAE has learned so far. Drag the slider and watch them turn.",
        superposition_sentence(
            _point["step"],
            misses(_point["W_dec"][_member]).tolist(),
            int((_final.max(-1).values < 10).sum()),
            len(starts),
        ),
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
    mo.md(r"""
    ## 2 · Why L1 shrinks

    Train for a close $\hat x$ alone, and every latent fires on everything. We want few to fire. But
    a count has no gradient, so the standard SAE is charged for the *size* of its coefficients
    instead. That is the L1 penalty, and $\lambda$ is its weight:

    $$\mathbb E\,\lVert x - \hat x\rVert^2 \;+\; \lambda\; \mathbb E \sum_i f_i$$

    This charges in the wrong currency. A coefficient that is needed, and rightly so, can still
    save money by being a little too small.
    """)
    return


@app.cell
def shrink_question():
    ask_2 = ask(
        "A feature is there with strength 2, and λ = 0.8. Which coefficient has the least loss?",
        ["2.0", "1.6", "1.2", "0"],
    )
    ask_2
    return (ask_2,)


@app.cell
def shrink_feedback(ask_2):
    feedback(
        ask_2.value,
        "1.6",
        "At 2 - δ the error costs δ² and the penalty saves 0.8 δ. The first bit of shrinking is "
        "nearly free, the saving is not: it pays until δ = λ/2 = 0.4.",
    )
    return


@app.cell
def shrink_controls(strengths):
    l1_shrink = penalty_slider(strengths, 0.8)
    l1_shrink
    return (l1_shrink,)


@app.cell
def shrink_training(steps, strengths):
    standard, standard_history = learn(StandardSAE, strengths, [5] * len(strengths), steps)
    true, found_standard = lone_strengths(standard)
    return found_standard, standard_history, true


@app.cell
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
        The_code=source(shrink, StandardSAE),
    )
    return


@app.cell(hide_code=True)
def gate_gist():
    mo.md(r"""
    ## 3 · What gating separates

    The penalty is needed for one bit per latent: *does it fire?* So split the encoder in two paths.

    $$\begin{aligned} \pi_\text{gate} &= (x - b_\text{dec})\,W_\text{enc} + b_\text{gate} \\
    \pi_\text{mag} &= (x - b_\text{dec})\,W_\text{mag} + b_\text{mag} \\
    \tilde f &= \mathbf 1[\pi_\text{gate} > 0] \odot \mathrm{ReLU}(\pi_\text{mag}) \end{aligned}$$

    The first decides *which* latents fire. The second says *how strongly*. Only the first will be
    penalised, so nothing pulls the second away from the truth.
    """)
    return


@app.cell
def gate_question():
    ask_3 = ask(
        "At λ = 0.8, how much of a feature's true strength will a latent of a Gated SAE give back, "
        "where it fires?",
        ["about 60%, like the Standard SAE", "about 100%", "about 140%"],
    )
    ask_3
    return (ask_3,)


@app.cell
def gate_feedback(ask_3):
    feedback(
        ask_3.value,
        "about 100%",
        "The magnitudes answer to the reconstruction alone, and the best reconstruction has no "
        "bias. (How such a gate can be trained at all is the next two sections.)",
    )
    return


@app.cell
def gate_controls(strengths):
    l1_gate = penalty_slider(strengths, 0.8)
    l1_gate
    return (l1_gate,)


@app.cell
def gate_training(steps, strengths):
    gated, gated_history = learn(GatedSAE, strengths, [5] * len(strengths), steps)
    _, found_gated = lone_strengths(gated)
    return found_gated, gated, gated_history


@app.cell
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
        The_code=source(gate),
    )
    return


@app.cell(hide_code=True)
def naive_gist():
    mo.md(r"""
    ## 4 · Why the obvious loss kills the gate

    Now train it. The obvious loss is that of section 2, with $\tilde f$ in the reconstruction and
    the gate in the penalty. (A step has no gradient, so $\mathrm{ReLU}(\pi_\text{gate})$ stands in
    for it.)

    $$\mathbb E\,\lVert x - \hat x(\tilde f)\rVert^2 +
    \lambda\, \mathbb E \textstyle\sum_i \mathrm{ReLU}(\pi_\text{gate})_i$$

    It reads well. But $\tilde f$ sees $\pi_\text{gate}$ through the step alone, and a step is flat
    wherever it is not vertical.
    """)
    return


@app.cell
def naive_question():
    ask_4 = ask(
        "How does L0, the mean number of latents that fire on a row, behave under this loss?",
        ["it settles where the two terms balance", "it falls to zero", "it grows"],
    )
    ask_4
    return (ask_4,)


@app.cell
def naive_feedback(ask_4):
    feedback(
        ask_4.value,
        "it falls to zero",
        "There is no balance. The reconstruction never asks a gate to open, and the penalty always "
        "asks it to close.",
    )
    return


@app.cell
def naive_controls(strengths):
    l1_naive = penalty_slider(strengths, 0.4)
    l1_naive
    return (l1_naive,)


@app.cell
def naive_training(steps, strengths):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dead SAE has no scale to measure
        _, naive_history = learn(
            GatedSAE, strengths, [5] * len(strengths), steps // 2, tied=False, aux=None
        )
    return (naive_history,)


@app.cell
def naive_picture(l1_naive, naive_history, standard_history, strengths):
    _i = strengths.index(l1_naive.value)
    _losses = GatedSAE(2, 4, tied=False, aux=None)
    with torch.no_grad():
        _losses.W_dec.copy_(naive_history[0]["W_dec"][_i])
        _losses.W_enc.copy_(_losses.W_dec.T)
        _losses.W_mag.copy_(_losses.W_enc)
    _terms = _losses.losses(next(flatland().batches(4000, seed=1)))
    picture(
        dying_chart({"Standard": standard_history, "Gated, obvious loss": naive_history}, _i),
        "L0 on fresh rows while training in Flatland. The Standard SAE settles; with the obvious "
        "loss the gates close, one after the other, and stay closed, for every λ.",
        dying_sentence(
            gradient(_losses, _terms.reconstruct, "b_gate").tolist(),
            gradient(_losses, l1_naive.value * _terms.sparsity, "b_gate").tolist(),
            naive_history[0]["l0"][_i].item(),
            naive_history[-1]["l0"][_i].item(),
            naive_history[-1]["step"],
        ),
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
        The_code=source(incorrect_losses),
    )
    return


@app.cell(hide_code=True)
def aux_gist():
    mo.md(r"""
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
    return


@app.cell
def aux_question():
    ask_5 = ask(
        "If its decoder were not frozen, what would the auxiliary term do to the dictionary?",
        [
            "nothing, the reconstruction already trains it",
            "pull it towards what suits shrunken coefficients",
            "kill the gates again",
        ],
    )
    ask_5
    return (ask_5,)


@app.cell
def aux_feedback(ask_5):
    feedback(
        ask_5.value,
        "pull it towards what suits shrunken coefficients",
        "ReLU(π_gate) is too small, by λ/2. A decoder that is to serve it too must compromise, at "
        "the cost of the reconstruction that we keep.",
    )
    return


@app.cell
def aux_controls():
    aux_choice = mo.ui.radio(
        {
            "frozen decoder (the paper)": "frozen",
            "unfrozen": "unfrozen",
            "no L_aux (section 4)": None,
        },
        value="frozen decoder (the paper)",
        label="auxiliary term",
    )
    aux_choice
    return (aux_choice,)


@app.cell
def aux_picture(aux_choice, gated, strengths):
    _i = strengths.index(0.8)
    _x = next(flatland().batches(4000, seed=1))
    _flows = {}
    for _aux in ("frozen", "unfrozen", None):
        _sae = GatedSAE(2, 4, aux=_aux)
        _sae.load_state_dict({name: value[_i] for name, value in gated.state_dict().items()})
        _flows[_aux] = gradient_flow(_sae, _x, 0.8)
    picture(
        flow_chart(_flows[aux_choice.value]),
        "1000 times the norm of the gradient of each term of the loss (rows) with respect to each "
        "parameter (columns), on Flatland's trained Gated SAE at λ = 0.8. A grey 0 is an exact "
        "zero. Look at the column b_gate, and at W_dec as you change the auxiliary term.",
        flow_sentence(_flows["frozen"], _flows["unfrozen"]),
    )
    return


@app.cell(hide_code=True)
def aux_end(claimed):
    _measured = {row["id"]: row["measured"] for row in claimed}["G6"]
    _ratio = _measured["L0 aux unfrozen / Gated"]
    takeaway(
        "L_aux gives the gate a gradient. The frozen decoder keeps the auxiliary task from turning "
        "the dictionary to suit its shrunken coefficients. The paper finds that freezing helps; on "
        f"our toy data we could not see it: unfrozen needs {_ratio['mean']:.2f} ± "
        f"{_ratio['se']:.2f} times the L0 at equal reconstruction.",
        What_the_third_term_is=mo.md("""
        Take the usual loss of f̃ with its binary gate penalised, and add the usual loss of
        ReLU(π_gate). The penalty on the binary gate has no gradient, and what is left are the three
        terms with an unfrozen decoder. So L_aux is no trick: it is a second SAE on the same
        weights.
        """),
        The_code=source(gated_losses),
    )
    return


@app.cell(hide_code=True)
def tied_gist():
    mo.md(r"""
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
    return


@app.cell
def tied_question():
    ask_6 = ask(
        "And if W_mag is not tied to W_enc: is a Gated SAE still a JumpReLU?",
        ["yes", "only at λ = 0", "no"],
    )
    ask_6
    return (ask_6,)


@app.cell
def tied_feedback(ask_6):
    feedback(
        ask_6.value,
        "no",
        "Gate and magnitude then look along two directions. Two rows with the same π_mag can have "
        "one gate open and one shut, which no threshold on π_mag can do.",
    )
    return


@app.cell
def tied_controls():
    opens_at = mo.ui.slider(
        -1.0,
        1.5,
        step=0.05,
        value=0.6,
        label="the gate opens at z =",
        show_value=True,
        debounce=True,
    )
    r_mag = mo.ui.slider(
        -0.5, 0.5, step=0.05, value=0.2, label="r_mag", show_value=True, debounce=True
    )
    b_mag = mo.ui.slider(
        -0.5, 0.5, step=0.05, value=0.1, label="b_mag", show_value=True, debounce=True
    )
    mo.vstack([opens_at, r_mag, b_mag])
    return b_mag, opens_at, r_mag


@app.cell
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
        The_code=source(jump_relu, to_jumprelu),
    )
    return


@app.cell(hide_code=True)
def norms_gist():
    mo.md(r"""
    ## 7 · What breaks when decoder norms are penalised

    So far every $d_i$ has length 1. It must, or the penalty could be dodged: twice the $d_i$, half
    the $f_i$, the same $\hat x$ at half the price. Many codebases drop the constraint and charge
    $\sum_i f_i \lVert d_i\rVert$ instead, which that trick does not change.

    For a Standard SAE this is fine. For a Gated SAE there are now *two* places where the decoder
    may be frozen: in $L_\text{aux}$, and in the penalty's norms.
    """)
    return


@app.cell
def norms_question():
    ask_7 = ask(
        "Freeze the decoder in L_aux, as the paper does, but let the norms in the penalty have "
        "their gradient. What happens to the norms?",
        ["they stay near 1", "they go to zero", "they grow"],
    )
    ask_7
    return (ask_7,)


@app.cell
def norms_feedback(ask_7):
    feedback(
        ask_7.value,
        "they go to zero",
        "A shorter d_i lowers the penalty. The reconstruction does not mind, exp(r_mag) makes up "
        "for it. L_aux would mind, but it is not heard: its decoder is frozen.",
    )
    return


@app.cell
def norms_controls():
    norms_penalty = mo.ui.radio(
        ["live", "frozen"], value="live", label="norms in the penalty", inline=True
    )
    norms_aux = mo.ui.radio(
        ["frozen", "unfrozen"], value="frozen", label="decoder in L_aux", inline=True
    )
    mo.vstack([norms_penalty, norms_aux])
    return norms_aux, norms_penalty


@app.cell
def norms_training(steps):
    norms_history = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two of these fail, and are here to be seen failing
        for _penalty, _aux in itertools.product(("live", "frozen"), ("frozen", "unfrozen")):
            _, norms_history[f"norms {_penalty}, aux {_aux}"] = learn(
                GatedSAE, [0.8], [5], steps // 2, penalty=f"norm_{_penalty}", aux=_aux
            )
    return (norms_history,)


@app.cell
def norms_picture(claimed, norms_aux, norms_history, norms_penalty):
    _chosen = f"norms {norms_penalty.value}, aux {norms_aux.value}"
    _all = {row["id"]: row["measured"] for row in claimed}
    _measured, _standard = _all["A5"], _all["D4"]
    picture(
        norms_chart(norms_history, _chosen),
        "Mean length of the learned directions during training in Flatland (the scale is "
        "logarithmic). The thick line is the setting chosen. Frozen in both or in neither, the "
        "lengths stay; frozen in one only, they run away.",
        norms_sentence(
            _chosen,
            norms_history[_chosen][-1]["W_dec"].norm(dim=-1).mean().item(),
            norms_history[_chosen][-1]["step"],
            _measured[f"L0 {_chosen} / Gated"]["mean"],
            _standard["L0 Standard / Gated, plain"]["mean"],
        ),
    )
    return


@app.cell(hide_code=True)
def norms_end():
    takeaway(
        "with a norm-weighted penalty, freeze the decoder in both L_aux and the penalty, or in "
        "neither. Frozen in L_aux alone, the norms collapse, and with them all that Gated had "
        "gained. Users of libraries have met such drifting norms and wondered ([SAELens "
        "546](https://github.com/decoderesearch/SAELens/pull/546)).",
        The_code=source(norm_penalty),
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
    mo.md(r"""
    ## 8 · What γ measures, and what it does not

    How much too short are reconstructions? Find the $g$ by which $\hat x$ should be divided to come
    closest to $x$. That is the *relative reconstruction bias*:

    $$\gamma = \arg\min_g\; \mathbb E\,\lVert \hat x / g - x\rVert^2
    = \frac{\mathbb E\,\lVert\hat x\rVert^2}{\mathbb E[\hat x \cdot x]}$$

    Below 1, $\hat x$ is too short. At 1, no rescaling brings it closer: it is unbiased. That is
    *not* to say it is good, it may still point elsewhere. And there is a second question, easily
    taken for the first: which multiple of $x$ is nearest to $\hat x$?
    """)
    return


@app.cell
def gamma_question():
    ask_8 = ask(
        "The nearest multiple of x̂ to x is p · x̂, and the nearest multiple of x to x̂ is q · x. "
        "Is q = 1/p?",
        ["always", "only if x̂ points exactly as x does", "only if γ = 1"],
    )
    ask_8
    return (ask_8,)


@app.cell
def gamma_feedback(ask_8):
    feedback(
        ask_8.value,
        "only if x̂ points exactly as x does",
        "p q is the squared cosine of the angle between them. Turn x̂ until it is nearly "
        "perpendicular to x: then the best multiple of either is nearly 0, both p and q.",
    )
    return


@app.cell
def gamma_controls():
    degrees = mo.ui.slider(
        0, 85, step=5, value=60, label="angle of x̂ to x, degrees", show_value=True, debounce=True
    )
    length = mo.ui.slider(
        0.1, 1.2, step=0.05, value=0.5, label="length of x̂", show_value=True, debounce=True
    )
    mo.vstack([degrees, length])
    return degrees, length


@app.cell
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
        The_code=source(Moments),
    )
    return


@app.cell(hide_code=True)
def frontier_gist():
    mo.md(r"""
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
    return


@app.cell
def frontier_question():
    ask_9 = ask(
        "A Standard SAE with 1.5 times the latents costs the same to train. Does it catch up?",
        ["yes", "half of the way", "no"],
    )
    ask_9
    return (ask_9,)


@app.cell
def frontier_feedback(ask_9):
    feedback(
        ask_9.value,
        "no",
        "Here it needs more latents than the narrow one, not fewer. But mind that our worlds have "
        "exactly as many features as the narrow SAE has latents; language models have more.",
    )
    return


@app.cell
def frontier_controls():
    world_name = mo.ui.dropdown(
        ["plain", "Zipf, correlated", "hierarchical"], value="plain", label="larger world"
    )
    world_name
    return (world_name,)


@app.cell
def committed():
    saved, claimed, runs, in_language = (
        json.loads((RESULTS / f"{name}.json").read_text())
        for name in ("pareto", "claims", "runs", "language")
    )
    return claimed, in_language, runs, saved


@app.cell
def frontier_picture(runs, world_name):
    picture(
        frontier_chart(runs, world_name.value),
        "128 features in 32 dimensions, 4 active: independent and equally frequent (plain); of "
        "very unequal frequency and fond of company (Zipf, correlated); children that occur "
        "only with their parents (hierarchical). Each point is the mean of five SAEs. Committed "
        "results; `python explainer.py rebuild` measures them again, in 11 minutes.",
        frontier_sentence(runs, world_name.value),
    )
    return


@app.cell(hide_code=True)
def live_gist():
    mo.md("""
    ### Train them yourself

    Do not take it from a file. Below are SAEs trained as you opened this page, in a world of 40
    features in 20 dimensions. Train them for longer, or with another seed. Then pick one, with a
    click on its point or from the list, and look at its latents.
    """)
    return


@app.cell
def live_form(live_steps):
    live = (
        mo.md("{steps} {seed}")
        .batch(
            steps=mo.ui.slider(
                min(50, live_steps),
                500,
                value=live_steps,
                step=50,
                label="steps",
                show_value=True,
                debounce=True,
            ),
            seed=mo.ui.number(0, 999, value=1, label="seed"),
        )
        .form(submit_button_label="Train", bordered=True)
    )
    live
    return (live,)


@app.cell
def live_training(live, live_steps):
    _asked = live.value or {"steps": live_steps, "seed": 0}
    with mo.status.progress_bar(total=len(LIVE), title="Training", remove_on_exit=True) as _bar:
        live_rows, live_saes = live_runs(
            _asked["steps"],
            _asked["seed"],
            progress=lambda variant: _bar.update(1, subtitle=variant),
        )
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
    _names = {
        f"{row['variant']}, λ = {row['l1']:.2f}": i
        for i, row in enumerate(live_rows)
        if row["l0"] > 0.1
    }
    _first = [name for name in _names if name.startswith("Standard,")][-2]
    choice, choose = mo.state(_names[_first])
    live_list = mo.ui.dropdown(_names, value=_first, label="inspect", on_change=choose)
    live_list
    return choice, choose


@app.cell
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
def frontier_end(runs, saved):
    takeaway(
        '"half as many features" means that half as many latents fire on a row, at equal '
        "reconstruction. It does not say that the dictionary is smaller, or truer.",
        A_longer_run=mo.md(
            f"{verdict(saved['table'])} (256 features in 64 dimensions, {saved['steps']} steps, "
            "`python explainer.py`.)"
        ),
        How_much_of_the_truth_was_found=mo.vstack(
            [
                mo.md(
                    "On the plain world, at FVU 0.2. MCC: mean cosine of true and learned "
                    "directions, matched one to one. F1: of latents as detectors of their "
                    "features. Gated detects better, and on this data its directions are *less* "
                    "true than those of Standard."
                ),
                mo.md(
                    as_markdown(
                        [
                            {key: row[key] for key in ("variant", "L0", "MCC", "F1")}
                            for row in recovered(runs)
                            if row["data"] == "plain"
                        ]
                    )
                ),
            ]
        ),
        The_code_of_a_training_step=source(step_on_unit_norm),
    )
    return


@app.cell(hide_code=True)
def jump_gist():
    mo.md(r"""
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
    return


@app.cell
def jump_question():
    ask_10 = ask(
        "θ = 0.5, and z goes from 0 to 1.5, so the JumpReLU goes from 0 to 1.5. What do integrated "
        "gradients attribute to it?",
        ["0.5", "1.0", "1.5"],
    )
    ask_10
    return (ask_10,)


@app.cell
def jump_feedback(ask_10):
    feedback(
        ask_10.value,
        "1.0",
        "The slope is 0 up to θ and 1 from there to 1.5: that adds up to 1.0. At the jump there is "
        "no slope to add.",
    )
    return


@app.cell
def jump_controls():
    theta = mo.ui.slider(
        0.0, 1.5, step=0.05, value=0.5, label="threshold θ", show_value=True, debounce=True
    )
    z_end = mo.ui.slider(0.05, 2.0, step=0.05, value=1.5, label="z", show_value=True, debounce=True)
    mo.vstack([theta, z_end])
    return theta, z_end


@app.cell
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
        The_code=source(integrated_gradients, activation_patching),
    )
    return


@app.cell(hide_code=True)
def language_gist():
    mo.md("""
    ## 11 · In a language model

    Toy data is made to be found. So here is a transformer of one layer that predicts the next byte
    of Python's own help texts, and SAEs for what its MLP puts out. Their reconstruction goes back
    into the model in place of the original, and what counts is how well it then predicts text that
    neither has read: its cross-entropy (**CE**, nats per byte).
    """)
    return


@app.cell
def language_question():
    ask_11 = ask(
        "In the toy world Gated needed about half the latents at equal FVU. And here, at equal CE?",
        ["about half", "about as many", "more"],
    )
    ask_11
    return (ask_11,)


@app.cell
def language_feedback(ask_11):
    feedback(
        ask_11.value,
        "about half",
        "The lead holds downstream, on one small model. At equal FVU it looks larger than it is: "
        "what counts for FVU is not quite what counts for the model.",
    )
    return


@app.cell
def language_picture(in_language):
    _ce = in_language["ce"]
    _levels = [(_ce[k], n) for k, n in (("clean", "as it is"), ("zero", "zeros"), ("mean", "mean"))]
    picture(
        spliced_chart(in_language, "ce", "CE once spliced in, nats per byte", _levels),
        "Each point is an SAE with a λ of its own, spliced into the model. Dashed: the model as it "
        "is, and with zeros or the mean in place of its MLP's output. Committed results; "
        "`python explainer.py rebuild language` measures them again.",
        language_verdict(in_language),
    )
    return


@app.cell(hide_code=True)
def recovered_gist():
    mo.md(r"""
    ### Loss recovered

    *Loss recovered* sets that CE on a scale: 1 is as good as $x$ itself, 0 as bad as *ablating*,
    which is putting zeros, or the mean of $x$, in its place.

    $$\frac{\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{SAE}}
    {\mathrm{CE}_\text{ablated} - \mathrm{CE}_\text{clean}}$$
    """)
    return


@app.cell
def recovered_question():
    ask_12 = ask(
        "Against which baseline do SAEs look better, and can the choice change which of two is "
        "ahead?",
        [
            "the one that breaks the model more; no",
            "the one that breaks the model more; yes",
            "the one that breaks it less; no",
        ],
    )
    ask_12
    return (ask_12,)


@app.cell
def recovered_feedback(ask_12):
    feedback(
        ask_12.value,
        "the one that breaks the model more; no",
        "A worse baseline makes every SAE look better. But the score is a straight line, falling "
        "in the SAE's own loss, whichever baseline is used: the order stays.",
    )
    return


@app.cell
def recovered_controls():
    ablation = mo.ui.radio(["zero", "mean"], value="zero", inline=True, label="ablated with")
    ablation
    return (ablation,)


@app.cell
def recovered_picture(ablation, in_language):
    picture(
        recovered_chart(in_language, ablation.value),
        "Loss recovered by the same SAEs against the baseline you choose. Switch it: all points "
        "move, and none overtakes another.",
        recovered_sentence(in_language),
    )
    return


@app.cell(hide_code=True)
def recovered_end():
    takeaway(
        "always ask which ablation a loss recovered is measured against: it moves every score, and "
        "decides none. It is often said that zeros flatter; in this model the mean does.",
        The_code=source(loss_recovered, splice),
        The_model=source(LanguageModel),
    )
    return


@app.cell(hide_code=True)
def next_gist():
    mo.md("""
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
    return


@app.cell(hide_code=True)
def next_sentence(claimed):
    mo.callout(mo.md(claims_sentence(claimed)), kind="info")
    return


@app.cell(hide_code=True)
def claims_heading():
    mo.md("""
    ### What was claimed, and what is measured

    The paper's announcement was discussed at length. The claims made there were measured, nearly
    all in the larger worlds and with 5 seeds; what no toy can decide is marked. Verdicts are
    computed. Committed results; `python explainer.py rebuild` measures them again.
    """)
    return


@app.cell
def claims_table(claimed):
    mo.accordion(
        {
            verdict: mo.md(claims_list(claimed, verdict))
            for verdict in ("disagrees", "not decidable on toy data", "agrees")
        }
    )
    return


if __name__ == "__main__":
    app.run()
