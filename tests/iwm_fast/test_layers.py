import math

import pytest
import torch

from iwm_fast.models.layers import Block, ResidualNorm, initialize_, sincos_positions
from kernels.ops import REFERENCE


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
