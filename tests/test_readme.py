"""The README's code runs and prints what it says; its one sentence of result is computed."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gated_sae
from results import claims, measure

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"-?\d+\.\d+")


def blocks(language):
    """A block of code, and the text block that it prints."""
    form = rf"```{language}\n(.*?)```\n\nprints\n\n```text\n(.*?)```"
    return re.search(form, README, re.S).groups()


def assert_prints(commands, cwd, shown):
    """The last of them: same words; numbers within 5%, for other CPUs round otherwise."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for command in commands:
        args = [sys.executable, *command]
        run = subprocess.run(args, cwd=cwd, capture_output=True, text=True, env=env)
        assert run.returncode == 0, run.stderr
    assert NUMBER.sub("#", run.stdout).split() == NUMBER.sub("#", shown).split()
    printed, promised = (list(map(float, NUMBER.findall(text))) for text in (run.stdout, shown))
    assert printed == pytest.approx(promised, rel=0.05)


def test_the_python_block_prints_what_the_text_block_shows(tmp_path):
    code, shown = blocks("python")
    assert code.count("\n") <= 10
    assert_prints([["-c", code]], tmp_path, shown)
    assert gated_sae.load(tmp_path / "my_sae").d_sae == 256


def test_the_commands_print_what_the_text_block_shows(tmp_path):
    commands, shown = blocks("bash")
    commands = [command.split()[1:] for command in commands.splitlines()]
    assert_prints([[str(ROOT / script), *args] for script, *args in commands], tmp_path, shown)
    assert gated_sae.load(tmp_path / "runs/a/sae").d_sae == 256


class Transformer(torch.nn.Module):
    """Stands in for GPT-2: a tokenizer's output in, an object with a loss out."""

    def __init__(self):
        super().__init__()
        self.transformer = torch.nn.Module()
        self.embedding = torch.nn.Embedding(256, 768)
        self.transformer.h = torch.nn.ModuleList(torch.nn.Module() for _ in range(7))
        for block in self.transformer.h:
            block.mlp = torch.nn.Linear(768, 768)

    def forward(self, input_ids, attention_mask, labels=None):
        x = self.embedding(input_ids)
        for block in self.transformer.h:
            x = x + block.mlp(x)
        return SimpleNamespace(loss=x.square().mean())


def test_the_lines_for_a_language_model_and_for_going_on_run(tmp_path, monkeypatch):
    """With a stand-in for it, few and short texts, and small sizes: all else as it stands."""
    monkeypatch.chdir(tmp_path)
    _, code, more = re.findall(r"```python\n(.*?)```", README, re.S)
    for shown, small in (("16384", "64"), ("4096", "8"), ("steps=1000", "steps=4")):
        assert code.count(shown) == 1
        code = code.replace(shown, small)

    def tokenizer(text, return_tensors):
        ids = torch.tensor([list(text.encode())])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    names = dict(
        GPT2LMHeadModel=SimpleNamespace(from_pretrained=lambda name: Transformer()),
        GPT2Tokenizer=SimpleNamespace(from_pretrained=lambda name: tokenizer),
        texts=["A text of some length.", "And another, no longer."],
    )
    names |= vars(gated_sae)
    exec(code, names)
    assert names["record"].step == 4
    assert names["loss"].item() > 0
    gated_sae.save(before := names["sae"], "sae")
    names |= {"rows": [torch.randn(8, 768)] * 7}
    exec(more.replace("steps=1000", "steps=7"), names)
    assert names["record"].step == 7
    assert 0 < (names["sae"].b_dec - names["c"] * before.b_dec).abs().max() < 7 * 3e-4 * 2


def test_the_two_commands_stand_alone_on_their_lines():
    for command in ("marimo run explainer.py", "pytest"):
        assert f"\n    pip install -r requirements.txt && {command}\n" in README


def test_results_are_those_computed_and_links_and_pictures_exist():
    runs = [*measure.read("runs"), *measure.read("language")]
    assert claims.verdict(runs) in (said := " ".join(README.split()))
    steps = [
        float(row["SAELens"])
        for row in measure.read("speed")
        if row["on"] == "2 threads" and "SAELens" in row
    ]
    assert (
        f"time of a step, on two cores {min(steps):.2g} to {max(steps):.2g} times shorter" in said
    )
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
