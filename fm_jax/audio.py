"""Sound, on the host: WAV files to samples, other rates to 16 kHz, and log-mel frames as Whisper's. Layer 1, NumPy only.

    samples, notes = audio.prepared("speech.wav")
    frames = audio.log_mel(samples, num_mels=80, length=3000)

On the host: the frames of 30 s take 18 ms of one EPYC core (2026-11), of which no device would save much.
"""

import functools
import math
import struct
from pathlib import Path

import numpy as np

from fm_jax.errors import UserError

RATE = 16000          # samples a second that models hear
WINDOW, HOP = 400, 160   # samples of a frame, and from one to the next: 25 and 10 ms
SILENCE = 1e-4        # peak below which there is nothing to hear: 80 dB under the loudest; 16 bits reach down to 3e-5


def prepared(sound, rate: int = RATE) -> tuple[np.ndarray, list[str]]:
    """Returns (samples, float32 [n] at 16 kHz; what was changed, in words) of a WAV file or an array [n] or [n, channels].

    rate: of an array; a file has its own. Integers are taken as parts of their type's range.

    Raises:
      UserError: no sound, of a kind that is not read, or with values that are not finite.
    """
    what = "the sound"
    if isinstance(sound, (str, Path)):
        what = str(sound)
        sound, rate = read_wav(sound)
    sound, notes = np.asarray(sound), []
    if sound.ndim not in (1, 2) or not any(np.issubdtype(sound.dtype, kind) for kind in (np.floating, np.signedinteger)):
        raise UserError(f"{what}: {sound.dtype}{list(sound.shape)} is no sound; expected samples [n] or [n, channels], "
                        "floats from -1 to 1 or signed integers")
    if not sound.size:
        raise UserError(f"{what}: has no samples")
    if not 1000 <= rate <= 1_000_000:
        raise UserError(f"{what}: rate={rate} samples a second is out of range")
    if sound.ndim == 2:
        if sound.shape[1] > 32:
            raise UserError(f"{what}: {sound.shape[1]} channels; give samples first, [n, channels]")
        if sound.shape[1] > 1:
            notes.append(f"the mean of {sound.shape[1]} channels")
    if np.issubdtype(sound.dtype, np.signedinteger):
        sound = sound / -float(np.iinfo(sound.dtype).min)
    sound = sound.astype(np.float32).reshape(len(sound), -1).mean(1)
    if not np.isfinite(sound).all():
        raise UserError(f"{what}: {int((~np.isfinite(sound)).sum())} of {len(sound)} samples are not finite")
    if (peak := float(np.abs(sound).max())) > 1.5:
        raise UserError(f"{what}: samples reach {peak:.4g}; floats are from -1 to 1, divide 16-bit ones by 32768")
    if rate != RATE:
        sound = resample(sound, rate)
        notes.append(f"{rate} resampled to {RATE} samples a second")
    if peak < SILENCE:
        notes.append("silence")
    return sound, notes


def read_wav(path) -> tuple[np.ndarray, int]:
    """Returns (samples [n, channels], their rate) of a WAV file of 8 to 32-bit integers or 32 or 64-bit floats.

    Raises:
      UserError: no such file, another format, or one that is cut short.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from None
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        raise UserError(f"{path}: not a WAV file; convert it to one, as with ffmpeg -i IN -ar {RATE} OUT.wav")
    chunks, at = {}, 12
    while at + 8 <= len(data):
        name, size = struct.unpack_from("<4sI", data, at)
        chunks.setdefault(name, data[at + 8 : at + 8 + size])
        if at + 8 + size > len(data):
            raise UserError(f"{path}: cut short: {name.decode(errors='replace')} has {len(data) - at - 8} of {size} bytes")
        at += 8 + size + size % 2
    if len(chunks.get(b"fmt ", b"")) < 16 or b"data" not in chunks:
        raise UserError(f"{path}: a WAV file without its format or samples")
    kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", chunks[b"fmt "])
    if kind == 0xFFFE and len(chunks[b"fmt "]) >= 26:   # the kind is further behind
        kind, = struct.unpack_from("<H", chunks[b"fmt "], 24)
    if (kind, bits) not in ((1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)) or not channels:
        raise UserError(f"{path}: WAV of format {kind} with {bits} bits is not read; convert it to 16-bit PCM")
    body = chunks[b"data"]
    body = body[: len(body) // (channels * bits // 8) * (channels * bits // 8)]
    if bits == 8:   # unsigned, by the format
        samples = (np.frombuffer(body, np.uint8).astype(np.int16) - 128).astype(np.int8)
    elif bits == 24:
        wide = np.zeros((len(body) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(body, np.uint8).reshape(-1, 3)
        samples = wide.view("<i4")[:, 0]
    else:
        samples = np.frombuffer(body, f"<{'i' if kind == 1 else 'f'}{bits // 8}")
    return samples.reshape(-1, channels), rate


def resample(samples, rate: int, to: int = RATE) -> np.ndarray:
    """Returns float32 samples at the rate `to`: each a sum of the old ones under a windowed sinc, without aliases.

    Sixteen zero crossings to each side under a Kaiser window of 8.6: 80 dB of what is cut off.
    """
    shared = math.gcd(rate, to)
    up, down = to // shared, rate // shared
    pass_ = min(1.0, up / down) * 0.97
    half = math.ceil(16 / pass_)
    # The place of output j among the old samples is j down / up, whose fraction repeats every `up` outputs.
    taps = np.arange(-half + 1, half + 1)
    away = taps[None] - (np.arange(up) / up)[:, None]
    weights = pass_ * np.sinc(pass_ * away) * np.i0(8.6 * np.sqrt(np.maximum(0, 1 - (away / half) ** 2))) / np.i0(8.6)
    weights /= weights.sum(1, keepdims=True)
    count = -(-len(samples) * up // down)
    padded = np.pad(np.asarray(samples, np.float64), half)
    out = np.empty(count)
    for begin in range(0, count, 65536):
        whole, part = np.divmod(np.arange(begin, min(begin + 65536, count)) * down, up)
        out[begin : begin + len(whole)] = (padded[whole[:, None] + half + taps] * weights[part]).sum(1)
    return out.astype(np.float32)


@functools.cache
def mel_filters(num_mels: int) -> np.ndarray:
    """Returns float64 [WINDOW // 2 + 1, num_mels]: triangles over the frequencies, of equal area, from 0 to 8 kHz.

    Source: the scale and areas of Slaney's Auditory Toolbox (1998): linear up to 1 kHz, then 27 to a factor of 6.4.
    """
    def hz(mel):
        return np.where(mel < 15, mel * 200 / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))

    highest = 15 + 27 * np.log(RATE / 2 / 1000) / np.log(6.4)
    edges = hz(np.linspace(0, highest, num_mels + 2))
    bins = np.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    rise, fall = (bins - low) / (middle - low), (high - bins) / (high - middle)
    return np.maximum(0, np.minimum(rise, fall)) * 2 / (high - low)


def log_mel(samples, num_mels: int = 80, length: int = 3000) -> np.ndarray:
    """Returns float32 [length, num_mels]: the first frames of the sound, with silence behind it.

    Logarithms of the power in each band, no lower than 80 dB under the loudest, around 0.

    Source: arXiv:2212.04356, section 2.2, and its code (`log_mel_spectrogram`), to 1e-4.
    """
    samples = np.asarray(samples, np.float32)[: length * HOP]
    padded = np.pad(np.pad(samples, (0, length * HOP - len(samples))), WINDOW // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, WINDOW)[::HOP][:length]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(WINDOW) / WINDOW)
    power = np.abs(np.fft.rfft(frames * window)) ** 2
    logs = np.log10(np.maximum(power @ mel_filters(num_mels), 1e-10))
    return ((np.maximum(logs, logs.max() - 8) + 4) / 4).astype(np.float32)
