"""Nothing points forward: the module, cut off at the end of any section, does what it promises."""

import inspect
import pydoc
import re
import sys
from pathlib import Path

import pytest
import torch

import gated_sae

SOURCE = Path(gated_sae.__file__).read_text()
PARTS = re.split(r"^(?=# -- \d+ · )", SOURCE, flags=re.M)  # the first is no section: the docstring
FIRST = dict(Standard=2, Gated=6, NaturalGated=7, SigmoidGated=7, SoftCutoff=7, JumpReLU=7)
OPTIONS = dict(Standard="penalty", Gated="penalty tied aux", SigmoidGated="penalty tied aux")
OPTIONS |= dict(NaturalGated="penalty aux", SoftCutoff="penalty s", JumpReLU="bandwidth")


@pytest.mark.parametrize("n", range(1, 13))
def test_the_file_cut_off_after_a_section_does_what_it_promises(n, tmp_path, monkeypatch):
    m = type(sys)(f"gated_sae_cut_off_after_{n}")
    monkeypatch.setitem(sys.modules, m.__name__, m)  # where dataclasses look
    exec(compile("".join(PARTS[:n]), m.__name__, "exec"), vars(m))
    assert [int(part.split()[2]) for part in PARTS[1:]] == list(range(2, 13))
    saes = [getattr(m, f"{kind}SAE")(4, 8) for kind, first in FIRST.items() if n >= first]
    torch.manual_seed(0)
    x = torch.randn(64, 4)
    for sae in saes:
        for p in sae.parameters():
            p.data += torch.randn(p.shape) / 10
        (sae.losses(x).total(0.1) + sae(x).sum()).backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in sae.parameters())
    if n >= 3:
        pi, pi_mag = saes[0].project(x), torch.randn(64, 8)
        given = x, m.gate(pi, pi_mag), pi, saes[0].W_dec, saes[0].b_dec
        assert torch.equal(given[1] > 0, (pi > 0) & (pi_mag > 0))
    if n >= 4:
        assert m.incorrect_losses(*given).aux == 0 < m.incorrect_losses(*given).sparsity
    if n >= 5:
        assert m.gated_losses(*given).aux > 0
    if n >= 7:
        for sae in saes[:3]:
            for new in (m.to_jumprelu(sae), m.to_gated(sae)):
                torch.testing.assert_close(new(x), sae(x))
        torch.testing.assert_close(m.rescale_and_shift(saes[0])(x), saes[0](x))
    before = m.evaluate(saes[1], [x]).fvu if n >= 8 else None
    if n >= 9:
        *_, last = m.train(saes[1], [x] * 50, l1=0.01, steps=50, lr=1e-2, device="cpu")
        assert last.metrics.fvu < 0.9 * before
    if n >= 10:
        (y,) = m.harvest(module := torch.nn.Linear(4, 4), module, [x])
        with m.splice(module, saes[1]):
            assert torch.equal(module(x), saes[1](y))
    if n >= 11:
        m.save(saes[1], tmp_path / "a")
        assert torch.equal(m.load(tmp_path / "a")(x), saes[1](x))
    if n >= 12:
        torch.testing.assert_close(m.fast_losses(saes[1], x, True), saes[1].losses(x))
        assert m.Trainer.default_losses is m.fast_losses


def test_the_file_imports_torch_alone_and_names_no_device_mesh():
    imported = set(re.findall(r"^(?:from|import) (\w+)", SOURCE, re.M)) - sys.stdlib_module_names
    assert imported == {"torch"}
    assert not re.search("mesh|shard|DTensor", SOURCE)


@pytest.mark.parametrize("kind", OPTIONS)
def test_help_shows_every_keyword(kind):
    keywords = {"d_in", "d_sae", "stack", "generator", "device", "dtype", *OPTIONS[kind].split()}
    constructor = getattr(gated_sae, f"{kind}SAE")
    assert inspect.signature(constructor).parameters.keys() == keywords
    assert all(f"{k}: " in pydoc.plain(pydoc.render_doc(constructor)) for k in keywords)
