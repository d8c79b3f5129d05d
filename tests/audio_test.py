"""Log-mel frames against those of transformers, other rates against the sines they sample, files against `wave`."""

import pathlib
import struct
import wave

import numpy as np
import pytest

from fm_jax import audio
from fm_jax.errors import UserError

REFERENCE = pathlib.Path(__file__).parent / "log_mel"


def chirp():
    """Returns 3 s of a rising tone and noise that comes and goes: what `REFERENCE` was made of, by peers/make_log_mel.py."""
    n = audio.RATE * 3 + 77
    t, noise = np.arange(n) / audio.RATE, np.random.default_rng(0).normal(size=n)
    return (0.3 * np.sin(2 * np.pi * (200 + 400 * t) * t) + 0.05 * noise * (np.sin(3 * t) > 0)).astype(np.float32)


@pytest.mark.parametrize("num_mels", [80, 128])
def test_frames_are_those_of_transformers(num_mels):
    """Of WhisperFeatureExtractor (5.23.0), every eleventh of the first 330; what is behind the sound is silence."""
    got = audio.log_mel(chirp(), num_mels)
    assert got.shape == (3000, num_mels) and got.dtype == np.float32 and np.ptp(got[400:]) == 0
    np.testing.assert_allclose(got[:330:11], np.load(REFERENCE / f"{num_mels}.npz")["frames"], atol=1e-4)
    np.testing.assert_array_equal(audio.log_mel(chirp(), num_mels, 40).shape, (40, num_mels))


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000])
def test_another_rate_is_the_same_sound(rate):
    tone = lambda rate, hz: np.sin(2 * np.pi * hz * np.arange(rate // 2) / rate + 0.3)
    for hz in (100, 440, 3000):
        got = audio.resample(tone(rate, hz), rate)
        assert len(got) == 8000
        np.testing.assert_allclose(got[400:-400], tone(audio.RATE, hz)[400:-400], atol=2e-3)
    if rate > 16000:   # what 16 kHz cannot hold is gone and not somewhere else
        assert np.abs(audio.resample(tone(rate, 9500), rate)[400:-400]).max() < 1e-3


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_files_are_read_as_the_standard_library_writes_them(width, tmp_path):
    values = np.random.default_rng(width).integers(-128, 128, (50, 2)) << 8 * (width - 1)
    with wave.open(str(tmp_path / "a.wav"), "wb") as f:
        f.setparams((2, width, 8000, 0, "NONE", ""))
        body = (values + 128).astype("u1").tobytes() if width == 1 else b"".join(
            int(v).to_bytes(width, "little", signed=True) for v in values.ravel())
        f.writeframes(body)
    samples, rate = audio.read_wav(tmp_path / "a.wav")
    scale = -np.iinfo(samples.dtype).min
    assert rate == 8000
    np.testing.assert_allclose(samples / scale, values / 2.0 ** (8 * width - 1))
    sound, notes = audio.prepared(tmp_path / "a.wav")
    assert len(sound) == 100 and notes == ["the mean of 2 channels", "8000 resampled to 16000 samples a second"]


def test_bad_sound_is_refused(tmp_path):
    for sound, message in [([], "has no samples"), (np.zeros((0, 2)), "has no samples"),
                           (np.array([0.0, np.nan, np.inf]), "2 of 3 samples are not finite"),
                           (np.array([0.0, 3000.0]), "samples reach 3000; .*divide 16-bit ones"),
                           (np.zeros((2, 500)), "500 channels; give samples first"),
                           (np.array(["a"]), "is no sound"), (np.zeros((2, 2, 2)), "is no sound")]:
        with pytest.raises(UserError, match=message):
            audio.prepared(np.array(sound))
    with pytest.raises(UserError, match="rate=3 samples a second"):
        audio.prepared(np.zeros(5), 3)
    with pytest.raises(UserError, match="no.wav: cannot be read"):
        audio.prepared(tmp_path / "no.wav")
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 0, b"WAVE", b"fmt ", 16, 7, 1, 8000, 8000, 1, 8, b"data", 4)
    for content, message in [(b"ID3 an mp3 file", "not a WAV file; convert"), (header + b"1234", "format 7 with 8 bits"),
                             (header + b"12", "cut short: data has 2 of 4 bytes"), (header[:36], "without its format")]:
        (tmp_path / "b.wav").write_bytes(content)
        with pytest.raises(UserError, match=message):
            audio.prepared(str(tmp_path / "b.wav"))
    assert audio.prepared(np.zeros(100))[1] == ["silence"]
    np.testing.assert_array_equal(audio.prepared(np.array([-32768, 16384], np.int16))[0], [-1, 0.5])
