import torch

from kernels.residual_norm import residual_norm_reference


def draw(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in ((5, 8), (5, 8), (8,), (8,))]


def test_sum_and_norm_follow_the_formula():
    x, residual, weight, bias = draw()
    total, normed = residual_norm_reference(x, residual, weight, bias, 1e-6)
    centred = total - total.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight + bias
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, wanted, rtol=1e-12, atol=1e-12)


def test_a_bfloat16_update_leaves_the_stream_in_float32():
    x, residual, weight, bias = draw(torch.float32)
    total, normed = residual_norm_reference(x.bfloat16(), residual, weight, bias, 1e-6)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, x.bfloat16().float() + residual)


def test_gradient_matches_finite_differences():
    inputs = [tensor.requires_grad_() for tensor in draw()]
    assert torch.autograd.gradcheck(lambda *x: residual_norm_reference(*x, 1e-6), inputs)
