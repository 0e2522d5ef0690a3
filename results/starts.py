"""How an SAE should start: python results/starts.py ACTIVATIONS.npy; goes on where it stopped.

Gated SAEs on rows of E‖x - E x‖² = d_in, batch 512. W_enc is so many times W_decᵀ; each gate opens
at so many root mean squares of its z; what else differs from the defaults is named.
"""

import argparse
import itertools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from gated_sae import GatedSAE, Trainer, evaluate, variance
from results.measure import RESULTS, as_markdown
from results.rebuild import filled

NEVER = dict(resample_every=None)
OLD = NEVER | dict(betas=(0.0, 0.999))
TRIED = {  # factor on W_enc, where gates open, options of the Trainer
    "as it was: 1, 0; β₁ 0, no resampling, b_dec 0": (1, 0, OLD),
    "0.1, 0; β₁ 0, no resampling": (0.1, 0, OLD),
    "0.1, 2; β₁ 0, no resampling": (0.1, 2, OLD),
    "0.1, 2; no resampling": (0.1, 2, NEVER),
    "0.1, 2: the default": (0.1, 2, {}),
    "0.1, 0": (0.1, 0, {}),
    "0.1, 3": (0.1, 3, {}),
    "0.01, 2": (0.01, 2, {}),
    "1, 2": (1, 2, {}),
    "0.1, 2; λ warms up in 0.3": (0.1, 2, dict(l1_warmup=0.3)),
    "0.1, 2; lr 0.02 / √d_in": (0.1, 2, dict(lr=0.02)),
    "0.1, 2; lr 0.1 / √d_in": (0.1, 2, dict(lr=0.1)),
    "0.1, 2; lr 0.2 / √d_in": (0.1, 2, dict(lr=0.2)),
}
SIZES = {"d_sae 1024, 1000 steps": (1024, 1000, (5, 10)), "4096, 1500": (4096, 1500, (8,))}


def run(x, held_out, tried, d_sae, steps, l1) -> dict:
    factor, opens_at, options = TRIED[tried]
    if "lr" in options:
        options = options | {"lr": options["lr"] / x.shape[1] ** 0.5}
    sae, order = GatedSAE(x.shape[1], d_sae), torch.Generator().manual_seed(0)
    epochs = (torch.randperm(len(x), generator=order)[: len(x) // 512 * 512] for _ in range(99))
    batches = (x[i] for epoch in epochs for i in epoch.split(512))
    first = next(batches)
    with torch.no_grad():  # numbers other than 0 are the caller's: `start` leaves them alone
        sae.W_enc *= 10 * factor
        sae.b_dec += 1e-9 if "b_dec 0" in tried else first.mean(0)
        sae.b_gate -= 1e-9 + opens_at * sae.project(first).square().mean(0).sqrt()
    trainer, start = Trainer(sae, l1=l1, steps=steps, device="cpu", **options), time.process_time()
    for batch in tqdm(itertools.islice(batches, steps), f"{tried} | {d_sae}, λ {l1}", steps):
        trainer.step(batch)
    seconds, m = time.process_time() - start, evaluate(sae, held_out.split(1000))
    found = dict(l0=m.l0, fvu=m.fvu, gamma=m.gamma, dead=m.dead_fraction, seconds=seconds)
    return {name: round(float(value), 4) for name, value in found.items()}


def table(rows: list[dict]) -> str:
    lines = []
    for tried in dict.fromkeys(row["tried"] for row in rows):
        line = {"W_enc, gates open at": tried}
        for size, (d_sae, _, strengths) in SIZES.items():
            for l1 in strengths:
                key = {"tried": tried, "d_sae": d_sae, "l1": l1}
                own = [row for row in rows if key.items() <= row.items()]
                show = "{l0:.2f} / {fvu:.3f} / {:.1f} % / {seconds:.0f} s"
                text = show.format(100 * own[0]["dead"], **own[0]) if own else ""
                line[f"{size}, λ {l1}"] = text
        lines.append(line)
    return as_markdown(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("activations", type=Path)
    torch.set_num_threads(1)
    x = torch.from_numpy(np.load(parser.parse_args().activations)).float()
    x *= math.sqrt(x.shape[1] / variance(x.split(8000), x.shape[1]))
    file = RESULTS / "starts.json"
    rows = json.loads(file.read_text()) if file.exists() else []
    plan = [(t, *size[:2], l1) for size in SIZES.values() for t in TRIED for l1 in size[2]]
    plan = [row for row in plan if row[1] == 1024 or row[0] in [*TRIED][:5]]  # wide ones take long
    for tried, d_sae, steps, l1 in plan:
        made = dict(tried=tried, d_sae=d_sae, steps=steps, l1=l1)
        if not any(made.items() <= row.items() for row in rows):
            rows.append(made | run(x[8000:], x[:8000], tried, d_sae, steps, l1))
            lines = [json.dumps(row, ensure_ascii=False) for row in rows]
            file.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    readme = RESULTS / "README.md"
    readme.write_text(filled(readme.read_text(), {"starts": table(rows)}))
    print(table(rows))
