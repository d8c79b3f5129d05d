"""Writes `tests/peft_adapters/`: random adapters of PEFT on models of `tests/hf_models`, and what it computes with them.

Of each: adapter_config.json and adapter_model.safetensors as PEFT writes them, and expected.npz: `tokens` [2, 23] and
of them `logits` [2, 23, V]. Run it with a Python that has torch 2.13.0, transformers 5.23.0 and peft 0.21.2; the test that
reads them, `tests/adapt_test.py`, needs none. With folders as arguments, MODEL ADAPTER pairs, it writes beside each
adapter the logits that PEFT computes with it, to logits.npy: so an export of ours is tried.
"""

import json
from pathlib import Path
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

HERE = Path(__file__).resolve().parent.parent
ADAPTERS = {   # base, settings: a tensor of three matrices; ranks and scales of their own; DoRA
    "gpt2": ("gpt2", dict(r=3, lora_alpha=5, target_modules=["c_attn", "mlp.c_fc"], fan_in_fan_out=True)),
    "llama": ("llama", dict(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=True,
                            rank_pattern={"o_proj": 2}, alpha_pattern={"down_proj": 7})),
    "dora": ("llama", dict(r=2, lora_alpha=3, target_modules=["k_proj", "o_proj", "up_proj"], use_dora=True)),
    "gpt_neox": ("gpt_neox", dict(r=2, lora_alpha=3, target_modules=["query_key_value", "dense"])),
}


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long)).logits.numpy()


def make(name):
    base, settings = ADAPTERS[name]
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_pretrained(HERE / "hf_models" / base, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if "lora_A" in key or "lora_B" in key:
                p.copy_((torch.randn_like(p) * 0.3).bfloat16().float())
            elif "magnitude" in key:
                p.mul_(1 + 0.3 * torch.rand_like(p))
    tokens = np.load(HERE / "hf_models" / base / "expected.npz")["tokens"]
    folder = HERE / "peft_adapters" / name
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as made:
        model.save_pretrained(made)
        config = json.loads(Path(made, "adapter_config.json").read_text()) | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
        (folder / "adapter_model.safetensors").write_bytes(Path(made, "adapter_model.safetensors").read_bytes())
    np.savez_compressed(folder / "expected.npz", tokens=tokens, logits=logits(model, tokens))
    print(name, sum(f.stat().st_size for f in folder.iterdir()))


def compute(base, adapter):
    model = transformers.AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")
    tokens = np.load(Path(base) / "expected.npz")["tokens"]
    np.save(Path(adapter) / "logits.npy", logits(peft.PeftModel.from_pretrained(model, adapter).eval(), tokens))


if __name__ == "__main__":
    if sys.argv[1:]:
        for pair in zip(sys.argv[1::2], sys.argv[2::2]):
            compute(*pair)
    else:
        for each in ADAPTERS:
            make(each)
