from __future__ import annotations

import numpy as np
import pytest
import torch
from task_models import tone, write_wave

from peftk.cli.audio import read_wave, resampled
from peftk.cli.errors import UserError


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (48000, 16000), (11025, 16000), (16000, 8000)])
def test_a_tone_stays_that_tone(rate, wanted):
    """Against the tone sampled at the other rate; ends aside, where it begins at once."""
    made = resampled(torch.from_numpy(tone(440, 0.73, rate).astype(np.float32)), rate, wanted)
    expected = torch.from_numpy(tone(440, 0.8, wanted).astype(np.float32))
    assert len(made) == -(-int(0.73 * rate) * wanted // rate)
    inside = slice(wanted // 10, len(made) - wanted // 10)
    torch.testing.assert_close(made[inside], expected[: len(made)][inside], rtol=0, atol=2e-3)


def test_what_the_lower_rate_cannot_hold_is_gone():
    made = resampled(torch.from_numpy(tone(7000, 0.5, 16000).astype(np.float32)), 16000, 8000)
    assert made[400:-400].abs().max() < 0.01  # a plain second sample would be a tone of 1000 Hz


@pytest.mark.parametrize("width", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2])
def test_every_width_and_channels_are_read(tmp_path, width, channels):
    samples = tone(300, 0.1)
    mixed = samples if channels == 1 else np.stack([samples * 1.5, samples * 0.5], 1)
    path = write_wave(tmp_path / "a.wav", mixed, 8000, width, channels)
    read = read_wave(path, 8000, 1, "here")
    np.testing.assert_allclose(read.numpy(), samples, atol=2e-2 if width == 1 else 1e-4)


def test_what_cannot_be_heard_is_told(tmp_path):
    write_wave(tmp_path / "long.wav", tone(300, 1.5))
    write_wave(tmp_path / "empty.wav", tone(300, 0))
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "long.wav").read_bytes()[:20])
    cases = {
        "long.wav": r"1\.5 seconds; the model hears at most 1",
        "empty.wav": "holds no samples",
        "text.wav": "expected a PCM wave file",
        "cut.wav": "expected a PCM wave file",
        "none.wav": "no such file",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=rf"^here: .*{name}: {message}"):
            read_wave(tmp_path / name, 8000, 1, "here")
