"""Compute the truth of the testbed: an aesthetic score from pixels alone, and crowd votes on it.

``truth = (w . (terms - mean) / sd) / scale``: four published no-reference measures, each standardised on
4,000 training scenes, weighted and standardised again, so that one unit is one standard deviation of training
scenes.

On 4,000 other training scenes it falls with haze (rank correlation -0.28), defocus (-0.40) and the size of
the exposure error (-0.19) and rises with saturation (+0.27).  The hidden factors explain 54% of its variance,
the caption 28%; night scores about 0.7 below noon.  Black scores -5.7, training scenes -4 to 2.6.

It measures haze, blur, dullness and bad exposure, not realism: pixel noise is sharp and colourful to every
formula here and scores +4.4, so a claim about the truth score belongs beside the judges' agreement with the
caption.

``python -m guidance.testbed.truth`` recomputes the constants below.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, UInt8
from numpy.typing import NDArray

#: Weights of the standardised terms.  Colour and sharpness respond to saturation and defocus alone, hence the
#: larger weights; exposure keeps bright scenes from winning and contrast responds to haze.  Shares of the
#: variance of the score on training scenes: 0.40, 0.32, 0.12, 0.16.
WEIGHTS = {"colourfulness": 0.33, "sharpness": 0.30, "exposure": 0.22, "contrast": 0.15}

#: Mean and standard deviation of each term on training scenes 0..3999, and of their weighted sum.
MEAN = {"colourfulness": 52.492, "sharpness": -6.0435, "exposure": 0.54219, "contrast": 0.11616}

SD = {"colourfulness": 26.375, "sharpness": 1.3671, "exposure": 0.19575, "contrast": 0.039487}

SCALE = 0.59041

#: One vote is ``round(VOTE_MEAN + VOTE_SLOPE truth + VOTE_NOISE e)``, e ~ N(0, 1), held within 1..10.
VOTE_MEAN, VOTE_SLOPE, VOTE_NOISE = 5.7, 1.35, 2.0

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601

_PIXELS_AT_ONCE = 1 << 18  # a block of this many pixels stays in the cache


def truth_terms(images: UInt8[np.ndarray, "n h w 3"]) -> dict[str, Float[np.ndarray, " n"]]:
    """Measure the four terms of the truth score, each in its own published unit.

    * ``colourfulness``: ``M3 = |sd(rg), sd(yb)| + 0.3 |mean(rg), mean(yb)|``, ``rg = R - G``,
      ``yb = (R + G) / 2 - B``, channels 0..255; 0 is grey, 109 "extremely colourful".
    * ``sharpness``: log of the variance of the Laplacian of luma (0..1), plus 1e-6: natural log, about
      -10..0.
    * ``exposure``: well-exposedness ``exp(-(v - 0.5)^2 / (2 * 0.2^2))``, mean over pixels and channels, 0..1.
    * ``contrast``: RMS contrast, the standard deviation of luma, 0..0.5.

    Args:
        images: RGB, 0..255.  The testbed's are 64x64; others work, but sharpness depends on the resolution.

    Returns:
        One array per term, float64, shape ``(n,)``.

    References:
        Hasler and Suesstrunk 2003, Measuring colourfulness in natural images.  Pech-Pacheco et al. 2000,
        Diatom autofocusing in brightfield microscopy.  Mertens et al. 2007, Exposure fusion.  Peli 1990,
        Contrast in complex images.
    """
    assert images.dtype == np.uint8 and images.shape[-1] == 3 and min(images.shape[1:3]) >= 3
    step = max(1, _PIXELS_AT_ONCE // (images.shape[1] * images.shape[2]))
    parts = [_terms(images[i : i + step]) for i in range(0, len(images), step)] or [np.empty((4, 0))]
    return dict(zip(WEIGHTS, np.concatenate(parts, axis=1), strict=True))


def _terms(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    r, g, b = (np.ascontiguousarray(images[..., c], dtype=np.float32) for c in range(3))
    rg_mean, rg_var = _moments(r - g)
    yb_mean, yb_var = _moments(0.5 * (r + g) - b)
    colourfulness = np.sqrt(rg_var + yb_var) + 0.3 * np.hypot(rg_mean, yb_mean)
    y = (_LUMA[0] * r + _LUMA[1] * g + _LUMA[2] * b) / 255
    centre = y[:, 1:-1, 1:-1]
    laplacian = y[:, 1:-1, :-2] + y[:, 1:-1, 2:] + y[:, :-2, 1:-1] + y[:, 2:, 1:-1] - 4 * centre
    sharpness = np.log(_moments(laplacian)[1] + 1e-6)
    exposure = _WELL_EXPOSED[images].mean((1, 2, 3), dtype=np.float64)
    return np.stack([colourfulness, sharpness, exposure, np.sqrt(_moments(y)[1])])


_WELL_EXPOSED = np.exp(-((np.arange(256) / 255 - 0.5) ** 2) / (2 * 0.2**2)).astype(np.float32)


def _moments(x: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return mean and variance of each image, in float64."""
    mean = x.mean((1, 2), dtype=np.float64)
    centred = x - mean[:, None, None].astype(np.float32)
    return mean, np.einsum("nyx,nyx->n", centred, centred, dtype=np.float64) / x[0].size


def truth_score(images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, " n"]:
    """Score images by the formula of this module.

    Args:
        images: RGB, 0..255, any size from 3x3 pixels.

    Returns:
        float64 ``(n,)``; mean 0 and standard deviation 1 on training scenes, higher is better.

    >>> grey = np.full((1, 64, 64, 3), 128, np.uint8)
    >>> bool(truth_score(grey)[0] < -1)
    True
    """
    terms = truth_terms(images)
    weighted = [w * (terms[name] - MEAN[name]) / SD[name] for name, w in WEIGHTS.items()]
    return np.sum(weighted, axis=0) / SCALE


def rating(truth: Float[np.ndarray, " n"] | float, rng: np.random.Generator) -> NDArray[np.int64] | np.int64:
    """Draw one crowd vote, 1..10, on images of this truth score.

    The noise is to be that of Simulacra Aesthetic Captions (SAC; Pressman, Crowson et al. 2022).  What its
    README says: 1..10 votes by users of a Discord bot, over 176,000 votes beside over
    238,000 images, so more than one vote on an image is the exception; users "grade on a curve", some vote
    down what frightens or displeases them, some ignore the instructions.  It gives no agreement between
    voters, so the noise level here is an **assumption**, bracketed by two sets that have many votes an image
    (correlation of a single vote with the image's mean vote, ``s_between / sqrt(s_between^2 + s_within^2)``):

    * AGIQA-3K, laboratory votes, normalised by voter: 0.84 over all generators, 0.73 within Stable Diffusion
      1.5 (computed from its table of means and standard deviations).
    * AVA, web votes 1..10: mean about 5.4, s_within about 1.4, s_between about 0.7, hence about 0.45 (rounded
      figures of the literature, not computed here).

    SAC is web votes of single users, without normalisation, on images of very different quality: 0.55 is
    assumed, with a mean of 5.6 and a standard deviation of 2.3 (assumed too: a 1..10 scale used almost fully,
    leaning to its upper half); measured on 4,000 training scenes: 0.555, 5.64, 2.31.  Noise is Gaussian with
    one variance; the biases of single voters are part of it.

    Args:
        truth: Truth scores.
        rng: Source of the noise; the same generator state gives the same votes.

    Returns:
        Integers 1..10 of the shape of ``truth``.
    """
    value = np.asarray(truth, np.float64)
    vote = VOTE_MEAN + VOTE_SLOPE * value + VOTE_NOISE * rng.standard_normal(value.shape)
    return np.clip(np.rint(vote), 1, 10).astype(np.int64)


def main(n: int = 4000) -> None:
    """Print the constants of this module, computed on ``n`` training scenes (half a minute for 4,000)."""
    from tqdm.auto import tqdm

    from guidance.testbed.render import render
    from guidance.testbed.scenes import scenes

    images = np.stack([render(s) for s in tqdm(scenes("train", n), total=n, desc="render scenes")])
    terms = truth_terms(images)
    z = {name: (v - v.mean()) / v.std() for name, v in terms.items()}
    total = sum(w * z[name] for name, w in WEIGHTS.items())
    print("MEAN =", {name: float(f"{v.mean():.5g}") for name, v in terms.items()})
    print("SD =", {name: float(f"{v.std():.5g}") for name, v in terms.items()})
    print("SCALE =", float(f"{total.std():.5g}"))
    shares = {name: round(float(w * np.mean(z[name] * total) / total.var()), 3) for name, w in WEIGHTS.items()}
    print("shares of the variance:", shares)


if __name__ == "__main__":
    main()
