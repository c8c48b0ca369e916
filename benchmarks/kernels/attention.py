"""Attention by everybody: dense batches of one length, and packed sequences of many."""

import random

import torch
from torch import Tensor

from benchmarks.harness.providers import Provider
from benchmarks.harness.rooflines import attention_costs
from benchmarks.harness.session import Case, Session
from benchmarks.kernels import attention_baselines
from benchmarks.kernels.attention_baselines import NUM_HEADS
from benchmarks.kernels.recompilation import new_lengths
from iwm_fast.kernels.ops import REFERENCE

# images of a batch and patches or rows: what the goals are about first, should the time not suffice for all
DENSE = ((256, 196), (256, 256), (256, 212), (1024, 196), (256, 197), (256, 128), (256, 400), (256, 320), (256, 64))
QUICK_DENSE = ((256, 196), (256, 256))
HEAD_DIMS = (64, 32)
SHORTEST, LONGEST = 50, 256
_CHECKED = 4
"""Sequences at either end of a batch that are computed in float64 too."""


def run(session: Session) -> None:
    """Measure everything about attention."""
    for head_dim in HEAD_DIMS[:1] if session.is_quick else HEAD_DIMS:
        for images, length in QUICK_DENSE if session.is_quick else DENSE:
            dense(session, images, length, head_dim)
        generator = random.Random(0)
        packed(session, [generator.randint(SHORTEST, LONGEST) for _ in range(256)], head_dim)
    new_lengths(session, 64, 50 if session.is_quick else 200)


def dense(session: Session, images: int, length: int, head_dim: int, num_heads: int = NUM_HEADS) -> None:
    """Measure a batch of one length."""
    shape: dict[str, int | str] = {"N": length, "d": head_dim, "H": num_heads, "B": images}
    case = Case("attention", shape, costs=attention_costs([length] * images, num_heads, head_dim))
    if not session.has_time(case):
        return
    qkv, d_out = attention_baselines.inputs(images * length, num_heads, head_dim, session.device)
    providers = attention_baselines.dense_providers(qkv, length, d_out)
    session.measure(case, checked(session, case, providers, [length] * images))


def packed(session: Session, lengths: list[int], head_dim: int, num_heads: int = NUM_HEADS) -> None:
    """Measure packed sequences of different lengths."""
    span = f"{min(lengths)}-{max(lengths)}"
    shape: dict[str, int | str] = {"N": span, "d": head_dim, "H": num_heads, "B": len(lengths)}
    case = Case("packed attention", shape, costs=attention_costs(lengths, num_heads, head_dim))
    if not session.has_time(case):
        return
    qkv, d_out = attention_baselines.inputs(sum(lengths), num_heads, head_dim, session.device)
    providers = attention_baselines.packed_providers(qkv, offsets_of(lengths, session.device), max(lengths), d_out)
    session.measure(case, checked(session, case, providers, lengths))


def offsets_of(lengths: list[int], device: str) -> Tensor:
    """Return where each sequence begins."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def checked(session: Session, case: Case, providers: list[Provider], lengths: list[int]) -> list[Provider]:
    """Compare the fused operation on the first and last sequences of the batch, and return who takes part."""
    fused, count = providers[0], min(_CHECKED, len(lengths) // 2)
    begins, ends = sum(lengths[:count]), sum(lengths[-count:])
    rows = torch.cat([torch.arange(begins), torch.arange(sum(lengths) - ends, sum(lengths))]).to(session.device)
    chosen = lengths[:count] + lengths[-count:]
    sequences = offsets_of(chosen, session.device), max(chosen)
    some = fused.at([fused.inputs[0][rows]], [fused.d_outputs[0][rows]])
    plain = some._replace(function=lambda qkv: REFERENCE.ragged_attention(qkv, *sequences))
    exact = plain.in_double(plain.function)
    parts = {"fused": fused, "plain": plain, "exact": exact}
    is_able = session.check(case, parts, ("out", "d_qkv"), rows=lambda tensor: tensor[rows])
    return providers if is_able else providers[1:]
