"""cos and sin for `rope`: plain angles, and the scalings by which models stretch their context.

Every builder takes `seqlen` (rows), `rotary_dim` (even) and keywords, and returns cos, sin of shape
[seqlen, rotary_dim / 2]. Frequencies, angles and cosines are float32 whatever the dtype of the result, in the order of
operations of transformers' `ROPE_INIT_FUNCTIONS`, so that a model gets the numbers that it was trained with.

>>> cos, sin = llama3(8192, 128, theta=500000.0, factor=8, original_seqlen=8192)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastattn.ops import _check

Tables = tuple[torch.Tensor, torch.Tensor]


def plain(
    seqlen: int,
    rotary_dim: int,
    *,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Position m turns pair i by m * theta^(-2i / rotary_dim) (Su et al., RoFormer, arXiv:2104.09864)."""
    return _tables(seqlen, _frequencies(rotary_dim, theta, device), 1.0, dtype)


def linear(
    seqlen: int,
    rotary_dim: int,
    *,
    factor: float,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Positions divided by `factor` (position interpolation, Chen et al., arXiv:2306.15595)."""
    return _tables(seqlen, _frequencies(rotary_dim, theta, device) / factor, 1.0, dtype)


def dynamic_ntk(
    seqlen: int,
    rotary_dim: int,
    *,
    factor: float,
    max_seqlen: int,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """A theta that grows with seqlen beyond the trained `max_seqlen`; up to it this is `plain`."""
    stretch = factor * max(seqlen, max_seqlen) / max_seqlen - (factor - 1)
    scaled = theta * stretch ** (rotary_dim / (rotary_dim - 2)) if rotary_dim > 2 else theta
    return _tables(seqlen, _frequencies(rotary_dim, scaled, device), 1.0, dtype)


def yarn(
    seqlen: int,
    rotary_dim: int,
    *,
    factor: float,
    original_seqlen: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    mscale: float | None = None,
    mscale_all_dim: float | None = None,
    truncate: bool = True,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Fast pairs keep their angle, slow ones are interpolated, a ramp between (Peng et al., YaRN, arXiv:2309.00071).

    The tables carry the paper's temperature: `attention_factor`, or what mscale and mscale_all_dim give (DeepSeek), or
    0.1 ln(factor) + 1.
    """
    if attention_factor is None:
        if mscale and mscale_all_dim:
            attention_factor = _yarn_scale(factor, mscale) / _yarn_scale(factor, mscale_all_dim)
        else:
            attention_factor = _yarn_scale(factor, 1.0)

    def pair_with(rotations: float) -> float:
        """The pair that turns `rotations` times within the original length."""
        return rotary_dim * math.log(original_seqlen / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair_with(beta_fast), pair_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    steps = torch.arange(rotary_dim // 2, dtype=torch.float32, device=device)
    keep = 1 - torch.clamp((steps - low) / ((high - low) or 0.001), 0, 1)
    wavelengths = _wavelengths(rotary_dim, theta, device)
    inverse = 1.0 / (factor * wavelengths) * (1 - keep) + 1.0 / wavelengths * keep
    return _tables(seqlen, inverse, attention_factor, dtype)


def llama3(
    seqlen: int,
    rotary_dim: int,
    *,
    factor: float,
    original_seqlen: int,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    theta: float = 500000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """Wavelengths above original_seqlen / low_freq_factor are stretched by `factor`, those below
    original_seqlen / high_freq_factor are kept, a ramp between (Llama 3.1, arXiv:2407.21783).
    """
    inverse = _frequencies(rotary_dim, theta, device)
    wavelength = 2 * math.pi / inverse
    smooth = (original_seqlen / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    ramp = (1 - smooth) * inverse / factor + smooth * inverse
    scaled = torch.where(wavelength > original_seqlen / low_freq_factor, inverse / factor, ramp)
    scaled = torch.where(wavelength < original_seqlen / high_freq_factor, inverse, scaled)
    return _tables(seqlen, scaled, 1.0, dtype)


def longrope(
    seqlen: int,
    rotary_dim: int,
    *,
    short_factor: Sequence[float],
    long_factor: Sequence[float],
    original_seqlen: int,
    factor: float,
    attention_factor: float | None = None,
    theta: float = 10000.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tables:
    """One factor per pair, `long_factor` once seqlen exceeds `original_seqlen` (Ding et al., arXiv:2402.13753).

    `factor` is the ratio of the model's longest sequence to `original_seqlen`; it sets the temperature.
    """
    for name, given in (("short_factor", short_factor), ("long_factor", long_factor)):
        if len(given) != rotary_dim // 2:
            _check.fail("longrope", name, f"rotary_dim / 2 ({rotary_dim // 2}) numbers", len(given))
    if attention_factor is None:
        attention_factor = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_seqlen))
    chosen = long_factor if seqlen > original_seqlen else short_factor
    factors = torch.tensor(chosen, dtype=torch.float32, device=device)
    return _tables(seqlen, 1.0 / (factors * _wavelengths(rotary_dim, theta, device)), attention_factor, dtype)


def _wavelengths(rotary_dim: int, theta: float, device: torch.device | str | None) -> torch.Tensor:
    """theta^(2i / rotary_dim), over 2 pi."""
    if rotary_dim < 2 or rotary_dim % 2 != 0:
        _check.fail("rope tables", "rotary_dim", "even and at least 2", rotary_dim)
    return theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device) / rotary_dim)


def _frequencies(rotary_dim: int, theta: float, device: torch.device | str | None) -> torch.Tensor:
    return 1.0 / _wavelengths(rotary_dim, theta, device)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _tables(seqlen: int, inverse: torch.Tensor, scaling: float, dtype: torch.dtype) -> Tables:
    if seqlen < 0:
        _check.fail("rope tables", "seqlen", "at least 0", seqlen)
    angles = torch.arange(seqlen, dtype=torch.float32, device=inverse.device)[:, None] * inverse
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)
