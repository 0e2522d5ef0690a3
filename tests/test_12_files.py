"""Section 12: saving, loading, and the formats of others."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_saes import VARIANTS, assert_equal, random_batch, random_sae, seeds, sizes, variants
from safetensors.torch import load_file, save_file

import gated_sae
from gated_sae import (
    GatedSAE,
    JumpReLUSAE,
    StandardSAE,
    from_dictionary_learning,
    load,
    save,
    to_dictionary_learning,
)

FIXTURES = Path(__file__).parent / "fixtures"
WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"


@settings(max_examples=20)
@given(
    variants,
    sizes,
    seeds,
    st.sampled_from([(), (3,), (2, 2)]),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_what_is_saved_is_loaded(tmp_path_factory, variant, size, seed, stack, normalize, dtype):
    """Bit for bit, with all options: the loaded SAE has the same config, outputs and losses."""
    folder = tmp_path_factory.mktemp("sae") / "new" / "folder"
    sae = random_sae(variant, size, seed, stack=stack, normalize=normalize).to(dtype)
    save(sae, folder)
    loaded = load(folder)
    assert type(loaded) is type(sae)
    assert loaded.config == sae.config
    assert_equal(dict(loaded.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    x = random_batch(5, size[0], seed=seed).to(dtype)
    assert_equal(loaded(x), sae(x), rtol=0, atol=0)
    assert_equal(loaded.losses(x), sae.losses(x), rtol=0, atol=0)
    assert sorted(p.name for p in folder.iterdir()) == [CONFIG, WEIGHTS]


def test_saving_again_replaces_the_weights(tmp_path):
    first, second = (random_sae("gated", (4, 6), seed) for seed in (0, 1))
    save(first, tmp_path / "a")
    save(second, tmp_path / "a")
    assert_equal(dict(load(tmp_path / "a").state_dict()), dict(second.state_dict()), rtol=0, atol=0)


def test_another_configuration_is_refused_and_nothing_lost(tmp_path):
    sae = random_sae("gated", (4, 6), 0)
    save(sae, tmp_path)
    for other, difference in (
        (random_sae("gated", (4, 7), 0), r"'d_sae': \(6, 7\)"),
        (random_sae("standard", (4, 6), 0), "'architecture': .'gated', 'standard'"),
        (random_sae("gated", (4, 6), 0).float(), r"'dtype': \('float64', 'float32'\)"),
        (random_sae("gated unfrozen", (4, 6), 0), r"'aux': \('frozen', 'unfrozen'\)"),
    ):
        with pytest.raises(ValueError, match=f"holds another SAE.*{difference}"):
            save(other, tmp_path)
    assert_equal(dict(load(tmp_path).state_dict()), dict(sae.state_dict()), rtol=0, atol=0)


def test_a_file_in_the_way_is_kept(tmp_path):
    (tmp_path / "a").write_text("mine")
    with pytest.raises(ValueError, match="a is a file, expected a folder"):
        save(GatedSAE(4, 6), tmp_path / "a")
    assert (tmp_path / "a").read_text() == "mine"


# -- A kill at any moment --------------------------------------------------------------------------

KILLS = """
import os, pathlib, signal, sys, time, torch
folder, module = sys.argv[1:]
sys.path.insert(0, module)
torch.set_num_threads(1)
from gated_sae import GatedSAE, load, save
save(GatedSAE(1, 1), folder + " of the parent")  # imports what no child should spend its time on

def save_1_2_3(sae):
    for k in range(1, 10_000):
        for p in sae.parameters():
            p.data.fill_(k)
        save(sae, folder)

for pause in (0.15 * torch.rand(30, generator=torch.Generator().manual_seed(0))).tolist():
    child = os.fork()
    if not child:
        save_1_2_3(GatedSAE(64, 2048))
    time.sleep(pause)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    saved = pathlib.Path(folder, "sae_weights.safetensors").exists()
    values = {v for p in load(folder).parameters() for v in p.unique().tolist()} if saved else set()
    print(*values, sep=",")
"""


def test_a_killed_save_leaves_the_old_sae_or_the_new(tmp_path):
    """SIGKILL at 30 moments of a loop that saves k = 1, 2, …: what is there always holds one k."""
    command = [sys.executable, "-c", KILLS, tmp_path / "sae", Path(gated_sae.__file__).parent]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    found = [line.split(",") if line else [] for line in run.stdout.splitlines()]
    assert len(found) == 30
    first = next(i for i, values in enumerate(found) if values)
    assert all(
        len(values) == 1 for values in found[first:]
    )  # once there, never gone and never mixed
    assert len({values[0] for values in found[first:]}) > 1


@pytest.mark.parametrize("crash_at", [1, 2])
def test_a_save_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch, crash_at):
    """A full disk, say, at each of the two files: no half file, nothing left over."""
    old = random_sae("gated", (4, 6), 0)
    save(old, tmp_path / "old")
    calls = 0

    def fsync(_):
        nonlocal calls
        calls += 1
        if calls == crash_at:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        save(random_sae("gated", (4, 6), 1), tmp_path / "new")
    assert {p.name for p in (tmp_path / "new").iterdir()} <= {CONFIG}
    with pytest.raises(ValueError, match="expected a saved SAE"):
        load(tmp_path / "new")
    calls = crash_at - 1
    with pytest.raises(OSError, match="No space left"):
        save(random_sae("gated", (4, 6), 1), tmp_path / "old")
    assert_equal(dict(load(tmp_path / "old").state_dict()), dict(old.state_dict()), rtol=0, atol=0)


# -- Bad folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    save(GatedSAE(4, 6), tmp_path)
    return tmp_path


def change(folder, **entries):
    config = json.loads((folder / CONFIG).read_text()) | entries
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"d_sae": 7}, "weights are .* expected"),
        ({"d_in": 5}, "weights are .* expected"),
        ({"d_sae": -1}, "d_sae is -1"),
        ({"d_sae": "six"}, "d_sae is 'six'"),
        ({"d_sae": ...}, "d_sae"),
        ({"dtype": "float64"}, "weights are .* expected"),
        ({"dtype": "int8"}, "int8, expected a floating"),
        ({"dtype": "floaty"}, "floaty"),
        ({"dtype": 32}, "expected the config of one of"),
        ({"architecture": "standard"}, "weights are .* expected"),
        ({"architecture": "topk"}, "topk.*expected the config of one of standard, gated"),
        ({"architecture": ...}, "architecture"),
        ({"architecture": ["gated"]}, "expected the config of one of"),
        ({"tied": False}, "architecture is 'gated', with"),
        ({"stack": [2]}, "weights are .* expected"),
        ({"normalize": "false"}, "normalize is 'false', expected one of"),
        ({"tied": 1}, "tied is 1, expected one of"),
        ({"d_sae": 10**18}, "expected the config of one of"),
        ({"activation_fn_str": "topk"}, "activation_fn_str is 'topk', expected 'relu'"),
        ({"apply_b_dec_to_input": False}, "apply_b_dec_to_input is False, expected True"),
        ({"normalize_activations": "layer_norm"}, "is 'layer_norm', expected 'none'"),
    ],
)
def test_configs_that_do_not_fit_are_named(folder, entries, says):
    change(folder, **entries)
    with pytest.raises(ValueError, match=says):
        load(folder)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '"text"', "null", "\x00"])
def test_configs_that_are_none_are_named(folder, content):
    (folder / CONFIG).write_text(content)
    with pytest.raises(ValueError, match=r"cfg\.json: .*expected the config of one of"):
        load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files_are_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"holds no {name}, expected a saved SAE"):
        load(folder)


def test_a_file_in_place_of_the_folder_is_named(folder):
    with pytest.raises(ValueError, match="expected the config of one of"):
        load(folder / WEIGHTS)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere holds no cfg\.json"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("kept", [0, 1, 8, 100, -1])
def test_truncated_weights_are_named(folder, kept):
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:kept])
    with pytest.raises(ValueError, match="sae_weights.safetensors: .*expected safetensors"):
        load(folder)


@pytest.mark.parametrize("name", ["foreign", "missing", "reshaped"])
def test_foreign_weights_are_named(folder, name):
    tensors = load_file(folder / WEIGHTS)
    if name == "foreign":
        tensors["W_extra"] = torch.zeros(2)
    elif name == "missing":
        del tensors["r_mag"]
    else:
        tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(ValueError, match="weights are .* expected"):
        load(folder)


def test_a_loaded_sae_does_not_change_with_its_file(folder):
    sae = load(folder)
    before = sae.W_dec.detach().clone()
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-400:] = bytes(400)
    (folder / WEIGHTS).write_bytes(content)
    assert torch.equal(sae.W_dec, before)


def test_what_could_not_be_loaded_is_not_saved(folder):
    odd = GatedSAE(4, 6)
    odd.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match="the SAE: the weights are .* expected"):
        save(odd, folder)
    load(folder)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
def test_a_compiled_sae_is_saved_as_itself(tmp_path):
    sae = GatedSAE(4, 6)
    save(torch.compile(sae), tmp_path)
    assert_equal(dict(load(tmp_path).state_dict()), dict(sae.state_dict()), rtol=0, atol=0)


def test_a_pickle_is_not_opened(folder):
    torch.save(GatedSAE(4, 6).state_dict(), folder / WEIGHTS)
    with pytest.raises(ValueError, match="expected safetensors"):
        load(folder)


# -- Other libraries' files ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("gated", GatedSAE), ("standard", StandardSAE), ("jumprelu", JumpReLUSAE)]
)
def test_saelens_folders_load_and_give_the_same_outputs(name, kind):
    sae = load(FIXTURES / f"saelens_{name}")
    recorded = load_file(FIXTURES / f"saelens_{name}" / "recorded.safetensors")
    assert type(sae) is kind
    assert (recorded["f"] > 0).any()
    assert_equal(sae.encode(recorded["x"]), recorded["f"])
    assert_equal(sae(recorded["x"]), recorded["x_hat"])


@pytest.mark.parametrize("name", ["gated", "standard", "jumprelu"])
def test_what_saelens_reads_is_in_what_is_saved(tmp_path, name):
    """Every key that SAELens itself wrote, with its value, and the same tensors."""
    theirs = FIXTURES / f"saelens_{name}"
    save(load(theirs), tmp_path)
    config, saved = (json.loads((f / CONFIG).read_text()) for f in (theirs, tmp_path))
    config.pop("metadata")  # their version numbers
    assert {key: saved[key] for key in config} == config
    assert_equal(load_file(tmp_path / WEIGHTS), load_file(theirs / WEIGHTS), rtol=0, atol=0)


def test_saving_onto_a_saelens_folder_of_the_same_sae_keeps_its_config(tmp_path):
    shutil.copytree(FIXTURES / "saelens_gated", tmp_path / "a")
    before = (tmp_path / "a" / CONFIG).read_text()
    save(load(tmp_path / "a"), tmp_path / "a")
    assert (tmp_path / "a" / CONFIG).read_text() == before


@pytest.mark.parametrize("name", ["gated", "standard"])
def test_dictionary_learning_states_load_and_give_the_same_outputs(name):
    folder = FIXTURES / f"dictionary_learning_{name}"
    recorded = load_file(folder / "recorded.safetensors")
    sae = from_dictionary_learning(load_file(folder / "state.safetensors"))
    assert (recorded["f"] > 0).any()
    assert_equal(sae.encode(recorded["x"]), recorded["f"])
    assert_equal(sae(recorded["x"]), recorded["x_hat"])
    if name == "gated":
        expected = {k: recorded[k] for k in ("reconstruct", "sparsity", "aux")}
        losses = sae.losses(recorded["x"])._asdict()
        assert_equal({k: v.detach() for k, v in losses.items()}, expected)


@given(st.sampled_from(["standard", "gated"]), sizes, seeds)
def test_states_for_dictionary_learning_come_back_as_they_went(variant, size, seed):
    sae = random_sae(variant, size, seed)
    state = to_dictionary_learning(sae)
    assert all(t.is_contiguous() for t in state.values())
    assert_equal(
        dict(from_dictionary_learning(state).state_dict()), dict(sae.state_dict()), rtol=0, atol=0
    )
    state["encoder.weight"].zero_()  # a copy
    assert sae.W_enc.abs().sum() > 0


@pytest.mark.parametrize("name", ["gated", "standard"])
def test_dictionary_learnings_own_states_are_written_as_they_were(name):
    state = load_file(FIXTURES / f"dictionary_learning_{name}" / "state.safetensors")
    assert_equal(to_dictionary_learning(from_dictionary_learning(state)), state, rtol=0, atol=0)


@pytest.mark.parametrize(
    "sae", [GatedSAE(4, 8, tied=False), GatedSAE(4, 8, stack=2), JumpReLUSAE(4, 8)]
)
def test_what_dictionary_learning_has_not_is_named(sae):
    with pytest.raises(ValueError, match="expected a single Standard or tied Gated SAE"):
        to_dictionary_learning(sae)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda state: state.pop("encoder.weight"), "the state holds .* expected"),
        (lambda state: state.pop("gate_bias"), "the state holds .* expected"),
        (lambda state: state.update(k=3), "the state holds .* expected"),
        (
            lambda state: state.update({"encoder.weight": torch.zeros(3)}),
            "the state holds .* expect",
        ),
        (lambda state: state.update(r_mag=torch.zeros(5)), "weights are .* expected"),
    ],
)
def test_other_states_are_named(spoil, says):
    state = load_file(FIXTURES / "dictionary_learning_gated" / "state.safetensors")
    spoil(state)
    with pytest.raises(ValueError, match=says):
        from_dictionary_learning(state)


# -- The file alone --------------------------------------------------------------------------------


def test_the_module_works_alone_in_an_empty_folder(tmp_path):
    """It imports, trains, saves and loads, and imports nothing but torch on the way."""
    shutil.copy(gated_sae.__file__, tmp_path)
    code = """
import sys, torch
before = set(sys.modules)
import gated_sae
new = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert new == {"gated_sae"}, new
sae = gated_sae.GatedSAE(4, 8)
batches = torch.randn(10, 16, 4, generator=torch.Generator().manual_seed(0))
for record in gated_sae.train(sae, list(batches), l1=0.1, steps=10, device="cpu"): pass
gated_sae.save(sae, "sae")
assert torch.equal(gated_sae.load("sae")(batches[0]), sae(batches[0]))
"""
    subprocess.run(
        [sys.executable, "-I", "-c", "import sys; sys.path[:0] = ['.']\n" + code],
        cwd=tmp_path,
        check=True,
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_config_makes_an_sae_like_it(variant):
    sae = VARIANTS[variant](4, 6, stack=(2,), normalize=True)
    again = type(sae)(**sae.config)
    assert_equal(dict(again.state_dict()), dict(sae.state_dict()), rtol=0, atol=0)
