"""Recordings as samples: what the standard library's ``wave`` reads, mixed to one channel, at the rate that a model hears."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import torch

from peftk.cli.errors import UserError

_HIGHEST_RATE = 768_000  # Hz, of any converter


def read_wave(path: Path, rate: int, longest: float, where: str) -> torch.Tensor:
    """(samples,) fp32 in [-1, 1] at ``rate`` Hz, from PCM of 8, 16, 24 or 32 bits. UserError, after ``where``, for anything else,
    for silence of no length, and for more than ``longest`` seconds."""
    if not path.is_file():
        raise UserError(f"{where}: {path}: no such file; expected a wave file")
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, found, frames = file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()
            _check_facts(width, found, frames * channels * width, path, where)
            content = file.readframes(frames)
    except (wave.Error, EOFError, RuntimeError) as error:  # RuntimeError: chunks that point outside the file
        raise UserError(f"{where}: {path}: expected a PCM wave file ({str(error) or 'it ends too soon'})") from error
    if len(content) != frames * channels * width:
        raise UserError(f"{where}: {path}: expected a PCM wave file (it ends too soon)")
    samples = _pcm(content, width).reshape(-1, channels).mean(1)
    if not len(samples):
        raise UserError(f"{where}: {path}: holds no samples; expected a recording")
    if len(samples) > longest * found:
        raise UserError(f"{where}: {path}: {len(samples) / found:.1f} seconds; the model hears at most {longest:g}: cut it")
    return resampled(torch.from_numpy(samples), found, rate)


def _check_facts(width: int, rate: int, nbytes: int, path: Path, where: str) -> None:
    """Before memory is taken for them."""
    if not 1 <= width <= 4:
        raise UserError(f"{where}: {path}: expected 8, 16, 24 or 32 bits a sample, got {8 * width}")
    if not 1 <= rate <= _HIGHEST_RATE:
        raise UserError(f"{where}: {path}: expected 1 to {_HIGHEST_RATE} samples a second, got {rate}")
    if nbytes > path.stat().st_size:
        raise UserError(f"{where}: {path}: expected a PCM wave file (it ends too soon)")


def _pcm(content: bytes, width: int) -> np.ndarray:
    """fp32 in [-1, 1]; 8 bits are unsigned, more are signed, little-endian."""
    if width == 1:
        return (np.frombuffer(content, np.uint8).astype(np.float32) - 128) / 128
    padded = np.zeros((len(content) // width, 4), np.uint8)  # in the high bytes of 32 bits
    padded[:, 4 - width :] = np.frombuffer(content, np.uint8).reshape(-1, width)
    return padded.reshape(-1).view("<i4").astype(np.float32) / 2**31


def resampled(samples: torch.Tensor, rate: int, wanted: int) -> torch.Tensor:
    """(n,) at ``rate`` -> (ceil(n * wanted / rate),) at ``wanted``: the spectrum is cut or filled with zeros, so that no
    frequency appears that was not there."""
    if rate == wanted:
        return samples
    n = len(samples)
    pad = rate // 10  # seconds at the ends keep apart what the transform takes for a circle
    padded = torch.nn.functional.pad(samples, (0, pad + (-(n + pad)) % rate))  # whole seconds: the new length is whole too
    count = len(padded) // rate * wanted
    spectrum = torch.fft.rfft(padded)
    bins = count // 2 + 1
    kept = torch.zeros(bins, dtype=spectrum.dtype)
    shared = min(bins, len(spectrum))
    kept[:shared] = spectrum[:shared]
    made = torch.fft.irfft(kept, n=count) * (wanted / rate)
    return made[: -(-n * wanted // rate)]
