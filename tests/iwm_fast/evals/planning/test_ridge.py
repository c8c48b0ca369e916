import torch

from iwm_fast.evals.planning.ridge import ridge


def examples(num: int, noise: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, 8, generator=generator) * torch.logspace(-2, 2, 8) + 50
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(9)) / torch.logspace(-2, 2, 8)[:, None]
    targets = (features - 50) @ weight + 3
    return features, targets + noise * torch.randn(num, 2, generator=generator)


def test_a_linear_relation_is_learnt_at_any_scale_and_offset_of_features():
    train, val = examples(200, 0.0), examples(50, 0.0, seed=1)
    torch.testing.assert_close(ridge(*train, val[0]), val[1], atol=2e-2, rtol=1e-3)


def test_each_target_has_its_own_penalty__noise_is_predicted_by_its_mean():
    features, targets = examples(100, 0.0)
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(2))
    predicted = ridge(features, torch.cat([targets[:, :1], noise], dim=1), features)
    assert (predicted[:, 0] - targets[:, 0]).abs().max() < 0.1
    assert predicted[:, 1].std() < 0.4 * noise.std()


def test_degenerate_features_give_finite_predictions():
    features = torch.randn(10, 40)
    features[:, 3] = 7.0
    assert torch.isfinite(ridge(features, torch.randn(10, 1), features)).all()
