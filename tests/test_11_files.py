"""Section 11: saving, loading, and the formats of others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, random_batch, random_sae, seeds, sizes, variants
from safetensors.torch import load_file, save_file
from torch import nn

import gated_sae
from gated_sae import GatedSAE, StandardSAE, from_dictionary_learning, load, save

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
stacks = st.sampled_from([(), (3,), (2, 2)])
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


@settings(max_examples=20)
@given(variants, sizes, seeds, stacks, dtypes)
def test_what_is_saved_is_loaded(tmp_path_factory, variant, size, seed, stack, dtype):
    """Bit for bit, with all options: the loaded SAE has the same config, outputs and losses."""
    folder = tmp_path_factory.mktemp("sae") / "new" / "folder"
    sae = random_sae(variant, size, seed, stack=stack).to(dtype)
    save(sae, f"{folder}/")  # a slash does not make it another folder
    loaded = load(folder)
    assert type(loaded) is type(sae)
    assert loaded.config == sae.config
    assert_equal(loaded.state_dict(), sae.state_dict(), rtol=0, atol=0)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    x = random_batch(5, size[0], seed=seed).to(dtype)
    assert_equal((loaded(x), *loaded.losses(x)), (sae(x), *sae.losses(x)), rtol=0, atol=0)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]
    assert [*folder.parent.iterdir()] == [folder]
    new, alike = VARIANTS[variant](*size, stack=stack), type(sae)(**loaded.config)
    assert_equal(alike.state_dict(), new.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "make", [lambda a: save(GatedSAE(4, 6), a), Path.mkdir, lambda a: a.write_text("mine")]
)
def test_nothing_is_written_over(tmp_path, make):
    make(tmp_path / "a")
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match="a exists, expected a new folder"):
        save(GatedSAE(4, 6), tmp_path / "a")
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    odd, mixed, meta = GatedSAE(4, 6), GatedSAE(4, 6), GatedSAE(4, 6, device="meta")
    odd.register_buffer("extra", torch.zeros(1))
    mixed.b_dec.data = mixed.b_dec.data.double()
    for sae in (odd, mixed, meta):
        with pytest.raises(ValueError, match="weights are .* expected|the meta device, expected"):
            save(sae, tmp_path / "a")
        assert not [*tmp_path.iterdir()]
    for other in (None, nn.Linear(4, 6), nn.DataParallel(nn.Linear(4, 6))):
        with pytest.raises(TypeError, match="expected an SAE"):
            save(other, tmp_path / "a")
    save(torch.compile(nn.DataParallel(GatedSAE(4, 6))), tmp_path / "a")  # wrappers come off
    assert type(load(tmp_path / "a")) is GatedSAE


# -- A kill at any moment --------------------------------------------------------------------------

KILLS = """
import json, os, pathlib, shutil, signal, sys, time, torch
root, module = pathlib.Path(sys.argv[1]), sys.argv[2]
sys.path.insert(0, module)
torch.set_num_threads(1)
from gated_sae import GatedSAE, load, save
save(GatedSAE(1, 1), root / "of the parent")  # imports what no child should spend its time on

for pause in (0.15 * torch.rand(30, generator=torch.Generator().manual_seed(0))).tolist():
    folder, child = root / "of a child", os.fork()
    if not child:
        sae = GatedSAE(64, 2048)
        for k in range(1, 10_000):
            for p in sae.parameters():
                p.data.fill_(k)
            save(sae, folder / str(k))
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    for name in there:
        if name.endswith(".new"):
            save(GatedSAE(1, 1), folder / name.removesuffix(".new"))  # which clears it
            assert not (folder / name).exists()
    held = {n: load(folder / n).state_dict().values() for n in there if not n.endswith(".new")}
    print(json.dumps([there, {n: [v.unique().tolist() for v in vs] for n, vs in held.items()}]))
    shutil.rmtree(folder, ignore_errors=True)
"""


def test_a_killed_save_leaves_a_whole_sae_or_none(tmp_path):
    """SIGKILL at 30 moments of a loop that saves k = 1, 2, … to folders of these names."""
    command = [sys.executable, "-c", KILLS, tmp_path, Path(gated_sae.__file__).parent]
    found = [json.loads(line) for line in subprocess.check_output(command).splitlines()]
    assert len(found) == 30
    for there, held in found:
        assert sum(name.endswith(".new") for name in there) <= 1
        assert sorted(map(int, held)) == list(range(1, len(held) + 1))
        assert all(values == [[int(name)]] * 6 for name, values in held.items())
    assert any(held for _, held in found)
    assert any(len(held) < len(there) for there, held in found)  # some hit a save in the middle


@pytest.mark.parametrize(
    ("module", "name"), [(Path, "write_text"), (safetensors.torch, "save_file"), (Path, "rename")]
)
def test_a_save_that_fails_leaves_nothing(tmp_path, module, name):
    """A full disk, say, at either file, or at the end."""
    kind = safetensors.SafetensorError if name == "save_file" else OSError
    full = mock.patch.object(module, name, side_effect=kind("No space left on device"))
    with full, pytest.raises(OSError, match="No space left"):
        save(GatedSAE(4, 6), tmp_path / "a")
    assert not [*tmp_path.iterdir()]
    save(GatedSAE(4, 6), tmp_path / "a")


# -- Bad folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save(GatedSAE(4, 6), tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("says", "changes"),
    [
        ("weights are .* exp", [dict(d_sae=7), dict(d_in=5), dict(stack=[2]), dict(tied=False)]),
        ("weights are .* expected", [dict(architecture="standard")]),
        ("d_sae is (-1|'six'), expected", [dict(d_sae=-1), dict(d_sae="six")]),
        ("int8, expected a floating", [dict(dtype="int8")]),
        ("'(floaty|32.5)'", [dict(dtype="floaty"), dict(dtype=32.5)]),
        ("this is a topk .*expected one of .*standard.*gated", [dict(architecture="topk")]),
        ("expected .* of one of", [dict(architecture=["gated"]), dict(d_sae=10**18)]),
        ("tied=1, .*expected a bool", [dict(tied=1)]),
        ("'topk'.*expected.*'relu'", [dict(activation_fn_str="topk")]),
        ("'(a|normalize)': (4.0|True).*expected", [dict(a=4.0), dict(normalize=True)]),  # of old
        ("'layer_norm'.*expected.*'none'", [dict(normalize_activations="layer_norm")]),
        ("penalty is 'log9', expected one of", [dict(penalty="log9")]),
        (r"a: \w+Error: .*cfg\.json of one of", ["", "{", "[]", "3", '"text"', "null", "\x00"]),
    ],
)
def test_configs_that_do_not_fit_are_named(folder, says, changes):
    config = json.loads((folder / CONFIG).read_text())
    for change in changes:
        if isinstance(change, dict):
            change = json.dumps(config | change)
        (folder / CONFIG).write_text(change)
        with pytest.raises(ValueError, match=says):
            load(folder)


def test_missing_files_and_folders_are_named(folder, tmp_path):
    for missing in (CONFIG, WEIGHTS):
        (folder / missing).unlink()
        with pytest.raises(ValueError, match=f"{missing}.*, expected"):
            load(folder)
    for path in (tmp_path / "nowhere", Path(__file__)):
        with pytest.raises(ValueError, match=f"^{path}: .*, expected cfg.json"):
            load(path)


def test_weights_that_do_not_fit_are_named_and_a_pickle_is_not_opened(folder):
    content, tensors = (folder / WEIGHTS).read_bytes(), load_file(folder / WEIGHTS)
    torch.save(GatedSAE(4, 6).state_dict(), folder / "pickle")
    for broken in (*(content[:n] for n in (0, 1, 8, 100, -1)), (folder / "pickle").read_bytes()):
        (folder / WEIGHTS).write_bytes(broken)
        with pytest.raises(ValueError, match="SafetensorError.*expected .*sae_weights.safetensors"):
            load(folder)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "r_mag"}
    more, turned = {"W_extra": torch.zeros(2)}, {"W_enc": tensors["W_enc"].T.contiguous()}
    for foreign in (fewer, tensors | more, tensors | turned):
        save_file(foreign, folder / WEIGHTS)
        with pytest.raises(ValueError, match="a: ValueError: the weights are .* expected"):
            load(folder)


def test_a_loaded_sae_does_not_change_with_its_file(folder):
    sae = load(folder)
    before = sae.W_dec.detach().clone()
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-400:] = bytes(400)
    (folder / WEIGHTS).write_bytes(content)
    assert torch.equal(sae.W_dec, before)


# -- Other libraries' files ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gated", "standard", "jumprelu"])
def test_saelens_folders_load_with_their_outputs_and_are_written_as_they_were(tmp_path, name):
    """Every key that SAELens itself wrote, with its value, and the same tensors."""
    theirs, ours = FIXTURES / f"saelens_{name}", tmp_path / "a"
    sae, recorded = load(theirs), load_file(theirs / "recorded.safetensors")
    x = recorded["x"]
    assert type(sae) is gated_sae.KINDS[name]
    assert (recorded["f"] > 0).any()
    assert_equal((sae.encode(x), sae(x)), (recorded["f"], recorded["x_hat"]))
    save(sae, ours)
    config, saved = (json.loads((folder / CONFIG).read_text()) for folder in (theirs, ours))
    config.pop("metadata")  # their version numbers
    assert {key: saved[key] for key in config} == config
    assert_equal(load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS), rtol=0, atol=0)
    (ours / CONFIG).write_text(json.dumps(saved | dict(apply_b_dec_to_input=False)))
    x_hat = load(ours)(x - sae.b_dec)  # which encodes it as `sae` does x
    assert_equal(x_hat, sae(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gated", "standard"])
def test_dictionary_learning_files_load_with_their_outputs_and_are_as_they_were(tmp_path, name):
    folder = FIXTURES / f"dictionary_learning_{name}"
    recorded, state = (load_file(folder / f"{n}.safetensors") for n in ("recorded", "state"))
    sae, x = from_dictionary_learning(state), recorded["x"]
    assert (recorded["f"] > 0).any()
    assert_equal((sae.encode(x), sae(x)), (recorded["f"], recorded["x_hat"]))
    for term in ("reconstruct", "sparsity", "aux") if name == "gated" else ():
        assert_equal(getattr(sae.losses(x), term), recorded[term])
    written = gated_sae.to_dictionary_learning(sae)
    assert_equal(written, state, rtol=0, atol=0)
    assert all(t.is_contiguous() for t in written.values())
    folder = published(tmp_path / "a", "ae.pt", **state)
    theirs = dict(dict_class="GatedAutoEncoder" if name == "gated" else "AutoEncoder", k=3)
    (folder / "config.json").write_text(json.dumps(dict(trainer=theirs)))
    assert_equal(load(folder).state_dict(), sae.state_dict(), rtol=0, atol=0)
    for tensor in (*written.values(), *state.values()):
        tensor.zero_()
    assert all((p != 0).all() for p in sae.parameters())  # both were copied


@pytest.mark.parametrize("variant", ["gated untied", "jumprelu", "gated"])
def test_what_dictionary_learning_has_not_is_named(variant):
    sae = random_sae(variant, (4, 8), 0, stack=2 if variant == "gated" else ())
    with pytest.raises(ValueError, match="expected a single Standard or tied Gated SAE"):
        gated_sae.to_dictionary_learning(sae)


CHANGES = [("encoder.weight", ...), ("gate_bias", ...), ("k", torch.tensor(3))]
CHANGES += [("encoder.weight", torch.zeros(3)), ("r_mag", torch.zeros(5))]


@pytest.mark.parametrize(("name", "value"), CHANGES)
def test_other_states_are_named(name, value):
    state = load_file(FIXTURES / "dictionary_learning_gated" / "state.safetensors")
    state[name] = value
    with pytest.raises(ValueError, match="weights are .* expected"):
        from_dictionary_learning({name: t for name, t in state.items() if t is not ...})


def published(folder, weights, **tensors):
    """A folder as its publisher fills it."""
    tensors = {name.replace("__", "."): t for name, t in tensors.items()}
    folder.mkdir()
    if weights.endswith("npz"):
        np.savez(folder / weights, **{name: t.numpy() for name, t in tensors.items()})
    elif weights.endswith("pt"):
        torch.save(tensors, folder / weights)
    else:
        save_file(tensors, folder / weights)
    return folder


def random_parameters(*names):
    shapes = dict(W_enc=(4, 6), W_dec=(6, 4), b_dec=(4,), x=(50, 4))
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shapes.get(name, (6,)), generator=generator) for name in names}


@pytest.mark.parametrize(
    ("weights", "config", "names"),
    [
        ("params.npz", None, ("W_enc", "W_dec")),  # Gemma Scope
        ("params.safetensors", dict(architecture="jump_relu"), ("w_enc", "w_dec")),
        ("params.safetensors", None, ("w_enc", "w_dec")),
        ("ae.pt", dict(trainer=dict(dict_class="JumpReluAutoEncoder")), ("W_enc", "W_dec")),
        (WEIGHTS, dict(architecture="jumprelu", apply_b_dec_to_input=False), ("W_enc", "W_dec")),
    ],
)
def test_a_jumprelu_that_encodes_x_itself_loads_with_its_outputs(tmp_path, weights, config, names):
    """f = ReLU(x W_enc + b_enc) where that is above the threshold; x̂ = f W_dec + b_dec."""
    held = "W_enc", "W_dec", "b_enc", "b_dec", "threshold", "x"
    W_enc, W_dec, b_enc, b_dec, threshold, x = random_parameters(*held).values()
    theta, own = threshold.abs(), dict(zip(names, (W_enc, W_dec), strict=True))
    folder = published(tmp_path / "a", weights, **own, b_enc=b_enc, b_dec=b_dec, threshold=theta)
    if config is not None:
        name = CONFIG if weights == WEIGHTS else "config.json"
        (folder / name).write_text(json.dumps(config | dict(d_in=4, d_sae=6)))
    sae, pi = load(folder), x @ W_enc + b_enc
    f = pi.relu() * (pi > theta)
    assert type(sae) is gated_sae.JumpReLUSAE
    assert 0.1 < (f > 0).float().mean() < 0.9
    assert_equal((sae.encode(x), sae(x)), (f, f @ W_dec + b_dec), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(architecture=...),
        dict(normalize_activations=False),
        dict(normalize_activations=None),
        dict(normalize_activations=..., reshape_activations=..., apply_b_dec_to_input=...),
        dict(dtype="torch.float32", activation_fn_str="relu", prepend_bos=True, hook_point="a"),
        dict(dtype="float64"),
    ],
)
def test_folders_of_older_saelens_load(tmp_path, change):
    """As it loads them: in the dtype that the config says, whatever the weights'."""
    sae = random_sae(StandardSAE, (4, 6), 0).float()
    save(sae, tmp_path / "a")
    config = json.loads((tmp_path / "a" / CONFIG).read_text()) | change
    config = {k: v for k, v in config.items() if v is not ... and k not in ("penalty", "stack")}
    (tmp_path / "a" / CONFIG).write_text(json.dumps(config))
    held = load_file(tmp_path / "a" / WEIGHTS)
    save_file(held | dict(scaling_factor=torch.ones(6)), tmp_path / "a" / WEIGHTS)
    loaded = load(tmp_path / "a")
    assert loaded.W_dec.dtype == getattr(torch, config["dtype"].removeprefix("torch."))
    assert_equal(loaded.float().state_dict(), sae.state_dict(), rtol=0, atol=0)
    save_file(held | dict(scaling_factor=torch.full((6,), 2.0)), tmp_path / "a" / WEIGHTS)
    with pytest.raises(ValueError, match="scaling_factor.* expected"):
        load(tmp_path / "a")


@pytest.mark.parametrize(
    ("weights", "config", "says"),
    [
        ("sae.safetensors", dict(k=32, expansion_factor=32), "this is a topk SAE"),  # sparsify
        ("ae.pt", dict(trainer=dict(dict_class="BatchTopKSAE")), "this is a BatchTopKSAE SAE"),
        (WEIGHTS, dict(architecture="skip_transcoder"), "this is a skip_transcoder SAE"),
        ("params.safetensors", dict(hf_hook_point_out="a"), "SAE or transcoder, expected one of"),
        (WEIGHTS, dict(normalize_activations=True), "'normalize_activations': True"),
        ("model.bin", {}, r"it holds \[.*'model.bin'\], expected"),
        ("ae.pt", dict(trainer=dict(dict_class="AutoEncoder")), "UnpicklingError"),
    ],
)
def test_what_is_not_read_is_called_by_its_name(tmp_path, weights, config, says):
    tensors = random_parameters("W_enc", "W_dec", "b_enc", "b_dec")
    tensors |= dict(path=Path("a")) if says == "UnpicklingError" else {}
    folder = published(tmp_path / "a", weights, **tensors)
    for name in (CONFIG, "config.json"):
        (folder / name).write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load(folder)


# -- The file alone --------------------------------------------------------------------------------

ALONE = """
import sys, torch
sys.path[:0] = ["."]
before = set(sys.modules)
import gated_sae
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"gated_sae"}, new
sae = gated_sae.GatedSAE(4, 8)
batches = torch.randn(10, 16, 4, generator=torch.Generator().manual_seed(0))
for record in gated_sae.train(sae, batches, l1=0.1, steps=10, device="cpu"): pass
gated_sae.save(sae, "sae")
assert torch.equal(gated_sae.load("sae")(batches[0]), sae(batches[0]))
"""


def test_the_module_works_alone_in_an_empty_folder(tmp_path):
    """It imports, trains, saves and loads, and imports nothing but torch on the way."""
    shutil.copy(gated_sae.__file__, tmp_path)
    subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, check=True)
