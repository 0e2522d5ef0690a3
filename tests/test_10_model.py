"""Section 10: activations out of a model and x̂ back into it."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from random_saes import assert_equal, random_sae
from torch import nn

from gated_sae import harvest, loss_recovered, shuffle, splice


class Block(nn.Module):
    """As transformers have them: hidden states first in a tuple."""

    def __init__(self, d):
        super().__init__()
        self.linear = nn.Linear(d, d)
        self.called = 0

    def forward(self, x):
        self.called += 1
        return self.linear(x), "cache"


class Model(nn.Module):
    def __init__(self, d=6, vocabulary=11):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, d)
        self.first, self.second, self.unused = Block(d), Block(d), nn.Linear(d, d)
        self.head = nn.Linear(d, vocabulary)

    def forward(self, input_ids, attention_mask=None):
        x, _ = self.first(self.embedding(input_ids))
        x, cache = self.second(x)
        assert cache == "cache"
        return self.head(x)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def tokens(*shape, seed=0):
    return torch.randint(11, shape, generator=torch.Generator().manual_seed(seed))


def no_hooks(model):
    return not any(module._forward_hooks for module in model.modules())


# -- harvest ---------------------------------------------------------------------------------------


def test_what_is_harvested_is_what_the_module_puts_out(model):
    ids = tokens(3, 5)
    expected = model.first(model.embedding(ids))[0].flatten(0, 1)
    for given_as in (ids, (ids,), {"input_ids": ids}):
        (x,) = harvest(model, model.first, [given_as])
        assert_equal(x, expected.detach(), rtol=0, atol=0)
        assert not x.requires_grad
    assert no_hooks(model)


def test_the_rest_of_the_model_is_not_run(model):
    list(harvest(model, model.first, [tokens(3, 5)] * 4))
    assert (model.first.called, model.second.called) == (4, 0)


def test_padding_is_left_out(model):
    ids, mask = tokens(3, 5), torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]])
    (x,) = harvest(model, model.second, [{"input_ids": ids, "attention_mask": mask}])
    (everything,) = harvest(model, model.second, [ids])
    assert_equal(x, everything[mask.flatten().bool()], rtol=0, atol=0)


def test_dtype_and_device_stay(model):
    (x,) = harvest(model.to(torch.bfloat16), model.first, [tokens(3, 5)])
    assert x.dtype == torch.bfloat16


def test_a_module_that_is_never_called_is_named(model):
    with pytest.raises(ValueError, match="input 0: the model never called Linear"):
        list(harvest(model, model.unused, [tokens(3, 5)]))
    assert no_hooks(model)


@pytest.mark.parametrize(
    "output", ["text", (), torch.zeros(3), torch.zeros(3, 4, dtype=torch.int64)]
)
def test_an_output_without_activations_is_named(output):
    class Odd(nn.Module):
        def forward(self, x):
            return output

    odd = Odd()
    for use in (lambda: list(harvest(odd, odd, [torch.zeros(1)])), lambda: spliced(odd)):
        with pytest.raises(TypeError, match="Odd put out .*, expected floats"):
            use()
    assert no_hooks(odd)


def spliced(module):
    with splice(module, "zero"):
        module(torch.zeros(1))


def test_an_error_of_the_model_passes_and_the_hook_is_gone(model):
    with pytest.raises(IndexError):
        list(harvest(model, model.first, [tokens(3, 5) + 100]))
    assert no_hooks(model)


# -- splice ----------------------------------------------------------------------------------------


def test_what_is_spliced_in_is_what_the_rest_of_the_model_reads(model):
    ids = tokens(3, 5)
    x = model.first(model.embedding(ids))[0]
    mean = x.flatten(0, 1).mean(0)
    sae = random_sae("gated", (6, 16), 0).float()
    rest = lambda v: model.head(model.second(v)[0])  # noqa: E731
    for put, stands_in in (
        (sae, sae(x)),
        ("zero", torch.zeros_like(x)),
        (mean, mean.expand_as(x)),
    ):
        with splice(model.first, put):
            assert_equal(model(ids), rest(stands_in))
        assert_equal(model(ids), rest(x), rtol=0, atol=0)


def test_a_tensor_is_replaced_by_a_tensor_of_its_dtype(model):
    sae = random_sae("gated", (6, 16), 0).float()
    layer = model.first.linear.to(torch.bfloat16)
    x = torch.randn(2, 3, 6).to(torch.bfloat16)
    with splice(layer, sae):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert_equal(out, sae(layer(x).float()).to(torch.bfloat16))


def test_the_hook_is_gone_after_an_exception(model):
    with pytest.raises(KeyError), splice(model.first, "zero"):
        raise KeyError
    assert no_hooks(model)


def test_what_cannot_be_spliced_in_is_named(model):
    with (
        pytest.raises(ValueError, match="put is 'mean', expected a single SAE, 'zero' or a tensor"),
        splice(model.first, "mean"),
    ):
        pass
    with pytest.raises(ValueError, match="put is GatedSAE.*, expected a single SAE"):
        splice(model.first, random_sae("gated", (6, 16), 0, stack=(2,))).__enter__()


def test_a_namedtuple_stays_one():
    class Pair(NamedTuple):
        x: torch.Tensor
        cache: str

    class Gives(nn.Module):
        def forward(self, x):
            return Pair(x, "cache")

    module, x = Gives(), torch.ones(3, 6)
    with splice(module, "zero"):
        out = module(x)
    assert isinstance(out, Pair)
    assert_equal(out.x, torch.zeros(3, 6))
    assert out.cache == "cache"


def test_loss_recovered_with_both_ablations(model):
    """D1: 1 for x itself, 0 for the ablation."""
    ids = tokens(3, 5)
    labels = model(ids).argmax(-1).flatten()  # its own choice: nothing does better than x
    x = model.first(model.embedding(ids))[0]
    ce = {}
    for name, put in (("x", x), ("zero", "zero"), ("mean", x.flatten(0, 1).mean(0))):
        with splice(model.first, put), torch.no_grad():
            ce[name] = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels)
    clean = nn.functional.cross_entropy(model(ids).flatten(0, 1), labels).detach()
    assert_equal(ce["x"], clean)
    for ablation in ("zero", "mean"):
        assert ce[ablation] > clean
        assert loss_recovered(ce["x"], clean, ce[ablation]) == pytest.approx(1)
        assert loss_recovered(ce[ablation], clean, ce[ablation]) == 0


# -- shuffle ---------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=12),
    st.integers(1, 10),
    st.integers(1, 60),
    st.integers(0, 100),
)
def test_every_row_comes_out_once_in_batches(lengths, batch, held, seed):
    n = sum(lengths)
    x = torch.arange(n).float().view(n, 1)
    out = list(shuffle(x.split(lengths), batch, held, seed))
    assert {len(b) for b in out[:-1]} <= {batch}
    assert 1 <= len(out[-1]) <= batch
    assert torch.cat(out).flatten().sort().values.tolist() == list(range(n))
    again = list(shuffle(x.split(lengths), batch, held, seed))
    assert_equal(torch.cat(again), torch.cat(out))


def test_rows_are_mixed_over_what_is_held_and_no_further():
    x = torch.arange(1000).float().view(1000, 1)
    out = torch.cat(list(shuffle(x.split(10), 10, 200, seed=0))).flatten()
    moved = (out - torch.arange(1000)).abs()
    assert moved.mean() > 30
    assert (torch.arange(1000) - out).min() >= -210  # never given out before it was read
    assert not torch.equal(out, torch.cat(list(shuffle(x.split(10), 10, 200, seed=1))).flatten())


def test_memory_is_bounded():
    """No more than `held` rows and one batch are read ahead of what was given out."""
    read = []

    def batches():
        for i in range(100):
            read.append(i)
            yield torch.zeros(10, 1)

    given_out = 0
    for b in shuffle(batches(), 5, 100, seed=0):
        assert 10 * len(read) - given_out <= 110
        given_out += len(b)
    assert given_out == 1000
