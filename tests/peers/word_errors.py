"""Word error rates of a speech model on two sets of Debian: five LibriVox sentences and prompts of a telephone exchange.

    apt-get download pocketsphinx-testdata asterisk-core-sounds-en asterisk-core-sounds-en-wav
    python tests/peers/word_errors.py --model data/whisper-base --debs . --count 100

`--count` of the 281 prompts with a transcript of three words or more and nothing in brackets, drawn with seed 0; 8 kHz.
"""

import argparse
import gzip
import json
from pathlib import Path
import random
import re
import subprocess
import sys
import tempfile


def lists(folder, count):
    """Yields (name, records) of what the packages hold, unpacked to `folder`."""
    spoken = folder / "usr/share/pocketsphinx/test/data/librivox"
    sentences = re.findall(r"<s> (.*) </s> \((.*)\)", (spoken / "transcription").read_text())
    yield "librivox", [{"audio": str(spoken / f"{name}.wav"), "text": text} for text, name in sentences]
    sounds = folder / "usr/share/asterisk/sounds/en_US_f_Allison"
    with gzip.open(folder / "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz", "rt", errors="replace") as f:
        texts = dict(map(str.strip, line.split(":", 1)) for line in f if ":" in line and not line.startswith(";"))
    usable = [name for name, text in sorted(texts.items()) if (sounds / f"{name}.wav").is_file()
              and not re.search(r"[\[\]]", text) and len(text.split()) >= 3]
    random.Random(0).shuffle(usable)
    yield "asterisk", [{"audio": str(sounds / f"{name}.wav"), "text": texts[name]} for name in sorted(usable[:count])]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="for --workdir of fm_jax.transcribe")
    parser.add_argument("--debs", default=".", help="folder of the three packages")
    parser.add_argument("--count", type=int, default=100)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        for package in ("pocketsphinx-testdata", "asterisk-core-sounds-en", "asterisk-core-sounds-en-wav"):
            deb = next(Path(args.debs).glob(f"{package}_*.deb"))
            subprocess.run(["dpkg", "-x", deb, made], check=True)
        for name, records in lists(Path(made), args.count):
            path = Path(made, f"{name}.jsonl")
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
            done = subprocess.run([sys.executable, "-m", "fm_jax.transcribe", "--workdir", args.model, "--list", path,
                                   "--language", "en"], check=True, capture_output=True, text=True)
            print(f"{name}: {done.stdout.splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    main()
