"""The pixel decoder puts patches where the encoder takes them from, and returns colours from 0 to 1."""

from dataclasses import replace

import pytest
import torch

from iwm_fast.config.finetuning import PixelDecoderConfig
from iwm_fast.models.pixel_decoder import PixelDecoderSpec, build_pixel_decoder

GRID, PATCH = 3, 4
DIM = 3 * PATCH**2
SPEC = PixelDecoderSpec(
    decoder=PixelDecoderConfig(dim=16, depth=1, num_heads=2), step=7, token_dim=DIM, grid=GRID, patch_size=PATCH,
    pixel_mean=(0.5, 0.4, 0.3), pixel_std=(0.2, 0.3, 0.4),
)  # fmt: skip
LINEAR = replace(SPEC, decoder=replace(SPEC.decoder, depth=0))


def patches_of(images):
    """Return the pixels of each patch in the order of a convolution's weights, as the encoder embeds them."""
    return torch.nn.functional.unfold(images, PATCH, stride=PATCH).transpose(1, 2)


def test_tokens_that_are_the_pixels_of_their_patches_give_the_image():
    images = torch.rand(2, 3, GRID * PATCH, GRID * PATCH)
    decoder = build_pixel_decoder(LINEAR, seed=0)
    with torch.no_grad():
        decoder.to_pixels.weight.copy_(torch.eye(DIM))
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPEC.pixel_mean, SPEC.pixel_std))
    tokens = patches_of((images - mean) / std)
    torch.testing.assert_close(decoder.decode(tokens), images)
    # Colours that do not exist are clamped.
    torch.testing.assert_close(decoder.decode(tokens + 2 / std.min()), torch.ones_like(images))


@pytest.mark.parametrize(("spec", "num_changed"), [(LINEAR, 1), (SPEC, GRID**2)])
def test_a_token_reaches_its_own_patch_only_in_a_linear_decoder(spec, num_changed):
    decoder, tokens = build_pixel_decoder(spec, seed=0), torch.randn(1, GRID**2, DIM)
    moved = tokens.clone()
    moved[0, 4] += 1
    is_changed = patches_of(decoder(tokens) - decoder(moved)).abs().amax(dim=2)[0] > 1e-6
    assert is_changed[4] and is_changed.sum() == num_changed


def test_positions_tell_patches_with_equal_tokens_apart():
    patches = patches_of(build_pixel_decoder(SPEC, seed=0)(torch.ones(1, GRID**2, DIM)))
    assert (patches[:, :1] - patches[:, 1:]).abs().amax(dim=2).min() > 1e-4


def test_initial_weights_depend_on_the_seed_only():
    first, again, other = (build_pixel_decoder(SPEC, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["to_pixels.weight"], other["to_pixels.weight"])


@pytest.mark.parametrize("shape", [(1, GRID**2 - 1, DIM), (1, GRID**2, DIM + 1)])
def test_tokens_of_another_run_are_refused(shape):
    with pytest.raises(ValueError, match=r"tokens must have the shape \(B, 9, 48\)"):
        build_pixel_decoder(SPEC, seed=0).decode(torch.zeros(shape))
