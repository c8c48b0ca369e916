import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from iwm_fast.config.run import EncoderConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import initialize_

TIMM_ARGUMENTS = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}


def build(image_size=16, **sizes):
    defaults = {"dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4}
    encoder = Encoder(EncoderConfig(**(defaults | sizes)), image_size, REFERENCE)
    initialize_(encoder, torch.Generator().manual_seed(0))
    return encoder


def random_images(num_images=3, size=16):
    return torch.randn(num_images, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_same_features(encoder, timm_encoder, images):
    # Initial weights of 0.02 make blocks almost linear, which would hide a wrong activation or epsilon.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(2.0)
    timm_encoder.load_state_dict(encoder.state_dict(), strict=True)
    with torch.no_grad():
        pooled = encoder(images, None).unflatten(0, (len(images), -1)).mean(1)
        torch.testing.assert_close(pooled, timm_encoder.eval()(images), atol=1e-5, rtol=1e-4)


def test_a_small_encoder_is_timms_vision_transformer():
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 4, "img_size": 16}
    assert_same_features(build(), VisionTransformer(**sizes, **TIMM_ARGUMENTS), random_images())


def test_vit_small_loads_strictly_into_timm_with_the_same_features():
    encoder = build(224, dim=384, depth=12, num_heads=6, patch_size=16)
    assert_same_features(encoder, timm.create_model("vit_small_patch16_224", **TIMM_ARGUMENTS), random_images(1, 224))


def test_patches_are_embedded_as_by_a_convolution(ragged):
    encoder, images = build(), random_images()
    index = ragged([[5, 0], [], [15, 3, 8]])
    convolved = encoder.patch_embed.proj(images).flatten(2).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(encoder.patch_embed(images, None), convolved)
    torch.testing.assert_close(encoder.patch_embed(images, index), convolved[index.row])


def test_an_index_of_all_patches_equals_no_index(ragged):
    encoder, images = build(), random_images()
    index = ragged([range(16)] * 3)
    torch.testing.assert_close(encoder(images, index), encoder(images, None))


def test_packed_images_equal_one_image_at_a_time(ragged):
    encoder, images = build(), random_images()
    patches = [[5, 0], [7], [15, 3, 8]]
    alone = [encoder(images[i : i + 1], ragged([patches[i]])) for i in range(3)]
    torch.testing.assert_close(encoder(images, ragged(patches)), torch.cat(alone))


def test_order_of_patches_does_not_matter(ragged):
    encoder, images = build(), random_images(1)
    forward, backward = encoder(images, ragged([[1, 6, 9]])), encoder(images, ragged([[9, 6, 1]]))
    torch.testing.assert_close(forward.flip(0), backward)


def test_hidden_patches_do_not_reach_the_tokens(ragged):
    encoder, images = build(), random_images(1).requires_grad_()
    encoder(images, ragged([[0, 6]])).square().sum().backward()
    per_patch = images.grad.unfold(2, 4, 4).unfold(3, 4, 4).abs().sum((0, 1, 4, 5)).flatten()
    assert per_patch.nonzero().flatten().tolist() == [0, 6]


def test_a_wrong_image_size_is_refused_with_both_sizes():
    with pytest.raises(ValueError, match=r"16 x 16 pixels, got 20 x 20"):
        build()(random_images(1, 20), None)
