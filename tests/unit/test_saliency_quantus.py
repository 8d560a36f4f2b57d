"""Scores of maps and imputed pixels like those of quantus, where it is installed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from salve.saliency import imputed, pointing_game, relevance_mass, relevance_rank

pytestmark = pytest.mark.skipif(not find_spec("quantus"), reason="quantus is not installed (pip install quantus)")


@pytest.mark.filterwarnings("ignore")
def test_scores_like_quantus() -> None:
    import quantus

    draw = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(12, 16, 16, generator=draw), torch.zeros(12, 16, 16, dtype=torch.bool)
    masks[:, 4:11, 2:14] = True
    given = {"x_batch": np.zeros((12, 1, 16, 16)), "y_batch": np.zeros(12, dtype=int), "model": None, "device": "cpu"}
    given |= {"a_batch": maps[:, None].numpy(), "s_batch": masks[:, None].numpy()}
    pairs = (
        (pointing_game, quantus.PointingGame),
        (relevance_mass, quantus.RelevanceMassAccuracy),
        (relevance_rank, quantus.RelevanceRankAccuracy),
    )
    for ours, theirs in pairs:
        wanted = theirs(abs=False, normalise=False, disable_warnings=True)(**given)
        np.testing.assert_allclose(ours(maps, masks), np.asarray(wanted, dtype=float), atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_pixels_imputed_like_quantus() -> None:
    from quantus.functions.perturb_func import noisy_linear_imputation

    draw = torch.Generator().manual_seed(0)
    image, removed = (
        torch.rand(3, 16, 16, generator=draw, dtype=torch.float64),
        torch.rand(16, 16, generator=draw) < 0.6,
    )
    wanted = noisy_linear_imputation(image.numpy(), removed.flatten().nonzero()[:, 0].numpy(), noise=0)
    np.testing.assert_allclose(imputed(image, removed, noise=0), wanted, atol=1e-12)
