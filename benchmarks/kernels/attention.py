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
            compare(session, [length] * images, head_dim)
        generator = random.Random(0)
        compare(session, [generator.randint(SHORTEST, LONGEST) for _ in range(256)], head_dim)
    new_lengths(session, 64, 50 if session.is_quick else 200)


def compare(session: Session, lengths: list[int], head_dim: int, num_heads: int = NUM_HEADS) -> None:
    """Measure sequences of these lengths: as a dense batch if all have the same, packed otherwise."""
    shortest, longest = min(lengths), max(lengths)
    is_dense = shortest == longest
    span = longest if is_dense else f"{shortest}-{longest}"
    shape = {"N": span, "d": head_dim, "H": num_heads, "B": len(lengths)}
    costs = attention_costs(lengths, num_heads, head_dim)
    case = Case("attention" if is_dense else "packed attention", shape, costs=costs)
    if not session.has_time(case):
        return
    qkv, d_out = attention_baselines.inputs(sum(lengths), num_heads, head_dim, session.device)
    if is_dense:
        providers = attention_baselines.dense_providers(qkv, longest, d_out)
    else:
        offsets = offsets_of(lengths, session.device)
        providers = attention_baselines.packed_providers(qkv, offsets, longest, d_out)
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
    names, pick = ("out", "d_qkv"), lambda tensor: tensor[rows]
    is_able = session.check(case, names, fused=fused, plain=plain, exact=exact, rows=pick)
    return providers if is_able else providers[1:]
