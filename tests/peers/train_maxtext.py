"""One training run of MaxText's own command on the model of bench_maxtext; prints one JSON line.

Runs in the environment of requirements_maxtext.txt, without fm_jax: MaxText in a subprocess, on its
synthetic data, its step times read from its log. Llama-like: 4 layers, width 256, 4 heads, SwiGLU of
1,024, vocabulary 8,192 tied, sequence 512, batch 8, float32. Arguments it does not know go to MaxText.

Try:  python tests/peers/train_maxtext.py --remat minimal scan_layers=False
"""

import argparse
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

BATCH, SEQ_LEN = 8, 512
MODEL = dict(base_num_decoder_layers=4, base_emb_dim=256, base_num_query_heads=4, base_num_kv_heads=4, head_dim=64,
             base_mlp_dim=1024, vocab_size=8192, max_target_length=SEQ_LEN, per_device_batch_size=BATCH,
             dtype="float32", weight_dtype="float32", logits_via_embedding=True, attention="dot_product")
RUN = dict(hardware="cpu", skip_jax_distributed_system=True, dataset_type="synthetic", run_name="peer",
           enable_checkpointing=False, enable_goodput_recording=False, monitor_goodput=False, log_config=False)


def main():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--steps", type=int, default=8)
    flags.add_argument("--warmup", type=int, default=2, help="first steps left out of the times")
    flags.add_argument("--remat", default="full", help="MaxText's remat_policy: full (its default), minimal, none")
    args, more = flags.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = MODEL | RUN | dict(base_output_directory=folder, steps=args.steps, remat_policy=args.remat)
        command = [sys.executable, "-m", "maxtext.trainers.pre_train.train", *(f"{k}={v}" for k, v in settings.items())]
        process = subprocess.Popen([*command, *more], cwd=folder, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.STDOUT,
                                   env=os.environ | {"DECOUPLE_GCLOUD": "TRUE", "JAX_PLATFORMS": "cpu"})
        lines, steps, peak_kb, proc = [], [], None, pathlib.Path("/proc", str(process.pid))
        for line in process.stdout:
            lines.append(line)
            steps += re.findall(r"completed step: (\d+), seconds: ([\d.]+).*?\bloss: ([\d.]+)", line)
            if len(steps) == args.warmup:
                (proc / "clear_refs").write_text("5")   # the resident peak starts again, as in ours
            if len(steps) == args.steps and proc.exists():
                peak_kb = re.search(r"VmHWM:\s*(\d+)", (proc / "status").read_text()) or peak_kb
        process.wait()
    if process.returncode or len(steps) < args.steps:
        raise SystemExit(f"MaxText ended with {process.returncode} after {len(steps)} steps:\n{''.join(lines[-30:])}")
    # Its clock is one step late and does not wait for the device in steps 0 and 1.
    times = [float(seconds) for _, seconds, _ in steps[max(2, args.warmup):]]
    median = statistics.median(times)
    print(json.dumps({
        "model": "maxtext", "remat": args.remat, "step_times_s": times, "step_time_s": median,
        "tokens_per_s": BATCH * SEQ_LEN / median, "losses": [float(loss) for _, _, loss in steps[:5]],
        "peak_memory_bytes": 1024 * int(peak_kb[1])}))


if __name__ == "__main__":
    main()
