import torch

from iwm_fast.evals.planning.ridge import ridge


def examples(num: int, noise: float, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num, 8, generator=generator) * torch.logspace(-2, 2, 8) + 50
    weight = torch.randn(8, 2, generator=torch.Generator().manual_seed(9)) / torch.logspace(-2, 2, 8)[:, None]
    answers = (features - 50) @ weight + 3
    return features, answers + noise * torch.randn(num, 2, generator=generator)


def test_a_linear_relation_is_found_whatever_the_features_scales_and_offsets():
    known, asked = examples(200, 0.0), examples(50, 0.0, seed=1)
    torch.testing.assert_close(ridge(*known, asked[0]), asked[1], atol=2e-2, rtol=1e-3)


def test_each_answer_has_a_penalty_of_its_own__noise_is_answered_by_its_mean():
    features, answers = examples(100, 0.0)
    noise = torch.randn(100, 1, generator=torch.Generator().manual_seed(2))
    found = ridge(features, torch.cat([answers[:, :1], noise], dim=1), features)
    assert (found[:, 0] - answers[:, 0]).abs().max() < 0.1
    assert found[:, 1].std() < 0.4 * noise.std()


def test_more_features_than_examples_and_constant_features_are_fine():
    features = torch.randn(10, 40)
    features[:, 3] = 7.0
    assert torch.isfinite(ridge(features, torch.randn(10, 1), features)).all()
