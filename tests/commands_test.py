"""The other commands from their command lines: what they print, that it is true, and how they refuse."""

import errno
import json
import math
import os
import pathlib
import re
import shutil
import zlib

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import config as config_lib
from fm_jax import evaluate as evaluate_module
from fm_jax import objectives, plan, report, sharding
from fm_jax.architecture import SIZES, Architecture
from fm_jax.data import prepared
from fm_jax.evals import journal, names, tasks, yaml_task
from fm_jax.step import Program

FLAGS = {"train": ("config", "workdir", "profile"), "evaluate": ("workdir", "tasks", "limit"),
         "generate": ("workdir", "prompt", "temperature"), "prepare": ("source", "tokenizer", "output"),
         "plan": ("config", "sizes", "topology", "search", "devices"), "benchmark": ("config", "steps", "json"),
         "report": ("workdir", "prompt"), "convert": ("workdir", "from_hf", "to_hf")}


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
    assert "mesh of fsdp 256 x tensor 8" in out and "(-, fsdp, tensor" in out


def test_plan_needs_no_device(command, spec):
    """No array is made: on a machine whose platform jax does not find, where the first array would fail."""
    result = command("plan", spec + "tiny", "--config.optimizer.name=muon", "--config.optimizer.ema_decay=0.5",
                     "--config.accumulation_steps=2", JAX_PLATFORMS="nowhere")
    assert result.returncode == 0 and "parameters       37,024" in result.stdout, result.stderr


def test_plan_counts_epochs_in_the_data(inline, spec, data):
    code, out, err = inline("plan", spec + "tiny", f"--config.data.train={data}", "--config.steps=3 epochs")
    tokens = sum(s["tokens"] for s in json.loads((data / "manifest.json").read_text())["splits"]["train"]["shards"])
    rows = math.ceil((tokens - 1) / 64)   # each gives 64 targets
    assert code == 0 and f"FLOPs, {round(3 * rows / 8):,} steps, " in out, err


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
    (["--config.steps=3 epochs", "--config.data.train=nowhere"],
     "config.steps='3 epochs' needs the size of the data: no prepared data at 'nowhere'"),
    (["--config.optimizer.warmup_steps=1 epochs", "--config.data.train="],
     "config.optimizer.warmup_steps='1 epochs' needs the size of the data: --config.data.train is empty"),
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
    assert r["mesh"] == "one device"
    assert len(r["step_times_s"]) == 5 and r["step_time_s"] == sorted(r["step_times_s"])[2]
    assert r["tokens_per_s"] == pytest.approx(512 / r["step_time_s"])
    flops = Architecture(vocab_size=512, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=64).flops_per_token(64)
    assert r["flops_per_s"] == pytest.approx(flops * r["tokens_per_s"])
    assert r["mfu"] is None and r["first_step_s"] > 0 and r["peak_memory_of"] == "process in these steps"
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
    code, on_eight, err = inline("generate", f"--workdir={folder}", "--prompt=To be", "--prompt=Or", "--n=2",
                                 "--max_new_tokens=5", "--temperature=1.0", "--seed=3", "--mesh=fsdp=4,tensor=2")
    assert (code, on_eight) == (0, out), err


def test_generate_reads_prompt_files_and_stops(inline, tiny_run, tmp_path):
    folder, _ = tiny_run
    (tmp_path / "p.txt").write_text("To be\n\nOr\n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "To be"}\n{"prompt": "Or", "id": 7}\n')
    request = [f"--workdir={folder}", "--max_new_tokens=12", "--temperature=1.0", "--min_p=0.02", "--n=2",
               "--repetition_penalty=1.3"]
    code, out, err = inline("generate", *request, "--prompt=To be", "--prompt=Or")
    assert code == 0, err
    for name in ("p.txt", "p.jsonl"):
        assert inline("generate", *request, f"--prompt_file={tmp_path / name}") == (0, out, "")
    texts = out.removesuffix("\n").split("\n---\n")
    assert len(texts) == 4
    stop = texts[0].removeprefix("To be")[3:5]
    request += [f"--stop={stop}", "--stop=never seen"]
    code, cut, err = inline("generate", *request, "--prompt=To be", "--prompt=Or")
    assert code == 0, err
    shorter = [p + t.removeprefix(p).split(stop)[0] for p, t in zip(["To be"] * 2 + ["Or"] * 2, texts)]
    assert cut.removesuffix("\n").split("\n---\n") == shorter != texts


def test_generate_chats_and_says_what_it_cuts(inline, tiny_run, tmp_path):
    folder = shutil.copytree(tiny_run[0], tmp_path / "run")
    request = [f"--workdir={folder}", "--max_new_tokens=8", "--chat", "--system=Be brief."]
    assert "no chat template" in inline("generate", *request, "--prompt=Hi")[2]
    template = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:"
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    code, out, err = inline("generate", *request, "--prompt=Hi", "--n=2")
    (want,) = fm_jax.load(folder).generate([[{"role": "system", "content": "Be brief."},
                                             {"role": "user", "content": "Hi"}]], max_new_tokens=8)
    assert (code, out, err) == (0, f"{want}\n---\n{want}\n", "")   # the answers alone
    code, out, err = inline("generate", *request, "--prompt=Hi", f"--prompt={'x' * 300}")
    assert code == 0 and err == ("1 of 2 prompts are cut at their left to the 248 tokens that --max_new_tokens=8 "
                                 "leaves in the model's context\n")


@pytest.mark.parametrize("content, message", [
    ('{"prompt": 3}', "p.jsonl:1: expected {"), ("To be", "p.jsonl:1: not JSON"), ("\n", "p.jsonl is empty"),
    (None, "p.jsonl: [Errno 2]")])
def test_generate_refuses_a_prompt_file(content, message, inline, tiny_run, tmp_path):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    code, _, err = inline("generate", f"--workdir={tiny_run[0]}", f"--prompt_file={tmp_path / 'p.jsonl'}")
    assert code == 2 and message in err and err.count("\n") == 1, err


@pytest.mark.parametrize("flags, message", [
    (["--min_p=2"], "min_p=2.0 must be"), (["--repetition_penalty=0"], "repetition_penalty=0.0 must be"),
    (["--stop="], "stop=''"), (["--max_new_tokens=256"], "max_new_tokens=256 must be from 1 to 255"),
    (["--max_new_tokens=0"], "max_new_tokens"), (["--temperature=-1"], "temperature=-1.0 must be"),
    (["--top_p=0"], "top_p=0.0 must be above 0"), (["--top_k=-1"], "top_k=-1 must be"), (["--step=5"], "unknown 5"),
    (["--prompt"], "prompt"), (["--system=x"], "add --chat"),
    (["--mesh=fdsp=2"], "--mesh=fdsp=2: axis: unknown 'fdsp'; did you mean 'fsdp'?"),
    (["--mesh=data=16"], "needs 16 devices, this machine (cpu) has 8")])
def test_generate_refuses(flags, message, inline, tiny_run):
    code, _, err = inline("generate", f"--workdir={tiny_run[0]}", "--prompt=a", *flags)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_evaluate_writes_every_sample_and_prints_the_means(inline, run, data):
    code, out, err = inline("evaluate", f"--workdir={run}", "--limit=4")
    assert code == 0, err
    texts = list(prepared.texts(data, "validation"))
    found = json.loads((run / "eval" / "12" / "perplexity_limit4.json").read_text())
    assert found["step"] == 12 and found["limit"] == 4 and len(found["samples"]) == 4
    assert [s["bytes"] for s in found["samples"]] == [len(t.encode()) for t in texts[:4]]
    bits = -sum(s["logprob"] for s in found["samples"]) / sum(s["bytes"] for s in found["samples"]) / math.log(2)
    assert found["metrics"]["bits_per_byte"] == pytest.approx(bits)
    assert re.search(rf"^perplexity +bits_per_byte +{bits:.4f}$", out, re.MULTILINE)
    few = json.loads((run / "eval" / "12" / "next_sentence_3shot_limit4.json").read_text())
    assert few["metrics"]["questions"] == 4 == len(few["samples"]) and "num_fewshot" not in found
    assert re.search(rf"^next_sentence +acc +{few['metrics']['acc']:.4f} \+- ", out, re.MULTILINE)
    assert re.search(r"^next_sentence +mean_shots +[0-3]\.\d{4}$", out, re.MULTILINE)


def test_results_of_other_questions_lie_beside_each_other(inline, run, data, tmp_path):
    """A look at two documents does not replace the figures of all; and an end of the disk leaves what there was."""
    evaluate = lambda *flags: inline("evaluate", f"--workdir={run}", "--step=4", "--tasks=perplexity", *flags)
    other = shutil.copytree(data, tmp_path / data.name)   # of the same name
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "f" * 64}))
    for flags in ([], ["--limit=2"], ["--limit=1", "--mesh=data=3"], [f"--data={data}", "--limit=1"],
                  [f"--data={other}", "--limit=1"]):
        code, _, err = evaluate(*flags)
        assert code == 0, err
    mark = manifest["fingerprint"][:8]
    there = {p.name: json.loads(p.read_text()) for p in (run / "eval" / "4").iterdir()}
    names = ["perplexity.json", "perplexity_limit2.json", "perplexity_limit1.json",
             f"perplexity_limit1_prepared-{mark}.json", "perplexity_limit1_prepared-ffffffff.json"]
    assert set(there) == set(names)
    every = len(list(prepared.texts(data, "validation")))
    assert [there[n]["metrics"]["documents"] for n in names] == [every, 2, 1, 1, 1]
    assert [there[n]["data"] for n in names[2:]] == [str(data), str(data), str(other)]


def test_evaluate_names_the_file_that_it_cannot_write(inline, run, monkeypatch):
    (run / "eval").write_text("in the way")
    monkeypatch.setitem(tasks.TASKS, "perplexity", lambda *args, **kwargs: pytest.fail("evaluated, all for nothing"))
    for name in ("evaluate", "report"):
        code, _, err = inline(name, f"--workdir={run}")
        assert code == 2 and f"cannot write to {run / 'eval' / '12'}" in err and err.count("\n") == 1, err
    (run / "eval").unlink()
    folder = run / "eval" / "12"
    folder.mkdir(parents=True)
    (folder / "perplexity.json").write_text("earlier")
    monkeypatch.setitem(tasks.TASKS, "perplexity", lambda *args, **kwargs: tasks.Result({"bits_per_byte": 1.5}, []))

    def full(path, text):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(pathlib.Path, "write_text", full)
    code, _, err = inline("evaluate", f"--workdir={run}", "--tasks=perplexity")
    assert code == 2 and "No space left on device" in err and "'bits_per_byte': 1.5" in err, err
    # The answers are kept: once there is room, none is asked for again.
    assert sorted(p.name for p in folder.iterdir()) == ["perplexity.json", "perplexity.json.partial"]
    assert (folder / "perplexity.json").read_bytes() == b"earlier"


@pytest.mark.parametrize("flags, message", [
    (["--tasks=perplexty"], "--tasks: unknown 'perplexty'; did you mean 'perplexity'?"),
    (["--tasks="], "--tasks is empty"), (["--step=5"], "unknown 5"), (["--tasks=x*"], "no task is like 'x*'"),
    (["--tasks=nowhere.yaml"], "cannot read the task nowhere.yaml"),
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


@pytest.fixture
def task_file(tmp_path):
    """Returns the path of a task of lm-evaluation-harness: two questions, which letter comes next."""
    docs = [{"q": "a b c", "right": 0, "other": ["d", "x"]}, {"q": "m n o", "right": 1, "other": ["k", "p"]}]
    (tmp_path / "next.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    path = tmp_path / "next.yaml"
    path.write_text("""
task: next_letter
dataset_path: json
dataset_kwargs: {data_files: {test: next.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_target: right
doc_to_choice: other
metadata: {version: 2}
""")
    return path


def test_evaluate_runs_a_task_file(inline, tiny_run, task_file, tmp_path):
    """No held-out text is needed; every figure follows from the model's own scores."""
    code, out, err = inline("evaluate", f"--workdir={tiny_run[0]}", f"--tasks={task_file}",
                            f"--output={tmp_path / 'r'}")
    assert code == 0, err
    found = json.loads((tmp_path / "r" / "next_letter_0shot.json").read_text())
    scores = fm_jax.load(tiny_run[0]).score(["a b c", "a b c", "m n o", "m n o"], [" d", " x", " k", " p"])
    d, x, k, p = (s.logprob for s in scores)
    acc = ((d >= x) + (p > k)) / 2
    assert [r[0] for s in found["samples"] for r in s["resps"]] == pytest.approx([d, x, k, p], abs=1e-5)
    assert found["metrics"]["acc,none"] == acc == found["metrics"]["acc_norm,none"]   # choices of one character
    assert re.search(rf"^next_letter +acc +{acc:.4f} \+- \d", out, re.MULTILINE)
    table = (tmp_path / "r" / "results.md").read_text()
    assert f"| next_letter | 2 | none | 0 | acc | ↑ | {acc:.4f} | ± | " in table
    assert not list(pathlib.Path(tiny_run[0]).rglob("next_letter*"))


def test_evaluate_aggregates_a_group(inline, tiny_run, task_file, tmp_path):
    """Beside each task; the group's file is made of theirs."""
    other = task_file.read_text().replace("next_letter", "again").replace('"{{q}}"', '"{{q}} {{q}}"')
    (tmp_path / "again.yaml").write_text(other)
    (tmp_path / "both.yaml").write_text("group: both\ntask: [next_letter, again]\naggregate_metric_list:\n"
                                        "  - metric: acc\nmetadata: {version: 3}\n")
    code, out, err = inline("evaluate", f"--workdir={tiny_run[0]}", f"--tasks={tmp_path / 'both.yaml'}",
                            f"--output={tmp_path / 'r'}", "--num_fewshot=0")
    assert code == 0, err
    found = {name: json.loads((tmp_path / "r" / f"{name}_0shot.json").read_text())
             for name in ("next_letter", "again", "both")}
    acc = (found["next_letter"]["metrics"]["acc,none"] + found["again"]["metrics"]["acc,none"]) / 2
    assert found["both"]["metrics"]["acc,none"] == acc and found["both"]["metrics"]["documents"] == 4
    assert found["both"]["tasks"] == ["next_letter", "again"]
    assert [line.split()[0] for line in out.splitlines() if " acc " in line] == ["next_letter", "again", "both"]
    tasks, groups = (tmp_path / "r" / "results.md").read_text().split("\n\n")
    assert tasks.count(" acc ") == 2 and f"| both | 3 | none | 0 | acc | ↑ | {acc:.4f} | ± | " in groups


def test_evaluate_asks_as_a_chat(inline, run, task_file, tmp_path):
    flags = ("evaluate", f"--workdir={run}", f"--tasks={task_file}", f"--output={tmp_path / 'r'}", "--chat",
             "--num_fewshot=1", "--system_instruction=Go")
    code, _, err = inline(*flags)
    assert code == 2 and "chat template" in err and err.count("\n") == 1, err
    (run / "tokenizer" / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>")
    asked = {}
    for extra in ((), ("--nofewshot_as_multiturn",)):
        code, _, err = inline(*flags, *extra)
        assert code == 0, err
        found = json.loads((tmp_path / "r" / "next_letter_1shot_chat.json").read_text())
        asked[extra] = [pair for sample in found["samples"] for pair in sample["arguments"]][0]
    assert asked[()] == ["<system>Go<user>m n o<assistant>p<user>a b c<assistant>", "d"]
    assert asked["--nofewshot_as_multiturn",] == ["<system>Go<user>m n o p\n\na b c<assistant>", "d"]
    assert found["chat"] == {"system_instruction": "Go", "fewshot_as_multiturn": False}
    with open(run / "tokenizer" / "chat_template.jinja", "a") as file:
        file.write("!")
    assert "taken as it is" not in inline(*flags, "--nofewshot_as_multiturn")[1]   # another template, other prompts
    for wrong, message in ((["--system_instruction=Go"], "are of chats; add --chat"),
                           (["--chat", "--tasks=perplexity"], "built-in tasks are not asked as chats; leave out perp")):
        code, _, err = inline("evaluate", f"--workdir={run}", *wrong)
        assert code == 2 and message in err, err


def test_evaluate_lists_and_prints_tasks(command, inline, tmp_path):
    """A printed file stands alone: the same task again."""
    code, out, _ = inline("evaluate", "--list_tasks")
    assert code == 0 and re.search(r"^perplexity +bits per byte, ", out, re.MULTILINE)
    assert re.search(r"^piqa +which of two ways", out, re.MULTILINE) and out.count("mmlu_") >= 61
    for name in ("piqa", "mmlu_anatomy"):
        code, out, _ = inline("evaluate", f"--print_task={name}")
        (tmp_path / "mine.yaml").write_text(out)
        assert code == 0 and yaml_task.read(tmp_path / "mine.yaml") == names.find([name])[0][name].fields
        assert "include" not in out
    code, out, err = inline("evaluate", "--print_task=piqaa")
    assert code == 2 and "did you mean 'piqa'" in err


def test_another_tokenizer_than_the_runs_is_refused(inline, run):
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"tokenizer": "0" * 64}))
    code, _, err = inline("evaluate", f"--workdir={run}")
    assert code == 2 and "is not the tokenizer of the checkpoints, which by run.json has sha256 000000000000" in err


def test_evaluate_goes_on_where_it_stopped(inline, run, task_file, monkeypatch):
    """What is there is kept while it is of the same model, task and settings; half a file is not."""
    evaluate = lambda *flags: inline("evaluate", f"--workdir={run}", f"--tasks=perplexity,{task_file}", "--limit=1",
                                     *flags)
    assert evaluate()[0] == 0
    folder, asked = run / "eval" / "12", []
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(before) == {"perplexity_limit1.json", "next_letter_0shot_limit1.json"}
    score = fm_jax.pretrained.Pretrained.score
    monkeypatch.setattr(fm_jax.pretrained.Pretrained, "score",
                        lambda lm, *pairs: asked.append("score") or score(lm, *pairs))
    monkeypatch.setitem(tasks.TASKS, "perplexity", lambda *args, **kwargs: asked.append("perplexity") or tasks.Result(
        {"bits_per_byte": 1.0}, []))
    code, out, err = evaluate()
    assert (code, asked) == (0, []) and out.count("of the same model and settings: taken as it is") == 2, err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "perplexity_limit1.json").write_bytes(before["perplexity_limit1.json"][:-9])
    assert evaluate()[0] == 0 and asked == ["perplexity"]
    task_file.write_text(task_file.read_text() + "target_delimiter: '='\n")   # another task of the same name
    assert evaluate()[0] == 0 and asked == ["perplexity", "score"]
    assert evaluate("--num_fewshot=1")[0] == 0 and asked == ["perplexity", "score", "score"]
    assert (folder / "next_letter_1shot_limit1.json").exists()
    lm = fm_jax.load(run, step=12)
    # Any single number, anywhere; and on any mesh the same.
    mark, leaves = evaluate_module.parameters_mark(lm.params), jax.tree.leaves(lm.params)
    for i, leaf in enumerate(leaves):
        at = tuple(size // 2 for size in leaf.shape)
        changed = [*leaves[:i], leaf.at[at].add(0.001), *leaves[i + 1 :]]
        assert evaluate_module.parameters_mark(changed) != mark
    assert evaluate_module.parameters_mark(fm_jax.load(run, step=12, mesh={"fsdp": 4, "tensor": 2}).params) == mark


def test_evaluate_goes_on_within_a_task(inline, run, monkeypatch):
    """Killed between two documents, it asks only for the others, and finds the same."""
    flags = ("evaluate", f"--workdir={run}", "--tasks=perplexity", "--limit=4", f"--output={run / 'r'}")
    monkeypatch.setattr(journal, "TEXTS", 1)
    assert inline(*flags)[0] == 0
    want = json.loads((run / "r" / "perplexity_limit4.json").read_text())
    (run / "r" / "perplexity_limit4.json").unlink()
    score, asked = fm_jax.pretrained.Pretrained.score_texts, []

    def killed(lm, texts):
        asked.extend(texts)
        if len(asked) == 3:
            raise MemoryError
        return score(lm, texts)
    monkeypatch.setattr(fm_jax.pretrained.Pretrained, "score_texts", killed)
    with pytest.raises(MemoryError):
        evaluate_module.evaluate(run, ["perplexity"], limit=4, output=str(run / "r"))
    assert inline(*flags)[0] == 0
    found = json.loads((run / "r" / "perplexity_limit4.json").read_text())
    assert found == want and len(asked) == 5 and len(set(asked)) == 4
    assert sorted(p.name for p in (run / "r").iterdir()) == ["perplexity_limit4.json", "results.md"]


def test_evaluate_takes_patterns(inline, run):
    assert inline("evaluate", f"--workdir={run}", "--tasks=perp*", "--limit=1")[0] == 0
    assert [p.name for p in (run / "eval" / "12").iterdir()] == ["perplexity_limit1.json"]


def test_compare_pairs_the_samples_of_two_evaluations(command, inline, run, tmp_path):
    for step in (4, 12):
        code, _, err = inline("evaluate", f"--workdir={run}", f"--step={step}", f"--output={tmp_path / str(step)}")
        assert code == 0, err
    result = command("evaluate", "--compare", tmp_path / "4", tmp_path / "12")
    assert result.returncode == 0, result.stderr
    early, late = (json.loads((tmp_path / s / "perplexity.json").read_text())["metrics"]["bits_per_byte"]
                   for s in ("4", "12"))
    line = re.search(r"^perplexity +bits_per_byte +(\S+) +(\S+) +(\S+)  \[(\S+), (\S+)\] +(\S+)$", result.stdout,
                     re.MULTILINE)
    a, b, gap, low, high, p = map(float, line.groups())
    assert (a, b) == (round(early, 4), round(late, 4)) and low <= gap <= high and gap < 0   # training helped
    assert high < 0 and p < 0.05
    assert re.search(r"^next_sentence_3shot +acc_mutual_info ", result.stdout, re.MULTILINE)
    code, out, err = inline("evaluate", f"--compare={tmp_path / '4'},{tmp_path / '12'}")
    assert (code, out) == (0, result.stdout), err
    code, _, err = inline("evaluate", f"--compare={tmp_path / '4'}")
    assert code == 2 and "--compare takes two folders, got 1" in err


def test_report_compares_and_draws(inline, run):
    code, out, err = inline("report", f"--workdir={run}", "--prompt=To be")
    assert code == 0, err
    table = {name.strip(): float(bits) for name, bits in re.findall(r"^  (\S.{15}) (\d\.\d{3})$", out, re.MULTILINE)}
    assert set(table) == {"gzip -9", "xz -9e", "order-5 n-gram", "this model"}
    assert list(table.values()) == sorted(table.values(), reverse=True)
    results = {p.name: json.loads(p.read_text()) for p in (run / "eval" / "12").iterdir()}
    assert set(results) == {"perplexity.json", "next_sentence_0shot.json", "next_sentence_3shot.json"}
    assert table["this model"] == round(results["perplexity.json"]["metrics"]["bits_per_byte"], 3)
    zero, few = (results[f"next_sentence_{n}shot.json"]["metrics"] for n in (0, 3))
    assert f"  0-shot  accuracy {zero['acc_mutual_info']:.3f} +- " in out and few["mean_shots"] < 3
    assert re.search(rf"  3-shot  accuracy {few['acc_mutual_info']:.3f} \+- .*\(up to 3 shots, "
                     rf"{few['mean_shots']:.1f} on average fit the context\)", out)
    assert "  > To be" in out and f"Run folder  {run}" in out
    assert f"Loss curve  {run / 'loss.png'}" in out and (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    (run / "loss.png").unlink()
    (run / "loss.png").mkdir()
    code, _, err = inline("report", f"--workdir={run}")
    assert code == 2 and f"cannot write {run / 'loss.png'}: Is a directory" in err and err.count("\n") == 1, err


def test_report_measures_all_on_the_runs_held_out_text(inline, run, data, tmp_path):
    """config.data.validation where there is one, though the training data has none at all; and where a context is too
    short for the few-shot task, the report says so and goes on."""
    text = [" ".join(f"word{i * j % 97}" for j in range(20)) for i in range(50)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in text))
    assert inline("prepare", f"--source={tmp_path / 'x.jsonl'}", "--tokenizer=bytes", "--validation_frac=0",
                  f"--output={tmp_path / 'x'}", "--workers=1")[0] == 0
    config, _ = config_lib.load(run / "config.json")
    config_lib.override(config, {"data.train": str(tmp_path / "x"), "data.validation": str(data),
                                 "model.max_seq_len": 64})
    config_lib.save(config, run / "config.json")
    code, out, err = inline("report", f"--workdir={run}", "--mesh=data=2")
    assert code == 0, err
    held_out = list(prepared.texts(data, "validation"))
    size = sum(len(t.encode()) for t in held_out)
    assert f"Held-out text: {len(held_out)} documents, {size:,} bytes." in out
    packed = zlib.compress("\n".join(held_out).encode(), 9, wbits=31)
    assert f"  gzip -9          {8 * len(packed) / (size + len(held_out) - 1):.3f}\n" in out
    assert f"the n-gram model has counted {sum(map(len, set(text))):,} bytes of the training text, at most 10,0" in out
    scored = json.loads((run / "eval" / "12" / "perplexity.json").read_text())
    assert [s["bytes"] for s in scored["samples"]] == [len(t.encode()) for t in held_out]
    assert re.search(r"comes next in a document: not measured, as a continuation of \d+ tokens must have 1 to 64", out)
    assert out.count("  > ") == 3


def test_baselines_count_no_more_than_they_are_told(data):
    config = config_lib.defaults()
    every = list(prepared.texts(data, "train"))
    config.data.train = str(data)
    assert report.train_texts(config) == every
    for most in (1, 499, 500, 1234):
        some = report.train_texts(config, most)
        assert "".join(some) == "".join(every).encode()[:most].decode() and "" not in some
    config.data.train = f"{data}:3,{data}:1"
    assert "".join(report.train_texts(config, 2000)) == "".join(every)[:1500] + "".join(every)[:500]
