import math

import pytest
import torch

from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.layers import (
    Block,
    Blocks,
    ResidualNorm,
    compile_blocks,
    initialize_,
    set_drop_path_,
    sincos_positions,
)


def build(seed=0, depth=3):
    stack = torch.nn.ModuleList(Block(32, 4, 4.0, REFERENCE) for _ in range(depth))
    initialize_(stack, torch.Generator().manual_seed(seed))
    return stack


def test_positions_follow_the_formula():
    dim, grid, row, column = 16, 5, 3, 2
    actual = sincos_positions(dim, grid)[row * grid + column]
    frequencies = [10000 ** (-i / 4) for i in range(4)]
    functions = (math.sin, math.cos)
    expected = [function(at * w) for at in (column, row) for function in functions for w in frequencies]
    torch.testing.assert_close(actual, torch.tensor(expected))


@pytest.mark.parametrize("limit", [8, 64])
def test_more_versions_of_a_block_than_dynamo_allows_by_default_are_compiled(limit):
    with torch._dynamo.config.patch(recompile_limit=limit):
        compile_blocks(torch.nn.Linear(1, 1))
        assert torch._dynamo.config.recompile_limit == max(limit, 32)


def test_dynamo_does_not_split_blocks_under_ddp():
    with torch._dynamo.config.patch(optimize_ddp=True):
        compile_blocks(torch.nn.Linear(1, 1))
        assert torch._dynamo.config.optimize_ddp is False


def test_positions_of_different_patches_differ():
    assert len(sincos_positions(16, 6).unique(dim=0)) == 36


def test_positions_need_a_multiple_of_four():
    with pytest.raises(ValueError, match=r"multiple of 4.*got 6"):
        sincos_positions(6, 2)


def test_initial_weights_depend_on_the_generator_only():
    torch.manual_seed(1)
    first = build(seed=5).state_dict()
    torch.manual_seed(2)
    second, other = build(seed=5).state_dict(), build(seed=6).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["0.attn.qkv.weight"], other["0.attn.qkv.weight"])


def test_only_residual_projections_shrink_with_depth():
    std = 0.02 * math.sqrt(768 / 32)
    for layer, block in enumerate(build(), start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.detach().std().item() == pytest.approx(std / math.sqrt(2 * layer), rel=0.1)
        for weight in (block.attn.qkv.weight, block.mlp.fc1.weight):
            assert weight.detach().std().item() == pytest.approx(std, rel=0.1)
        assert block.norm1.weight.eq(1).all() and block.attn.qkv.bias.eq(0).all()


@pytest.mark.parametrize("dim", [96, 768])
def test_a_layer_preserves_the_size_of_signals_at_any_width(dim):
    linear = torch.nn.Linear(dim, 4 * dim)
    initialize_(linear, torch.Generator().manual_seed(0))
    output = linear(torch.randn(256, dim, generator=torch.Generator().manual_seed(1)))
    assert output.std().item() == pytest.approx(0.02 * math.sqrt(768), rel=0.05)


NINE = Sequences.of_equal_length(9)


def run(stack, tokens, sequences):
    """Return the residual stream after all blocks, with the last update added."""
    update = None
    for block in stack:
        tokens, update = block(tokens, update, sequences)
    return tokens + update


def random_tokens(rows=9):
    return torch.randn(rows, 32, generator=torch.Generator().manual_seed(0))


def test_blocks_work_on_each_packed_sequence_alone():
    stack, tokens = build(), random_tokens()
    packed = run(stack, tokens, Sequences(torch.tensor([0, 4, 4, 9], dtype=torch.int32), 0, 5))
    alone = torch.cat(
        [run(stack, tokens[:4], Sequences.of_equal_length(4)), run(stack, tokens[4:], Sequences.of_equal_length(5))]
    )
    torch.testing.assert_close(packed, alone)


def test_a_deferred_update_is_bit_equal_to_one_added_before():
    (_, block), tokens, update = build(depth=2), random_tokens(), random_tokens().flip(0)
    deferred = block(tokens, update, NINE)
    added = block(tokens + update, None, NINE)
    assert all(torch.equal(*pair) for pair in zip(deferred, added, strict=True))


def test_a_norm_returns_the_sum_and_its_norm():
    norm, tokens, update = ResidualNorm(32, REFERENCE), random_tokens(), random_tokens().flip(0)
    total, normed = norm(tokens, update)
    assert torch.equal(total, tokens + update)
    torch.testing.assert_close(normed, torch.nn.LayerNorm(32, eps=1e-6)(tokens + update))


def test_every_sum_is_normalised_in_the_same_pass():
    widths = []

    def counting_residual_norm(x, residual, weight, bias, eps):
        widths.append(x.shape[-1])
        return REFERENCE.residual_norm(x, residual, weight, bias, eps)

    ops = REFERENCE._replace(residual_norm=counting_residual_norm)
    run([Block(32, 4, 4.0, ops) for _ in range(3)], random_tokens(), NINE)
    # Two in each block, except that the first block starts without an update.
    assert widths == [32] * 5


FOUR_AND_FIVE = Sequences(torch.tensor([0, 4, 9], dtype=torch.int32), 4, 5)


def build_blocks(depth=3, *, rate=0.0, recompute=False):
    stack = Blocks(build(depth=depth), recompute=recompute)
    set_drop_path_(torch.nn.Sequential(stack), rate)
    return stack


def complete_stream(stack, sequences=FOUR_AND_FIVE):
    """Return the residual stream after a stack of blocks, with the last update added."""
    tokens, update = stack(random_tokens(), sequences)
    return tokens + update


def test_frozen_blocks_are_not_dropped():
    stack = build_blocks()
    undropped = complete_stream(stack)
    stack[:2].requires_grad_(False)
    set_drop_path_(torch.nn.Sequential(stack), 0.9)
    assert stack.num_frozen == 2 and not torch.equal(complete_stream(stack), undropped), "the last block is dropped"
    stack.requires_grad_(False)
    set_drop_path_(torch.nn.Sequential(stack), 0.9)
    assert torch.equal(complete_stream(stack), undropped)


def test_without_drop_path_or_in_evaluation_nothing_is_drawn():
    training, evaluated = build_blocks(), build_blocks(rate=0.9).eval()
    state = torch.get_rng_state()
    undropped = complete_stream(training)
    assert torch.equal(complete_stream(evaluated), undropped)
    assert torch.equal(run(training, random_tokens(), FOUR_AND_FIVE), undropped)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(complete_stream(evaluated.train()), undropped)


def test_drop_path_drops_updates_by_image_and_scales_the_others():
    # Of two blocks, only the last one drops updates. At a rate of 0.5, each update of an image is doubled or dropped.
    first, last = stack = build_blocks(depth=2, rate=0.5)
    tokens, update = first(random_tokens(), None, FOUR_AND_FIVE)
    before = tokens + update
    attended = last.attn(last.norm1(before, None)[1], FOUR_AND_FIVE)
    expected = {}
    for attention in (0, 2):
        middle = before + attention * attended
        for mlp in (0, 2):
            expected[attention, mlp] = middle + mlp * last.mlp(last.norm1.residual_norm(
                attention * attended, before, last.norm2.weight, last.norm2.bias, 1e-6)[1])  # fmt: skip
    outcomes = set()
    for seed in range(40):
        torch.manual_seed(seed)
        total = complete_stream(stack)
        for rows in (slice(0, 4), slice(4, 9)):
            close = [pair for pair, value in expected.items() if torch.allclose(total[rows], value[rows], atol=1e-5)]
            assert len(close) == 1
            outcomes.add((rows.start, *close[0]))
    assert len(outcomes) == 8, "images and updates must be drawn independently"


def test_drop_path_rises_linearly_and_preserves_the_mean_update():
    stack = build_blocks(depth=5, rate=0.4)
    torch.manual_seed(0)
    scales = stack._draw_scales(torch.zeros(40_000, 32), Sequences.of_equal_length(2))
    assert scales.shape == (5, 2, 40_000)
    assert torch.equal(scales[:, :, 0::2], scales[:, :, 1::2]), "tokens of an image must have the same factor"
    torch.testing.assert_close(
        (scales == 0).float().mean((1, 2)), torch.tensor([0, 0.1, 0.2, 0.3, 0.4]), atol=0.01, rtol=0
    )
    torch.testing.assert_close(scales.mean((1, 2)), torch.ones(5), atol=0.02, rtol=0)


def test_recomputed_blocks_drop_the_same_paths_again():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        stack = build_blocks(rate=0.5, recompute=recompute)
        complete_stream(stack).square().sum().backward()
        grads.append([parameter.grad for parameter in stack.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert any((grad != 0).any() for grad in grads[0])
