"""Layer numbers of parameters, and the learning rates that follow from them."""

import pytest
import timm

from iwm_fast.evals.finetuning.layer_decay import head_layer_index, layer_index, timm_layer_scales


def test_encoder_layers_are_numbered_from_the_patches_to_the_head():
    names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "norm.weight"]
    assert [layer_index(f"encoder.{name}", 12) for name in names] == [0, 1, 12, 12]
    assert layer_index("head.linear.weight", 12) == head_layer_index(12) == 13


def test_predictor_layers_are_numbered_after_the_encoder_layers():
    layers = {
        "encoder.patch_embed.proj.bias": 0,
        "encoder.blocks.3.norm1.weight": 4,
        "encoder.norm.bias": 4,
        "predictor.embed.weight": 5,
        "predictor.mask_token": 5,
        "predictor.mixer.layers.0.weight": 5,
        "predictor.blocks.0.norm1.bias": 6,
        "predictor.blocks.1.attn.proj.weight": 7,
        "predictor.norm.weight": 7,
        "predictor.project.weight": 7,
        "head.query": 8,
    }
    assert {name: layer_index(name, 4, 2) for name in layers} == layers
    assert head_layer_index(4, 2) == 8


@pytest.mark.parametrize(("depth", "predictor_depth"), [(12, None), (12, 18)])
def test_layer_numbers_have_no_gaps(depth, predictor_depth):
    names = ["encoder.patch_embed.w", *(f"encoder.blocks.{n}.w" for n in range(depth)), "encoder.norm.w"]
    if predictor_depth:
        names += ["predictor.embed.w", *(f"predictor.blocks.{n}.w" for n in range(predictor_depth)), "predictor.norm.w"]
    layers = [layer_index(name, depth, predictor_depth) for name in [*names, "head.w"]]
    assert layers == sorted(layers) and set(layers) == set(range(head_layer_index(depth, predictor_depth) + 1))


def test_layers_below_the_head_are_the_same_as_in_timm():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg", fc_norm=False)
    scales = timm_layer_scales(vit, 0.5)
    for name, (scale, decays) in scales.items():
        # Position embeddings are constants in our encoder.
        if name != "pos_embed":
            assert 0.5 * scale == 0.5 ** (head_layer_index(12) - layer_index(f"encoder.{name}", 12)), name
        assert decays == (vit.get_parameter(name).ndim > 1 and name != "pos_embed"), name
