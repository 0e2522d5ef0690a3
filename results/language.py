"""A small language model, and SAEs spliced into it: how many latents fire at equal CE."""

import itertools
import sys
from pydoc_data.topics import topics

import altair as alt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gated_sae import harvest, loss_recovered, rescaled, shuffle, splice, variance
from results.measure import as_markdown, at_equal_compute, at_levels, curves, swept

# What is spliced in for the MLP's 128 numbers: SAEs 4 times as wide.
SPLICED = at_equal_compute((0.6, 9.0), (1.2, 18.0), 512)


def english() -> tuple[Tensor, Tensor]:
    """(read, held_out): bytes of Python's own help texts; the last tenth is held out.

    Topics quote each other, so a paragraph is kept only where it first comes: or else one byte in
    seven of what is held out would stand in a stretch of 40 that has been read.
    """
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = torch.frombuffer(bytearray("\n\n".join(paragraphs).encode()), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


class LanguageModel(nn.Module):
    """A transformer of one layer: bytes (batch, tokens) -> logits of the next (batch, tokens, 256),
    for at most `context` tokens."""

    def __init__(self, d_model=128, n_heads=8, context=128):
        super().__init__()
        self.n_heads, self.context, wide = n_heads, context, 4 * d_model
        self.byte = nn.Embedding(256, d_model)
        self.position = nn.Embedding(context, d_model)
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(3))
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.project = nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, wide), nn.GELU(), nn.Linear(wide, d_model))
        self.unembed = nn.Linear(d_model, 256, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    def attend(self, x: Tensor) -> Tensor:
        """Each position reads from itself and those before it."""
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1))  # (batch, tokens, 3, heads, d)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each (batch, heads, tokens, d)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.project(mixed.transpose(1, 2).flatten(2))  # (batch, tokens, d_model)

    def forward(self, ids: Tensor) -> Tensor:
        before_attention, before_mlp, at_end = self.norms
        x = self.byte(ids) + self.position.weight[: ids.shape[1]]  # (batch, tokens, d_model)
        x = x + self.attend(before_attention(x))
        x = x + self.mlp(before_mlp(x))
        return self.unembed(at_end(x))  # (batch, tokens, 256)


def cross_entropy(model: LanguageModel, ids: Tensor) -> Tensor:
    """Of each byte given those before it in its row of (batch, tokens): nats per byte."""
    logits, following = model(ids)[:, :-1], ids[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


def stretches(text: Tensor, length: int, batch: int, seed: int):
    """Stretches of the text that start anywhere, without end: (batch, length)."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - length + 1, (batch, 1), generator=generator)
        yield text[start + torch.arange(length)]


def in_rows(text: Tensor, length: int) -> Tensor:
    """The whole text, but for what is left at the end: (n, length)."""
    return text[: len(text) // length * length].view(-1, length)


def trained_model(text: Tensor, steps=1200, seed=0) -> LanguageModel:
    """A LanguageModel that has read 16 stretches of 128 bytes a step; its weights are frozen."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator
        torch.manual_seed(seed)
        model = LanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    inputs = itertools.islice(stretches(text, model.context, 16, seed), steps)
    for ids in tqdm(inputs, "language model", steps, leave=False, disable=None):
        loss = cross_entropy(model, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
    return model.requires_grad_(False)


def guessing(text: Tensor, held_out: Tensor) -> dict[str, float]:
    """CE in nats per byte without a model: from counts of bytes, and of bytes after a byte (and one
    more in all, spread as single bytes are)."""
    single = torch.bincount(text, minlength=256) + 1.0
    single /= single.sum()
    pairs = torch.bincount(256 * text[:-1] + text[1:], minlength=256**2).view(256, 256) + single
    pairs /= pairs.sum(1, keepdim=True)
    before, after = held_out[:-1], held_out[1:]
    odds = {"unigram": single[after], "bigram": pairs[before, after]}
    return {name: -p.log().mean().item() for name, p in odds.items()}


def experiment(model_steps=1200, steps=1500, seed=0, n_l1=7) -> dict:
    """A language model, and SAEs of its MLP's output: CE in nats per byte of held-out text.

    It is clean, with the MLP's output ablated (zeros, or its mean), or with x̂ in its place.
    """
    read, held_out = english()
    model = trained_model(read, model_steps, seed)
    ids = in_rows(held_out, model.context)
    x = torch.cat(list(harvest(model, model.mlp, ids.split(64))))
    # SAEs are trained on c x, of variance d_in: there, λ and lr mean what they mean elsewhere.
    every, d_in = in_rows(read, model.context).split(64), x.shape[1]
    c = (d_in / variance(harvest(model, model.mlp, every), d_in).item()) ** 0.5

    def spliced(put):
        with splice(model.mlp, put), torch.no_grad():
            return cross_entropy(model, ids).item()

    def rows(_):
        inputs = stretches(read, model.context, 64, seed)
        scaled = (c * x for x in harvest(model, model.mlp, inputs))
        return shuffle(scaled, 512, held=2**16, seed=seed)

    ce = guessing(read, held_out) | {"clean": cross_entropy(model, ids).item()}
    ce |= {"zero": spliced("zero"), "mean": spliced(x.mean(0))}
    table = []
    for name, recipe in SPLICED.items():
        l1, options = recipe.strengths(n_l1), {"d_in": d_in, "seed": seed, "device": "cpu"}
        recipe = recipe._replace(finish=lambda sae: rescaled(sae, 1 / c))
        for at, sae, row in swept(recipe, rows, l1, steps, x.split(1024), what=name, **options):
            start = {"variant": name, "d_sae": recipe.d_sae, "l1": round(l1[at].item(), 5)}
            now = spliced(sae)
            end = {"ce": round(now, 5)}
            for base in ("zero", "mean"):
                end[f"recovered_{base}"] = round(loss_recovered(now, ce["clean"], ce[base]), 5)
            table.append(start | row | end)
    made = {"python": sys.version.split()[0]}  # whose help texts these are
    made |= {"steps": {"language model": model_steps, "SAEs": steps}, "seed": seed}
    return made | {"ce": {name: round(value, 5) for name, value in ce.items()}, "table": table}


def comparison(found: dict, levels=(0.8, 0.9, 0.95, 0.98)) -> list[dict]:
    """At each share of the loss recovered (mean ablation) that all kinds reach: L0, γ and FVU.

    At equal CE, that is. The same CE recovers another share of the loss beside zero ablation.
    """
    ce, rows = found["ce"], []
    # What splicing adds to CE may stand in for FVU: a level of it is found just as well.
    added = [row | {"fvu": row["ce"] - ce["clean"], "FVU": row["fvu"]} for row in found["table"]]
    allowed = {(1 - level) * (ce["mean"] - ce["clean"]): level for level in levels}
    columns = {"γ": "gamma", "FVU": "FVU"}
    for more, row in at_levels(added, SPLICED, allowed, columns, of=("Standard", "Gated")):
        zero = 1 - more / (ce["zero"] - ce["clean"])
        start = {"recovered, mean": allowed[more], "recovered, zero": round(zero, 3)}
        rows.append(start | {"CE": round(ce["clean"] + more, 3)} | row)
    return rows


def losses(found: dict) -> str:
    """How good the model is, and what ablating its MLP costs it, in words."""
    ce = {key: f"{value:.2f}" for key, value in found["ce"].items()}
    worse = "more" if found["ce"]["zero"] > found["ce"]["mean"] else "less"
    return (
        f"The model's CE is {ce['clean']}; counts of bytes give {ce['unigram']}, of pairs of "
        f"bytes {ce['bigram']}. With its MLP's output set to zero it is {ce['zero']}, to its "
        f"mean {ce['mean']}: here zeros cost {worse} than the mean."
    )


def verdict(found: dict) -> str:
    """Who is ahead at equal CE, with the numbers computed from the table."""
    rows = comparison(found)
    if not rows:
        return "The kinds share no level of CE, so they cannot be compared: train for longer."

    def against(variant):
        ratios = sorted(row[f"{variant} / Gated"] for row in rows)
        mixed = "neither is ahead at every level"
        who = "Gated is ahead" if ratios[0] > 1 else "Gated is behind" if ratios[-1] < 1 else mixed
        return f"{variant} has {ratios[0]:.2f} to {ratios[-1]:.2f} times its L0 ({who})"

    least, most = rows[0]["recovered, mean"], rows[-1]["recovered, mean"]
    return (
        f"Beside Gated, at equal CE ({least:.0%} to {most:.0%} of the loss recovered, "
        f"against mean ablation): {against('Standard')}; {against('Standard 1.5x')}."
    )


def measured(steps: int, seed: int) -> dict:
    """{name of a JSON file: what it holds}."""
    return {"language": experiment(min(steps, 1200), min(steps, 1500), seed)}


def shown(read) -> tuple[alt.HConcatChart, dict[str, str]]:
    """CE with x̂ spliced in, and FVU, against L0; {place in README.md: text}."""
    found = read("language")
    names = {"clean": "clean", "mean": "mean-ablated", "zero": "zero-ablated"}
    levels = [{"ce": found["ce"][key], "name": name} for key, name in names.items()]
    rules = alt.Chart(alt.Data(values=levels)).encode(y="ce:Q")
    labels = rules.mark_text(align="left", dx=4, dy=-6, x=0).encode(text="name:N")
    ce = curves(found["table"], "ce", "CE once spliced in, nats per byte", per="byte", log=False)
    fvu = curves(found["table"], "fvu", "FVU: variance unexplained", per="byte")
    return (rules.mark_rule(strokeDash=[4, 4]) + labels + ce) | fvu, {
        "language": as_markdown(comparison(found)),
        "language model": losses(found),
        "language verdict": verdict(found),
    }
