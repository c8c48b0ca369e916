import math

import pytest
import torch

from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, initialize_, set_drop_path_, sincos_positions


def build(seed=0, depth=3):
    stack = torch.nn.ModuleList(Block(32, 4, 4.0, REFERENCE) for _ in range(depth))
    initialize_(stack, torch.Generator().manual_seed(seed))
    return stack


def test_positions_follow_the_formula_at_a_chosen_place():
    dim, grid, row, column = 16, 5, 3, 2
    got = sincos_positions(dim, grid)[row * grid + column]
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    wanted = [f(place * w) for place in (column, row) for f in (math.sin, math.cos) for w in frequencies]
    torch.testing.assert_close(got, torch.tensor(wanted))


def test_positions_of_different_patches_differ():
    assert len(sincos_positions(16, 6).unique(dim=0)) == 36


def test_positions_need_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"multiple of 4.*got 6"):
        sincos_positions(6, 2)


def test_initial_weights_depend_on_the_generator_and_on_nothing_else():
    torch.manual_seed(1)
    first = build(seed=5).state_dict()
    torch.manual_seed(2)
    second, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.attn.qkv.weight"], other["0.attn.qkv.weight"])


def test_residual_projections_shrink_with_depth_and_nothing_else_does():
    std = 0.02 * math.sqrt(768 / 32)
    for layer, block in enumerate(build(), start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.detach().std().item() == pytest.approx(std / math.sqrt(2 * layer), rel=0.1)
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert weight.detach().std().item() == pytest.approx(std, rel=0.1)
        assert block.norm1.weight.eq(1).all() and block.attn.qkv.bias.eq(0).all()


@pytest.mark.parametrize("dim", [96, 768])
def test_a_layer_passes_signals_on_in_the_same_size_at_any_width(dim):
    linear = torch.nn.Linear(dim, 4 * dim)
    initialize_(linear, torch.Generator().manual_seed(0))
    out = linear(torch.randn(256, dim, generator=torch.Generator().manual_seed(1)))
    assert out.std().item() == pytest.approx(0.02 * math.sqrt(768), rel=0.05)


def run(stack, tokens, offsets, longest):
    update = None
    for block in stack:
        tokens, update = block(tokens, update, offsets, longest)
    return tokens + update


def draw(rows=9):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))


def test_blocks_work_on_each_packed_sequence_alone():
    stack, tokens = build(), draw()
    packed = run(stack, tokens, torch.tensor([0, 4, 4, 9], dtype=torch.int32), 5)
    alone = torch.cat([run(stack, tokens[:4], None, 4), run(stack, tokens[4:], None, 5)])
    torch.testing.assert_close(packed, alone)


def test_an_update_handed_on_equals_one_added_before_bit_for_bit():
    (_, block), tokens, update = build(depth=2), draw(), draw().flip(0)
    handed_on = block(tokens, update, None, 9)
    added = block(tokens + update, None, None, 9)
    assert all(torch.equal(one, other) for one, other in zip(handed_on, added, strict=True))


def test_a_norm_is_that_of_the_sum_and_hands_the_sum_on():
    norm, tokens, update = ResidualNorm(32, REFERENCE), draw(), draw().flip(0)
    total, normed = norm(tokens, update)
    assert torch.equal(total, tokens + update)
    torch.testing.assert_close(normed, torch.nn.LayerNorm(32, eps=1e-6)(tokens + update))


def test_every_sum_of_a_stack_is_normalised_in_the_same_pass():
    widths = []

    def counted(x, residual, weight, bias, eps):
        widths.append(x.shape[-1])
        return REFERENCE.residual_norm(x, residual, weight, bias, eps)

    ops = REFERENCE._replace(residual_norm=counted)
    run([Block(32, 4, 4.0, ops) for _ in range(3)], draw(), None, 9)
    assert widths == [32] * 5  # two of each block, but the first begins without an update


PACKED = torch.tensor([0, 4, 9], dtype=torch.int32)


def blocks(depth=3, *, rate=0.0, recompute=False):
    stack = Blocks(build(depth=depth), recompute=recompute)
    set_drop_path_(torch.nn.Sequential(stack), rate)
    return stack


def finished(stack, offsets=PACKED, longest=5):
    tokens, update = stack(draw(), offsets, longest)
    return tokens + update


def test_without_drop_path_and_outside_of_training_blocks_draw_nothing_and_are_bit_equal():
    training, evaluated = blocks(), blocks(rate=0.9).eval()
    state = torch.get_rng_state()
    undropped = finished(training)
    assert torch.equal(finished(evaluated), undropped)
    assert torch.equal(run(training, draw(), PACKED, 5), undropped)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(finished(evaluated.train()), undropped)


def test_drop_path_takes_or_leaves_an_image_s_update_whole_and_grows_what_is_kept():
    # of two blocks only the last one drops: each of both updates of each image is there twice as large, or not at all
    first, last = stack = blocks(depth=2, rate=0.5)
    tokens, update = first(draw(), None, PACKED, 5)
    before = tokens + update
    attended = last.attn(last.norm1(before, None)[1], PACKED, 5)
    wanted = {}
    for attention in (0, 2):
        middle = before + attention * attended
        for mlp in (0, 2):
            wanted[attention, mlp] = middle + mlp * last.mlp(last.norm1.residual_norm(
                attention * attended, before, last.norm2.weight, last.norm2.bias, 1e-6)[1])  # fmt: skip
    found = set()
    for seed in range(40):
        torch.manual_seed(seed)
        total = finished(stack)
        for rows in (slice(0, 4), slice(4, 9)):
            close = [kind for kind, one in wanted.items() if torch.allclose(total[rows], one[rows], atol=1e-5)]
            assert len(close) == 1
            found.add((rows.start, *close[0]))
    assert len(found) == 8, "images and updates are drawn independently"


def test_drop_path_rises_linearly_and_leaves_the_mean_update():
    stack = blocks(depth=5, rate=0.4)
    torch.manual_seed(0)
    scales = stack._draw_scales(torch.zeros(40_000, 32), None, 2)
    assert scales.shape == (5, 2, 40_000)
    assert torch.equal(scales[:, :, 0::2], scales[:, :, 1::2]), "both tokens of an image share its fate"
    torch.testing.assert_close(
        (scales == 0).float().mean((1, 2)), torch.tensor([0, 0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0
    )
    torch.testing.assert_close(scales.mean((1, 2)), torch.ones(5), atol=0.02, rtol=0)


def test_recomputed_blocks_drop_the_same_paths_again():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = blocks(rate=0.5, recompute=recompute)
        finished(stack).square().sum().backward()
        grads.append([parameter.grad for parameter in stack.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert any((grad != 0).any() for grad in grads[0])
