"""Configs from files, text and old runs; durations; and what a mistyped command line prints."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import ml_collections
import pytest

from fm_jax import config as config_lib
from fm_jax.architecture import SIZES, Architecture
from fm_jax.errors import UserError

CONFIG = """
from fm_jax import config
from fm_jax.errors import choose

def get_config(arg="small"):
    choose(arg, ("small", "tiny", "typo", "wrong", "bug"), "config size")
    c = config.defaults()
    c.steps = 7
    c.seq_len = 64 if arg == "tiny" else 128
    c.objective_args = dict(fim_rate=0.0)

    if arg == "typo":
        c.optimizer.learnin_rate = 1.0
    if arg == "wrong":
        c.model.update(num_layers="two")
    if arg == "bug":
        {}["bug"]
    return c

def sweep():
    for rate in (1e-3, 3e-4):
        yield {"optimizer.learning_rate": rate, "seed": 1}
"""

COMMAND = '''"""Returns nothing; what a command line of ours looks like.

Try:  python command.py --config configs/lm.py --workdir x
"""
from absl import flags
from fm_jax import config

def define_flags(fv):
    config.define_config(fv)
    flags.DEFINE_string("workdir", None, "run folder", flag_values=fv, required=True)
    flags.DEFINE_integer("max_new_tokens", 64, "length of a sample", flag_values=fv)
    flags.DEFINE_bool("profile", False, "write a trace", flag_values=fv)

def main(flags):
    if flags.workdir == "bug":
        raise RuntimeError("a bug")
    if flags.workdir == "interrupt":
        raise KeyboardInterrupt
    c = flags.config
    print(repr(c.steps), c.model.layer_pattern, c.optimizer.learning_rate, c.seed, c.log.progress, flags.profile)

config.run(main, define_flags, __doc__)
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "lm.py").write_text(CONFIG)
    (tmp_path / "command.py").write_text(COMMAND)
    (tmp_path / "no_arg.py").write_text("def get_config(): return None")
    return tmp_path


def command(*args):
    """Returns (exit code, stdout, stderr) of the command in a process of its own."""
    root = pathlib.Path(config_lib.__file__).parent.parent
    done = subprocess.run([sys.executable, "command.py", *args], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(root)})
    return done.returncode, done.stdout, done.stderr


# --- Command lines


def test_overrides_reach_main(folder):
    code, out, err = command(
        "--config", "configs/lm.py:small", "--workdir=x", "--config.steps=500", "--config.optimizer.learning_rate=3e-4",
        '--config.model.layer_pattern=("local", "global")', "--config.seed", "5", "--noconfig.log.progress",
        "--profile")
    assert (code, err) == (0, "")
    assert out == "500 ('local', 'global') 0.0003 5 False True\n"


@pytest.mark.parametrize("args, message", [
    (["--config.optimiser.lr=3"], "optimizer.learning_rate"),
    (["--config.learning_rate=3"], "optimizer.learning_rate"),
    (["--config.model.num_layer=3"], "model.num_layers"),
    (["--config.optimizer=adamw"], "section.*learning_rate"),
    (["--config.seed=x"], "config.seed='x': expected int"),
    (["--config.optimizer.b1=x"], "config.optimizer.b1='x': expected float"),
    (["--config.log.progress=maybe"], "expected bool"),
    (["--config.model.layer_pattern=3"], "expected tuple of str"),
    (["--config.seed"], "a value must follow"),
    (["--learning_rate=3"], "did you mean --config.optimizer.learning_rate"),
    (["--conifg.seed=3"], "did you mean --config.seed"),
    (["--workdri=3"], "did you mean --workdir"),
    (["--max_new_tokens=a"], "max_new_tokens=a"),
    (["stray", "--profile"], "unexpected argument 'stray'"),
    (["--config.objective_args=5"], "config.objective_args='5': expected dict"),
    (["--config.batch_size=inf"], "config.batch_size='inf': expected int"),
    (["--config=configs/lm.py:smal"], "did you mean 'small'"),
    (["--config=no_arg.py:small"], "get_config.. of no_arg.py and the argument 'small' .* do not go together"),
    (["--config=configs/lm.py:typo"], r"configs/lm.py:13: unknown config key .*optimizer.learning_rate"),
    (["--config=configs/lm.py:wrong"], r"configs/lm.py:15: .*num_layers"),
    (["--config=configs/ml.py"], "did you mean 'configs/lm.py'"),
    (["--config=config/lm.py"], "did you mean 'configs/lm.py'"),
    (["--config=configs"], "no file 'configs'"),
])
def test_mistakes_are_one_line_and_exit_2(folder, capsys, args, message):
    from absl import flags

    def define_flags(fv):
        config_lib.define_config(fv)
        flags.DEFINE_string("workdir", None, "run folder", flag_values=fv)
        flags.DEFINE_integer("max_new_tokens", 64, "length of a sample", flag_values=fv)
        flags.DEFINE_bool("profile", False, "write a trace", flag_values=fv)

    with pytest.raises(SystemExit) as exit_:
        config_lib.run(lambda flags: pytest.fail("main ran"), define_flags, "doc",
                       ["command.py", "--config=configs/lm.py", *args])
    captured = capsys.readouterr()
    assert exit_.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and re.search(message, captured.err), captured.err


def test_exit_codes_of_a_process(folder):
    code, out, err = command("--config=configs/lm.py")
    assert (code, out) == (2, "") and err == "error: --workdir is required (see --help)\n"
    code, out, err = command("stray", "--config=configs/lm.py", "--workdir=x")   # flags after it still count
    assert (code, out) == (2, "") and err.startswith("error: unexpected argument 'stray'")
    code, out, err = command("--config=configs/lm.py", "--workdir=interrupt")
    assert (code, err) == (130, "interrupted\n")
    code, out, err = command("--config=configs/lm.py", "--workdir=bug")
    assert code == 1 and "Traceback" in err and err.endswith("RuntimeError: a bug\n")
    code, out, err = command("--config=configs/lm.py:bug", "--workdir=x")
    assert code == 1 and "Traceback" in err and "KeyError: 'bug'" in err   # of the file, not of a ConfigDict


def test_help_shows_the_docstring_and_flags_and_needs_no_jax(folder):
    code, out, err = command("--help")
    assert (code, err) == (0, "")
    assert "Try:" in out and "--workdir" in out and "run folder" in out and "--[no]profile" in out
    code, out, _ = command("--helpfull")
    assert code == 0 and "--config.optimizer.learning_rate=0.001" in out
    done = subprocess.run([sys.executable, "-c", "import sys, fm_jax.config; print(sorted(sys.modules))"],
                          capture_output=True, text=True, check=True)
    for heavy in ("jax", "flax", "numpy", "orbax"):
        assert f"'{heavy}'" not in done.stdout, heavy


# --- Configs


def test_every_size_and_every_choice_resolves():
    for size in SIZES.values():
        c = config_lib.defaults()
        c.model.update(size)
        r = config_lib.resolve(c)
        assert r.model.to_dict()["mlp_dim"] == Architecture(**size).mlp_dim   # derived, not left from another size
        assert (r.steps, r.optimizer.warmup_steps, r.optimizer.decay_steps, r.eval.every) == (1000, 20, 200, 100)
        assert config_lib.resolve(r).to_dict() == r.to_dict()


def test_resolve_leaves_its_argument_alone_and_waits_for_the_data_size():
    c = config_lib.override(config_lib.defaults(), {"steps": "3 epochs", "batch_size": 10})
    before = c.to_dict()
    r = config_lib.resolve(c)
    assert (r.steps, r.optimizer.warmup_steps) == ("3 epochs", "2%") and c.to_dict() == before
    r = config_lib.resolve(c, examples_per_epoch=1000)
    assert (r.steps, r.optimizer.warmup_steps) == (300, 6)


@pytest.mark.parametrize("changes, message", [
    ({"optimizer.name": "adam"}, "optimizer.name: unknown 'adam'; did you mean 'adamw'"),
    ({"optimizer.schedule": "cos"}, "optimizer.schedule"),
    ({"checkpoint.on_corrupt": "previus"}, "'previous'"),
    ({"model.norm": "rms"}, "model.norm"),
    ({"model.num_heads": 3}, "num_heads"),
    ({"model.rope_scaling.type": "llama4"}, "llama3"),
    ({"model.num_heads": 0}, "model.num_heads=0 must be positive"),
    ({"model.num_kv_heads": -2}, "model.num_kv_heads=-2 must be 0 or more"),
    ({"model.head_dim": -8}, "model.head_dim=-8"),
    ({"model.rope_theta": 0.0}, "model.rope_theta=0.0 must be positive"),
    ({"model.rope_scaling": {"type": "yarn", "factor": "abc"}}, "model.rope_scaling.factor='abc' must be a positive"),
    ({"model.rope_scaling": {"type": "linear", "factor": 0}}, "model.rope_scaling.factor=0 must be a positive"),
    ({"optimizer.learning_rate": float("inf")}, "optimizer.learning_rate=inf must be 0 or more, and finite"),
    ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan"),
    ({"seed": 2 ** 64}, "seed=18446744073709551616 must be from 0"),
    ({"steps": "1e400 tokens"}, "config.steps='1e400 tokens'"),
    ({"batch_size": 0}, "batch_size=0 must be at least 1"),
    ({"accumulation_steps": 5}, "batch_size=32 must be divisible by config.accumulation_steps=5"),
    ({"seq_len": 4096}, "seq_len=4096 exceeds config.model.max_seq_len=2048"),
    ({"optimizer.b2": 1.0}, "b2=1.0"),
    ({"optimizer.weight_decay": -1.0}, "weight_decay"),
    ({"mesh.fsdp": 0}, "mesh.fsdp=0"),
    ({"mesh.fsdp": -1}, "only one axis"),
    ({"steps": 0}, "steps"),
    ({"steps": "10%"}, "percentage"),
    ({"steps": "1 fortnight"}, "expected 1000"),
])
def test_resolve_refuses(changes, message):
    c = config_lib.override(config_lib.defaults(), changes)
    with pytest.raises(UserError, match=message):
        config_lib.resolve(c)


def test_resolve_refuses_foreign_keys():
    c = config_lib.defaults()
    with c.unlocked():
        c.optimizer.betas = 1
    with pytest.raises(UserError, match="unknown config key 'optimizer.betas'"):
        config_lib.resolve(c)
    with pytest.raises(UserError, match="missing keys .*batch_size"):
        config_lib.resolve(ml_collections.ConfigDict({"model": {}, "optimizer": {}}))


def test_config_files_cannot_add_keys():
    with pytest.raises(AttributeError, match="learnin_rate"):
        config_lib.defaults().optimizer.learnin_rate = 1.0


def test_open_sections_take_any_key_and_keep_types():
    c = config_lib.defaults()
    config_lib.override(c, {"model.rope_scaling.type": "yarn", "model.rope_scaling.factor": "2.5",
                            "objective_args": {"rate": 0.5}, "objective_args.rate": "1", "objective_args.mode": "x"})
    assert c.model.rope_scaling.to_dict() == {"type": "yarn", "factor": 2.5}
    assert c.objective_args.to_dict() == {"rate": 1.0, "mode": "x"}
    assert Architecture(**config_lib.resolve(c).model).rope_scaling["factor"] == 2.5


def test_text_becomes_the_type_of_the_key():
    c = config_lib.defaults()
    for key, text, value in [("batch_size", "1e3", 1000), ("batch_size", "1_000", 1000), ("name", "7", "7"),
                             ("optimizer.b1", "0", 0.0), ("model.causal", "False", False), ("model.causal", "1", True),
                             ("model.layer_pattern", "local,global", ("local", "global")), ("steps", "5", 5),
                             ("model.layer_pattern", "['local']", ("local",)), ("steps", "2e9 tokens", "2e9 tokens"),
                             ("optimizer.no_decay", ".*(scale|bias)", (".*(scale|bias)",)),
                             ("optimizer.no_decay", "()", ())]:
        config_lib.override(c, {key: text})
        got = functools.reduce(lambda section, name: section[name], key.split("."), c)
        assert got == value and type(got) is type(value), key
    for key, wrong in [("batch_size", 1.5), ("batch_size", True), ("batch_size", "1.5"), ("steps", 1.5), ("name", 3),
                       ("model.causal", 1), ("optimizer.b1", None)]:
        with pytest.raises(UserError, match=re.escape(key)):
            config_lib.override(c, {key: wrong})


def test_from_file_and_sweep(folder):
    c = config_lib.from_file("configs/lm.py:tiny", {"seed": 3})
    assert (c.seq_len, c.steps, c.seed) == (64, 7, 3)
    runs = config_lib.sweep("configs/lm.py:tiny")
    assert [(name, r.optimizer.learning_rate, r.seed) for name, r in runs] == [
        ("learning_rate=0.001,seed=1", 1e-3, 1), ("learning_rate=0.0003,seed=1", 3e-4, 1)]
    (folder / "empty.py").write_text("")
    with pytest.raises(UserError, match="get_config"):
        config_lib.from_file("empty.py")
    with pytest.raises(UserError, match="sweep"):
        config_lib.sweep("empty.py")
    (folder / "text.py").write_text("def get_config(): return {}")
    with pytest.raises(UserError, match="ConfigDict"):
        config_lib.from_file("text.py")


def test_save_and_load_are_exact(tmp_path):
    c = config_lib.override(config_lib.defaults(), {
        "model.layer_pattern": ("local", "global"), "model.window": 8, "optimizer.eps": 1e-17,
        "model.rope_scaling": {"type": "linear", "factor": 2.0}, "objective_args": {"spans": (1, (2, 3))}})
    for saved in (c, config_lib.resolve(c)):
        config_lib.save(saved, tmp_path / "config.json")
        loaded, filled = config_lib.load(tmp_path / "config.json")
        assert loaded.to_dict() == saved.to_dict() and filled == []
        assert isinstance(loaded.model.layer_pattern, tuple) and loaded.objective_args.spans == (1, (2, 3))
    config_lib.override(loaded, {"steps": "5 epochs"})   # still takes either type


def test_a_config_of_another_version(tmp_path):
    path = tmp_path / "config.json"
    c = config_lib.defaults()
    with c.unlocked():
        del c.model.qk_norm, c.health
    config_lib.save(c, path)
    loaded, filled = config_lib.load(path)
    assert loaded.model.qk_norm == "none"
    assert filled == ["health.hang_timeout_s", "health.skip_grad_norm_factor", "health.skip_grad_norm_warmup_steps",
                      "model.qk_norm"]
    with c.unlocked():
        c.optimizer.learning_rat = 1.0
    config_lib.save(c, path)
    with pytest.raises(UserError, match=r"config.json: unknown config key 'optimizer.learning_rat'; did you mean"):
        config_lib.load(path)
    for text, message in [("{", "not a JSON"), ("[1]", "not a config"), ('{"seed": "x"}', "config.seed='x'"),
                          ('{"model": 3}', "config.model is a section")]:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            config_lib.load(path)
    with pytest.raises(UserError, match="no such file"):
        config_lib.load(tmp_path / "none.json")


# --- Durations


@pytest.mark.parametrize("value, steps", [
    (1000, 1000), ("1000", 1000), ("1_000", 1000), ("1e3", 1000), (0, 0), ("1 step", 1), ("1000 steps", 1000),
    ("2e9 tokens", 1953125), ("1 token", 1), ("0 tokens", 0), ("5000 examples", 500), ("4 examples", 1),
    ("3 epochs", 240), ("0.5 epochs", 40), ("2%", 4), ("2.5 %", 5), ("0.01%", 1), ("100%", 200),
])
def test_duration(value, steps):
    got = config_lib.duration(value, batch_size=10, seq_len=102.4, total_steps=200, examples_per_epoch=800, what="x")
    assert got == steps and isinstance(got, int)


@pytest.mark.parametrize("value", ["", "ten", "-1", -1, "1 2", "1 weeks", "1.5", "1.5 steps", "nan", None, True, 1.5,
                                   "e9 tokens", "%"])
def test_duration_refuses(value):
    with pytest.raises(UserError, match="config.steps="):
        config_lib.duration(value, batch_size=10, seq_len=10, total_steps=200, what="config.steps")


def test_duration_says_what_it_lacks():
    with pytest.raises(UserError, match="percentage"):
        config_lib.duration("2%", batch_size=1, seq_len=1, what="x")
    with pytest.raises(UserError, match="epochs"):
        config_lib.duration("2 epochs", batch_size=1, seq_len=1, what="x")


def test_an_encoder_is_as_the_model_but_for_what_is_said(tmp_path):
    c = config_lib.override(config_lib.defaults(), {"model.num_heads": 2, "model.causal": True,
                                                    "model.cross_attention": True, "encoder.num_layers": "7",
                                                    "encoder.embed_dim": 64, "encoder.qkv_bias": "true"})
    encoder = config_lib.encoder(c)
    assert (encoder.num_layers, encoder.num_heads, encoder.head_dim, encoder.causal) == (7, 2, 32, False)
    resolved = config_lib.resolve(c)   # derived of its own, not the model's
    assert (resolved.encoder.mlp_dim, resolved.encoder.causal, resolved.encoder.qkv_bias) == (192, False, True)
    config_lib.save(resolved, tmp_path / "config.json")
    loaded, filled = config_lib.load(tmp_path / "config.json")
    assert loaded.to_dict() == resolved.to_dict() and not filled and config_lib.encoder(loaded) == encoder
    assert not config_lib.resolve(config_lib.defaults()).encoder
    with pytest.raises(UserError, match="key of config.encoder: unknown 'num_layer'; did you mean 'num_layers'"):
        config_lib.override(c, {"encoder.num_layer": 3})
    with pytest.raises(UserError, match="config.encoder.num_layers='x': expected int"):
        config_lib.override(c, {"encoder.num_layers": "x"})
    c.encoder.num_heads = 3
    with pytest.raises(UserError, match="config.encoder, with what it does not name.*num_heads=3 must divide"):
        config_lib.resolve(c)
    c.encoder.embed_dims = 3
    with pytest.raises(UserError, match="key of encoder: unknown 'embed_dims'; did you mean 'embed_dim'"):
        config_lib.resolve(c)
