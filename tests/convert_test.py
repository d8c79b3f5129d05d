"""The command that turns folders of Hugging Face weights into runs and back."""

import json
import shutil

import jax
import numpy as np
import pytest

import fm_jax
from fm_jax import checkpoint


def tokens():
    return np.random.default_rng(0).integers(0, 262, (2, 12))


@pytest.fixture(scope="module")
def exported(tiny_run, command, tmp_path_factory):
    """Returns (folder, output) of a trained run in Hugging Face's form."""
    folder = tmp_path_factory.mktemp("hf") / "tiny"
    result = command("convert", f"--workdir={tiny_run[0]}", f"--to_hf={folder}")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_a_run_goes_out_and_comes_back(exported, tiny_run, inline, tmp_path):
    folder, out = exported
    assert "37,024 parameters as llama; tokenizer: tokenizer.json\n" in out and out.count("\n") == 1
    run, direct = fm_jax.load(tiny_run[0]), fm_jax.load(folder)
    jax.tree.map(np.testing.assert_array_equal, direct.params, run.params)   # of the average, which the run keeps
    code, out, err = inline("convert", f"--from_hf={folder}", f"--workdir={tmp_path / 'run'}", "--mesh=fsdp=4,tensor=2")
    assert (code, err) == (0, "") and "37,024 parameters in float32, activations in float32" in out
    lm = fm_jax.load(tmp_path / "run")
    assert lm.step == 0 and lm.tokenizer.fingerprint == run.tokenizer.fingerprint
    for other in (direct, lm):
        np.testing.assert_allclose(other.logits(tokens()), run.logits(tokens()), atol=1e-5)   # scanned, not unrolled
    assert lm.generate(["<s>To be"], max_new_tokens=4) == run.generate(["To be"], max_new_tokens=4)
    for name in ("generate", "evaluate"):
        extra = ["--prompt=To be", "--max_new_tokens=2"] if name == "generate" else ["--tasks=nothing"]
        code, _, err = inline(name, f"--workdir={tmp_path / 'run'}", *extra)
        assert code == (0 if name == "generate" else 2), err


def test_transformers_opens_it(exported, tiny_run):
    torch = pytest.importorskip("torch", reason="transformers computes with PyTorch, which is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(exported[0]).eval()
    tokenizer, run = transformers.AutoTokenizer.from_pretrained(exported[0]), fm_jax.load(tiny_run[0])
    np.testing.assert_allclose(model(torch.tensor(tokens())).logits.detach().numpy(), run.logits(tokens()), atol=2e-4)
    text = "To be,  or\nn\u00f6t \U0001f600"
    assert tokenizer.encode(text, add_special_tokens=False) == run.tokenizer.encode(text).tolist()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (run.tokenizer.bos_id, run.tokenizer.eos_id)
    assert tokenizer.decode(run.tokenizer.encode(text)) == text


def test_training_begins_with_the_weights(exported, inline, tiny_flags, tiny_run, tmp_path):
    code, _, err = inline("convert", f"--from_hf={exported[0]}", f"--workdir={tmp_path / 'run'}")
    assert code == 0, err
    code, out, err = inline("train", *tiny_flags, f"--workdir={tmp_path / 'tuned'}", "--config.steps=2",
                            f"--config.checkpoint.init_from={tmp_path / 'run'}", "--config.log.progress=false")
    assert code == 0 and "parameters from step 0 of" in out, err
    losses = [json.loads(line) for line in (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()]
    first = [json.loads(line) for line in (tiny_run[0] / "metrics.jsonl").read_text().splitlines()]
    loss = lambda lines: next(v for line in lines for k, v in line.items() if k.endswith("nll") or k == "loss")
    assert loss(losses) < loss(first)   # of the same batch, before and after 12 steps


def test_mistakes_are_one_line(exported, tiny_run, inline, tmp_path):
    folder, run = exported[0], f"--workdir={tiny_run[0]}"
    for flags, message in [
            ([run], "give one of --from_hf, --from_peft, --to_hf, --to_peft, --to_run, with its FOLDER"),
            ([run, "--from_hf=a", "--to_hf=b"], "got --from_hf and --to_hf"),
            ([run, f"--from_hf={folder}"], "holds a run already; take another"),
            ([run, f"--from_hf={folder}", "--step=4"], "--step=4 is of --to_hf, --to_peft, --to_run, not of --from_hf"),
            ([run, f"--to_hf={tmp_path}/x", "--dtype=float32"], "--dtype=float32 is of --from_hf, not of --to_hf"),
            ([run, f"--to_hf={tmp_path}/x", "--step=5"], "unknown 5"),
            ([run, f"--to_hf={folder}"], "exists already and is not empty"),
            ([f"--workdir={tmp_path}/x", f"--from_hf={tmp_path}/nowhere"], "nowhere/config.json: cannot be read"),
            ([f"--workdir={tmp_path}/x", f"--to_hf={tmp_path}/y"], "no such file; is this a run folder"),
            ([f"--workdir={tmp_path}/x", f"--from_hf={tiny_run[0]}"], "model_type")]:
        code, out, err = inline("convert", *flags)
        assert (code, out) == (2, "") and message in err and err.count("\n") == 1, (flags, err)
    assert checkpoint.steps(tiny_run[0]) == [4, 8, 12]


def test_what_transformers_lacks_is_refused_before_anything_is_read(tiny_run, inline, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(tiny_run[0] / "tokenizer", run / "tokenizer")
    config = json.loads((tiny_run[0] / "config.json").read_text())
    config["model"]["embed_scale"] = 4.0
    (run / "config.json").write_text(json.dumps(config))   # and no checkpoint
    code, _, err = inline("convert", f"--workdir={run}", f"--to_hf={tmp_path / 'x'}")
    assert code == 2 and "llama comes nearest, without embed_scale=4.0" in err and not (tmp_path / "x").exists()
