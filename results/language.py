"""A small language model for SAEs to be spliced into, and smaller ones: what a CE is worth."""

import itertools
import shutil
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from pydoc_data.topics import topics

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from gated_sae import SAE, harvest, load, rescaled, save, splice
from results.measure import RESULTS, epochs, side_by_side

SIZES = (16, 24, 32, 48, 64, 96)  # d_model of the smaller ones; the model itself has 128
KEPT = {"Standard": 1.8, "Gated": 3.6}  # λ of two SAEs through which as much of the loss is lost


def english() -> tuple[Tensor, Tensor]:
    """(read, held_out): bytes of Python's own help texts, the last tenth held out. They quote each
    other, so a paragraph is kept only where it first comes."""
    paragraphs = dict.fromkeys("\n\n".join(topics.values()).split("\n\n"))
    text = torch.frombuffer(bytearray("\n\n".join(paragraphs).encode()), dtype=torch.uint8).long()
    return text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]


class LanguageModel(nn.Module):
    """A transformer of one layer: bytes (batch, tokens) -> logits of the next (batch, tokens, 256),
    for at most `context` tokens."""

    def __init__(self, d_model=128, n_heads=8, context=128):
        super().__init__()
        self.context = context
        self.byte = nn.Embedding(256, d_model)
        self.position = nn.Embedding(context, d_model)
        kind = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layer = nn.TransformerEncoderLayer(d_model, n_heads, 4 * d_model, **kind)
        self.norm = nn.LayerNorm(d_model)
        self.unembed = nn.Linear(d_model, 256, bias=False)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)

    @property
    def mlp(self) -> nn.Module:
        """What it puts out is x."""
        return self.layer.linear2

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        x = self.byte(ids) + self.position.weight[:tokens]  # (batch, tokens, d_model)
        later = nn.Transformer.generate_square_subsequent_mask(tokens)  # is not read
        x = self.layer(x, later, is_causal=True)  # attention, then MLP, each added to x
        return self.unembed(self.norm(x))  # (batch, tokens, 256)


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


def trained_model(text: Tensor, steps=1200, seed=0, d_model=128) -> LanguageModel:
    """A LanguageModel that has read 16 stretches of 128 bytes a step; its weights are frozen."""
    with torch.random.fork_rng(devices=[]):  # torch's layers draw from the global generator
        torch.manual_seed(seed)
        model = LanguageModel(d_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    inputs = itertools.islice(stretches(text, model.context, 16, seed), steps)
    what = f"language model, {d_model} wide"
    for ids in tqdm(inputs, what, steps, leave=False, disable=None):
        loss = cross_entropy(model, ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step()
    return model.requires_grad_(False)


class Model:
    """One of each seed, whose MLP puts out x, (bytes, 128). SAEs see c x, E‖c x - E c x‖² = d_in,
    where coefficients are some six times as large as those of toy data."""

    d_in, size, lr = 128, 6, 1e-2  # at the default 0.0044 Standard needs three times the steps

    def __init__(self, seeds: int, steps: int):
        self.seeds, self.steps, (self.read, text) = range(seeds), steps, english()
        self.unread = in_rows(text, 128)

    @cached_property
    def models(self) -> list[LanguageModel]:
        return [trained_model(self.read, self.steps, seed) for seed in self.seeds]

    def put_out(self, ids: Tensor) -> list[Tensor]:
        """x as each model reads."""
        return [torch.cat([*harvest(m, m.mlp, ids.split(64))]) for m in self.models]

    @cached_property
    def scaled(self) -> tuple[list[Tensor], list[float]]:
        """c x, of the text that the models have read, and c."""
        rows = self.put_out(in_rows(self.read, 128))
        scales = [(self.d_in / x.var(0).sum().item()) ** 0.5 for x in rows]
        return [x.mul_(c) for x, c in zip(rows, scales, strict=True)], scales

    @cached_property
    def x(self) -> list[Tensor]:
        """Of text that they have not."""
        return self.put_out(self.unread)

    def stream(self, offset: int, batch=512, copies=()) -> Iterator[Tensor]:
        streams = (epochs(x, batch, 10**9, i + offset) for i, x in enumerate(self.scaled[0]))
        return side_by_side(streams, copies)

    def held_out(self, copies: tuple) -> Iterator[Tensor]:
        each = zip(self.x, self.scaled[1], strict=True)
        return side_by_side([(c * x).split(1024) for x, c in each], copies)

    def spliced(self, seed: int, put) -> float:
        """CE with something in place of x."""
        model = self.models[seed]
        with splice(model.mlp, put), torch.no_grad():
            return cross_entropy(model, self.unread).item()

    @cached_property
    def ce(self) -> list[dict[str, float]]:
        """Of each model: as it is, and with zeros or the mean for x."""
        rows = []
        for seed, (model, x) in enumerate(zip(self.models, self.x, strict=True)):
            row = {"seed": seed, "clean": cross_entropy(model, self.unread).item()}
            row |= {"zero": self.spliced(seed, "zero"), "mean": self.spliced(seed, x.mean(0))}
            rows.append({name: round(value, 5) for name, value in row.items()})
        return [row | {"python": sys.version.split()[0]} for row in rows]  # whose help texts

    def scores(self, sae: SAE, seed: int) -> dict[str, float]:
        """CE with x̂ in place of x; and what of the loss is lost, between x and E x."""
        now, ce = self.spliced(seed, rescaled(sae, 1 / self.scaled[1][seed])), self.ce[seed]
        return {"ce": now, "lost": (now - ce["clean"]) / (ce["mean"] - ce["clean"])}

    def keep(self, saes: dict[str, SAE], folder: Path) -> None:
        """Save the first model, in float16, and SAEs of its own x, for `kept`."""
        halves = {name: weight.half() for name, weight in self.models[0].state_dict().items()}
        save_file(halves, folder / "language_model.safetensors")
        saes = {kind: rescaled(sae, 1 / self.scaled[1][0]) for kind, sae in saes.items()}
        for kind, sae in saes.items():
            shutil.rmtree(folder / kind.lower(), ignore_errors=True)
            save(sae, folder / kind.lower())

    def smaller(self) -> list[dict]:
        """CE of smaller models, which read less in proportion: compute is 6 parameters x bytes."""
        rows = []
        for seed, d_model in itertools.product(self.seeds, (*SIZES, 128)):
            steps = max(1, self.steps * d_model // 128)
            own = d_model < 128 and trained_model(self.read, steps, seed, d_model)
            model, n_bytes = own or self.models[seed], steps * 16 * 128
            n, ce = sum(p.numel() for p in model.parameters()), cross_entropy(model, self.unread)
            row = {"seed": seed, "d_model": d_model, "parameters": n, "bytes": n_bytes}
            rows.append(row | {"compute": 6 * n * n_bytes, "ce": round(ce.item(), 5)})
        return rows


def kept(folder: Path = RESULTS) -> tuple[LanguageModel, dict[str, SAE]]:
    """A model, and the SAEs of what its MLP puts out."""
    model = LanguageModel().requires_grad_(False)
    model.load_state_dict(load_file(folder / "language_model.safetensors"))
    return model, {kind: load(folder / kind.lower()) for kind in KEPT}
