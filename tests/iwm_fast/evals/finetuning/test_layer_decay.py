"""Which layer learns how fast."""

import pytest
import timm

from iwm_fast.evals.finetuning.layer_decay import layer_of, timm_scales, top_layer


def test_layers_of_an_encoder_rise_from_the_patches_to_the_head():
    names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.11.mlp.fc2.bias", "norm.weight"]
    assert [layer_of(f"encoder.{name}", 12) for name in names] == [0, 1, 12, 12]
    assert layer_of("head.linear.weight", 12) == top_layer(12) == 13


def test_layers_of_encoder_and_predictor_stand_one_above_the_other():
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
    assert {name: layer_of(name, 4, 2) for name in layers} == layers
    assert top_layer(4, 2) == 8


@pytest.mark.parametrize("arm", [(12, None), (12, 18)])
def test_no_layer_is_left_out_on_the_way_up(arm):
    depth, predictor_depth = arm
    names = ["encoder.patch_embed.w", *(f"encoder.blocks.{n}.w" for n in range(depth)), "encoder.norm.w"]
    if predictor_depth:
        names += ["predictor.embed.w", *(f"predictor.blocks.{n}.w" for n in range(predictor_depth)), "predictor.norm.w"]
    layers = [layer_of(name, depth, predictor_depth) for name in [*names, "head.w"]]
    assert layers == sorted(layers) and set(layers) == set(range(top_layer(depth, predictor_depth) + 1))


def test_our_layers_are_timm_s_below_the_head():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=0, class_token=False, global_pool="avg", fc_norm=False)
    scales = timm_scales(vit, 0.5)
    for name, (scale, decays) in scales.items():
        # a position is a constant here, and not trained
        if name != "pos_embed":
            assert 0.5 * scale == 0.5 ** (top_layer(12) - layer_of(f"encoder.{name}", 12)), name
        assert decays == (vit.get_parameter(name).ndim > 1 and name != "pos_embed"), name
