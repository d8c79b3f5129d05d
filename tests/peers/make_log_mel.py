"""Writes `tests/log_mel/`: what transformers' WhisperFeatureExtractor makes of the sound of `tests/audio_test.py`.

Every eleventh of the first 330 frames, of 80 and of 128 bands. Run it with a Python that has transformers 5.23.0; the
test that reads them needs none.

Try:  .venv-lm-eval-hf/bin/python tests/peers/make_log_mel.py
"""

from pathlib import Path

import numpy as np
import transformers

TESTS = Path(__file__).resolve().parent.parent


def chirp():
    n = 16000 * 3 + 77
    t, noise = np.arange(n) / 16000, np.random.default_rng(0).normal(size=n)
    return (0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t) + 0.05 * noise * (np.sin(3 * t) > 0)).astype(np.float32)


if __name__ == "__main__":
    for bands in (80, 128):
        extract = transformers.WhisperFeatureExtractor(feature_size=bands)
        frames = extract(chirp(), sampling_rate=16000, return_tensors="np")["input_features"][0].T
        np.savez_compressed(TESTS / "log_mel" / f"{bands}.npz", frames=frames[:330:11].astype(np.float32))
