"""Label-free measures of how many dimensions features use: RankMe and LiDAR."""

import torch
from jaxtyping import Float
from torch import Tensor

# Added to the diagonal of LiDAR's within-image covariance, in which a direction without variance would count most.
# The paper's delta is small and positive, and we found no value of it. Public implementations use 1e-4
# (stable-pretraining; Skean et al., arXiv 2502.02013) or 1e-6 (reptrix). It matters: on the demo's model, LiDAR is 52.4
# with 1e-4 and 57.9 with 1e-6.
_DELTA = 1e-4


@torch.no_grad()
def rank_me(features: Float[Tensor, "images D"]) -> Float[Tensor, ""]:
    """Return the effective number of dimensions that features span, from 1 to min(images, D); NaN if one is not finite.

    It is the exponential of the entropy of the normalised singular values: k for k equal ones. The features are not
    centred. The paper adds an epsilon of 1e-7 to the normalised values, to avoid the logarithm of 0. It is left out
    here: 0 * log(0) is 0, and up to 1024 dimensions, results differ by less than 0.1 %.

    Source: RankMe, arXiv 2210.02885, equation 1.
    """
    is_finite = features.isfinite().all()
    # svdvals raises if an entry is not finite.
    values = torch.linalg.svdvals(torch.where(is_finite, features, 0.0))
    return torch.where(is_finite, _effective_number(values), torch.nan)


@torch.no_grad()
def lidar(features: Float[Tensor, "images views D"]) -> Float[Tensor, ""]:
    """Return the effective number of dimensions that tell images apart, whatever their view; NaN if not finite.

    Each image with its changed views is a class of linear discriminant analysis. With the covariance B of the images'
    means and the mean covariance W of the views about them, it is the exponential of the entropy of the normalised
    eigenvalues of (W + delta)^(-1/2) B (W + delta)^(-1/2). At most min(images - 1, D). Values depend on delta (here
    1e-4) and on the numbers of images and views, so compare only those where these are equal.

    Source: LiDAR, arXiv 2312.04000, section 4; there with 1000 images of 50 views.
    """
    features = features.double()
    num_images, num_views, dim = features.shape
    if not features.isfinite().all():
        return features.new_tensor(torch.nan)
    mean = features.mean(dim=1)
    deviation = (features - mean[:, None]).flatten(0, 1)
    within = deviation.T @ deviation / (num_images * (num_views - 1))
    within += _DELTA * torch.eye(dim, dtype=within.dtype, device=within.device)
    # With the Cholesky factor L of W, the rows of L^(-1) (mean - overall mean) have the same eigenvalues.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), (mean - mean.mean(0)).T, upper=False)
    return _effective_number(torch.linalg.svdvals(whitened).square())


def _effective_number(spectrum: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    distribution = spectrum / spectrum.sum().clamp(min=1e-12)
    return torch.special.entr(distribution).sum().exp()
