"""Attention by all providers: dense batches of one length, and packed sequences of different lengths."""

import random

import torch
from torch import Tensor

from benchmarks.harness.providers import Provider
from benchmarks.harness.rooflines import attention_costs
from benchmarks.harness.session import Case, Session
from benchmarks.kernels import attention_baselines
from benchmarks.kernels.attention_baselines import NUM_HEADS
from benchmarks.kernels.recompilation import measure_new_lengths
from iwm_fast.kernels.ops import REFERENCE

# Images per batch and rows per image. The shapes of the goals come first, in case the time does not suffice for all.
DENSE = ((256, 196), (256, 256), (256, 212), (1024, 196), (256, 197), (256, 128), (256, 400), (256, 320), (256, 64))
DENSE_QUICK = ((256, 196), (256, 256))
HEAD_DIMS = (64, 32)
MIN_LENGTH, MAX_LENGTH = 50, 256
_NUM_CHECKED = 4
"""Sequences at either end of a batch that are also computed in float64."""


def run(session: Session) -> None:
    """Measure dense batches, packed sequences, and a new length in every call."""
    for head_dim in HEAD_DIMS[:1] if session.quick else HEAD_DIMS:
        for images, length in DENSE_QUICK if session.quick else DENSE:
            compare(session, [length] * images, head_dim)
        generator = random.Random(0)
        compare(session, [generator.randint(MIN_LENGTH, MAX_LENGTH) for _ in range(256)], head_dim)
    measure_new_lengths(session, 64, 50 if session.quick else 200)


def compare(session: Session, lengths: list[int], head_dim: int, num_heads: int = NUM_HEADS) -> None:
    """Measure sequences of these lengths: as a dense batch if all are equal, packed otherwise."""
    shortest, longest = min(lengths), max(lengths)
    is_dense = shortest == longest
    span = longest if is_dense else f"{shortest}-{longest}"
    shape = {"N": span, "d": head_dim, "H": num_heads, "B": len(lengths)}
    costs = attention_costs(lengths, num_heads, head_dim)
    case = Case("attention" if is_dense else "packed attention", shape, costs=costs)
    if not session.has_time(case):
        return
    qkv, d_out = attention_baselines.random_inputs(sum(lengths), num_heads, head_dim, session.device)
    if is_dense:
        providers = attention_baselines.dense_providers(qkv, longest, d_out)
    else:
        offsets = sequence_offsets(lengths, session.device)
        providers = attention_baselines.packed_providers(qkv, offsets, longest, d_out)
    session.measure(case, check_fused(session, case, providers, lengths))


def sequence_offsets(lengths: list[int], device: str) -> Tensor:
    """Return the row at which each sequence begins, and the total number of rows at the end."""
    return torch.tensor([0, *lengths]).cumsum(0).int().to(device)


def check_fused(session: Session, case: Case, providers: list[Provider], lengths: list[int]) -> list[Provider]:
    """Check the fused operation on the first and last sequences of the batch; return the providers that can run."""
    fused, count = providers[0], min(_NUM_CHECKED, len(lengths) // 2)
    begins, ends = sum(lengths[:count]), sum(lengths[-count:])
    rows = torch.cat([torch.arange(begins), torch.arange(sum(lengths) - ends, sum(lengths))]).to(session.device)
    checked_lengths = lengths[:count] + lengths[-count:]
    sequences = sequence_offsets(checked_lengths, session.device), max(checked_lengths)
    plain = fused.with_tensors([fused.inputs[0][rows]], [fused.d_outputs[0][rows]])
    plain = plain._replace(function=lambda qkv: REFERENCE.ragged_attention(qkv, *sequences))
    exact = plain.in_float64(plain.function)
    runs_fused = session.check(
        case, ("out", "d_qkv"), fused=fused, plain=plain, exact=exact, select=lambda tensor: tensor[rows]
    )
    return providers if runs_fused else providers[1:]
