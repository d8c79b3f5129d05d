"""The other commands from their command lines: what they print, that it is true, and how they refuse."""

import json
import math
import re
import shutil

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import config as config_lib
from fm_jax import objectives, plan, sharding
from fm_jax.architecture import SIZES, Architecture
from fm_jax.data import prepared
from fm_jax.step import Program

FLAGS = {"train": ("config", "workdir", "profile"), "evaluate": ("workdir", "tasks", "limit"),
         "generate": ("workdir", "prompt", "temperature"), "prepare": ("source", "tokenizer", "output"),
         "plan": ("config", "sizes", "devices"), "benchmark": ("config", "steps", "json"),
         "report": ("workdir", "prompt")}


@pytest.fixture(scope="module")
def spec(tiny_flags):
    """Returns --config=configs/causal_lm.py:, for a size to follow."""
    return tiny_flags[0].removesuffix("tiny")


@pytest.fixture
def run(tiny_run, tmp_path):
    return shutil.copytree(tiny_run[0], tmp_path / "run")


# --- All of them ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", FLAGS)
def test_help_names_the_flags_and_shows_an_example(name, command):
    result = command(name, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"python -m fm_jax.{name} " in result.stdout
    for flag in FLAGS[name]:
        assert re.search(rf"^  --(\[no\])?{flag}\b", result.stdout, re.MULTILINE), flag


@pytest.mark.parametrize("name", FLAGS)
def test_a_mistyped_flag_and_a_missing_one_are_one_line(name, inline):
    flag = FLAGS[name][-1]
    code, out, err = inline(name, f"--{flag}s=1" if flag != "devices" else "--device=1")
    assert (code, out) == (2, "") and f"did you mean --{flag}?" in err and err.count("\n") == 1
    code, out, err = inline(name)
    assert (code, out) == (2, "") and f"--{FLAGS[name][0]} is required" in err and err.count("\n") == 1
    code, _, err = inline(name, "words", *([] if name == "plan" else [f"--{FLAGS[name][0]}=x"]))
    assert code == 2 and err.count("\n") == 1


@pytest.mark.parametrize("name", ["evaluate", "generate", "report"])
def test_a_folder_without_a_run_is_one_line(name, inline, tmp_path):
    extra = ["--prompt=a"] if name == "generate" else []
    code, _, err = inline(name, f"--workdir={tmp_path / 'nowhere'}", *extra)
    assert code == 2 and "nowhere: no run here (no config.json)" in err and err.count("\n") == 1


# --- plan -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"mesh.fsdp": 4, "mesh.tensor": 2, "optimizer.name": "muon",
                                          "optimizer.ema_decay": 0.5},
                                     {"mesh.data": 2, "mesh.tensor": 4, "optimizer.name": "adafactor"}], ids=str)
def test_planned_bytes_are_those_of_the_real_arrays(changes, spec):
    config = config_lib.from_file(spec.removeprefix("--config=") + "tiny", {"mesh.data": 1, **changes})
    planned = plan.plan(config)
    resolved = config_lib.resolve(config)
    layout = sharding.Layout(sharding.make_mesh(config.mesh))
    program = Program(resolved, objectives.load(resolved, None, layout), layout)
    state = program.init()
    batch = program.place(program.objective.random_batch(config.batch_size, np.random.default_rng(0)))
    real = {"parameters": state.params, "optimizer": state.opt_state, "gradients": state.params, "batch": batch}
    real |= {"ema": state.ema} if config.optimizer.ema_decay else {}
    assert set(planned["bytes_per_device"]) == set(real)
    for name, tree in real.items():
        held = {d: 0 for d in layout.mesh.devices.flat}
        for array in jax.tree.leaves(tree):
            for shard in array.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {planned["bytes_per_device"][name]}, name
    assert planned["parameters"] == sum(p.size for p in jax.tree.leaves(state.params)) == 37_024


def test_the_largest_size_is_planned_for_a_mesh_that_is_not_here(inline, spec):
    code, out, err = inline("plan", spec + "405b", "--config.mesh.data=1", "--config.mesh.fsdp=256",
                            "--config.mesh.tensor=8")
    assert code == 0, err
    parameters = Architecture(**SIZES["405b"]).param_count()
    assert f"parameters       {parameters:,}" in out and abs(parameters / 405e9 - 1) < 0.01
    a_device = int(re.search(r"^    parameters +([\d,]+)$", out, re.MULTILINE)[1].replace(",", ""))
    # All that is large is cut over 2048 devices; scales of norms (and no more) are on each.
    norms = SIZES["405b"]["embed_dim"] * (2 * SIZES["405b"]["num_layers"] + 1) * 4
    assert a_device == 4 * (parameters - norms // 4) // 2048 + norms
    assert "mesh of data 1 x fsdp 256 x tensor 8" in out and "(-, fsdp, tensor" in out


def test_sizes_are_listed_without_a_config(inline):
    code, out, _ = inline("plan", "--sizes")
    assert code == 0 and [line.split()[0] for line in out.splitlines()[1:]] == list(SIZES)
    assert f"{Architecture(**SIZES['8b']).param_count():,}" in out


def test_plan_tells_what_one_token_costs(inline, spec):
    """Against the convention in words: 6 per matmul parameter, 12 per visible key and channel of the heads."""
    code, out, _ = inline("plan", spec + "tiny", "--config.mesh.data=1")
    a = Architecture(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64, max_seq_len=64)
    matmuls = 2 * (4 * 32 * 32 + 3 * 32 * 64) + 512 * 32
    keys = np.tril(np.ones((64, 64))).sum() / 64
    assert a.flops_per_token(64) == 6 * matmuls + 2 * 12 * 32 * keys
    assert code == 0 and f"FLOPs per token  {(6 * matmuls + 24 * 32 * keys) / 1e3:.3g}k" in out


@pytest.mark.parametrize("flags, message", [
    (["--config.mesh.tensor=3"], "not divisible by mesh.tensor=3; change the mesh or make the size a multiple of 3"),
    (["--config.mesh.fsdp=16"], "take a multiple of 16"),
    (["--config.mesh.data=2", "--config.mesh.fsdp=-1", "--devices=7"], "needs a multiple of 2 devices, the plan has 7"),
    (["--config.mesh.fspd=2"], "did you mean 'mesh.fsdp'?"),
    (["--config.model.num_heads=5"], "model.num_heads=5 must divide embed_dim=32"),
    (["--config.seq_len=128"], "config.seq_len=128 exceeds config.model.max_seq_len=64"),
    (["--config.steps=ten"], "config.steps='ten': expected 1000"),
])
def test_what_cannot_be_planned_is_one_line(flags, message, inline, spec):
    code, _, err = inline("plan", spec + "tiny", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


# --- benchmark ------------------------------------------------------------------------------------------------------

def test_benchmark_measures_what_it_says(inline, spec):
    code, out, err = inline("benchmark", spec + "tiny", "--config.mesh.data=1", "--steps=5", "--warmup_steps=1",
                            "--json")
    assert code == 0 and out.count("\n") == 1, err
    r = json.loads(out)
    assert (r["parameters"], r["devices"], r["batch_size"], r["tokens_per_step"]) == (37_024, 1, 8, 8 * 64)
    assert r["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert len(r["step_times_s"]) == 5 and r["step_time_s"] == sorted(r["step_times_s"])[2]
    assert r["tokens_per_s"] == pytest.approx(512 / r["step_time_s"])
    flops = Architecture(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64).flops_per_token(64)
    assert r["flops_per_s"] == pytest.approx(flops * r["tokens_per_s"])
    assert r["mfu"] is None and r["first_step_s"] > 0 and r["peak_memory_of"] == "process"
    assert 50e6 < r["peak_memory_bytes"] < 64e9
    # One batch again and again is learned; a step that had not run would repeat its loss.
    assert len(r["losses"]) == 6 and r["losses"][-1] < r["losses"][0] and abs(r["losses"][0] - math.log(512)) < 0.5


# --- generate, evaluate, report -------------------------------------------------------------------------------------

def test_generate_prints_what_the_model_says(inline, tiny_run):
    folder, _ = tiny_run
    code, out, err = inline("generate", f"--workdir={folder}", "--prompt=To be", "--prompt=Or", "--max_new_tokens=5",
                            "--temperature=1.0", "--seed=3", "--n=2")
    assert code == 0, err
    prompts = ["To be", "To be", "Or", "Or"]
    texts = fm_jax.load(folder).generate(prompts, max_new_tokens=5, temperature=1.0, seed=3)
    assert out == "---\n".join(p + t + "\n" for p, t in zip(prompts, texts)) and texts[0] != texts[1]


@pytest.mark.parametrize("flags, message", [
    (["--max_new_tokens=256"], "max_new_tokens=256 must be from 1 to 255"),
    (["--max_new_tokens=0"], "max_new_tokens"), (["--temperature=-1"], "temperature"), (["--top_p=1.5"], "top_p"),
    (["--step=5"], "unknown 5"), (["--prompt"], "prompt")])
def test_generate_refuses(flags, message, inline, tiny_run):
    code, _, err = inline("generate", f"--workdir={tiny_run[0]}", "--prompt=a", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_evaluate_writes_every_sample_and_prints_the_means(inline, run, data):
    code, out, err = inline("evaluate", f"--workdir={run}", "--limit=4")
    assert code == 0, err
    texts = list(prepared.texts(data, "validation"))
    found = json.loads((run / "eval" / "12" / "perplexity_3shot.json").read_text())
    assert found["step"] == 12 and found["limit"] == 4 and len(found["samples"]) == 4
    assert [s["bytes"] for s in found["samples"]] == [len(t.encode()) for t in texts[:4]]
    bits = -sum(s["logprob"] for s in found["samples"]) / sum(s["bytes"] for s in found["samples"]) / math.log(2)
    assert found["metrics"]["bits_per_byte"] == pytest.approx(bits)
    assert re.search(rf"^perplexity +bits_per_byte +{bits:.4f}$", out, re.MULTILINE)
    few = json.loads((run / "eval" / "12" / "next_sentence_3shot.json").read_text())
    assert few["metrics"]["questions"] == 4 == len(few["samples"])
    assert re.search(rf"^next_sentence +acc +{few['metrics']['acc']:.4f} \+- ", out, re.MULTILINE)
    code, _, _ = inline("evaluate", f"--workdir={run}", "--tasks=perplexity", "--step=4", "--limit=1", f"--data={data}")
    assert code == 0 and [p.name for p in (run / "eval" / "4").iterdir()] == ["perplexity_3shot.json"]


@pytest.mark.parametrize("flags, message", [
    (["--tasks=perplexty"], "--tasks: unknown 'perplexty'; did you mean 'perplexity'?"),
    (["--tasks="], "--tasks is empty"), (["--step=5"], "unknown 5"),
    (["--data=nowhere"], "no prepared data at 'nowhere'")])
def test_evaluate_refuses(flags, message, inline, run):
    code, _, err = inline("evaluate", f"--workdir={run}", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err
    assert not (run / "eval").exists()


def test_evaluate_needs_held_out_text(inline, run, tmp_path):
    (tmp_path / "x.txt").write_text("some text")
    assert inline("prepare", f"--source={tmp_path / 'x.txt'}", "--tokenizer=bytes", "--validation_frac=0",
                  f"--output={tmp_path / 'x'}", "--workers=1")[0] == 0
    code, _, err = inline("evaluate", f"--workdir={run}", f"--data={tmp_path / 'x'}")
    assert code == 2 and "has no held-out text; prepare it with a larger --validation_frac" in err, err


def test_report_compares_and_draws(inline, run):
    code, out, err = inline("report", f"--workdir={run}", "--prompt=To be")
    assert code == 0, err
    table = {name.strip(): float(bits) for name, bits in re.findall(r"^  (\S.{15}) (\d\.\d{3})$", out, re.MULTILINE)}
    assert set(table) == {"gzip -9", "xz -9e", "order-5 n-gram", "this model"}
    assert list(table.values()) == sorted(table.values(), reverse=True)
    ours = json.loads((run / "eval" / "12" / "perplexity_0shot.json").read_text())["metrics"]["bits_per_byte"]
    assert table["this model"] == round(ours, 3)
    assert "accuracy" in out and "  > To be" in out and f"Run folder  {run}" in out
    assert f"Loss curve  {run / 'loss.png'}" in out and (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
