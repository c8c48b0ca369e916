"""Attention from a packed qkv to its gradient, on sequences of the lengths that random masks have.

A linear layer computes queries, keys and values as one tensor. PyTorch's kernels take views of it, and autograd
combines their three gradients into one tensor; that is part of their time, as in a model.
"""

import itertools
import random
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.harness.masks import GRID, masked_batch
from benchmarks.harness.providers import Function, Provider, random_leaf
from benchmarks.harness.rooflines import attention_costs
from benchmarks.harness.session import Case, Session
from iwm_fast.kernels.attention.kernels import choose_configs
from iwm_fast.kernels.attention.op import HEAD_DIMS
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import architecture
from iwm_fast.kernels.ops import FUSED, REFERENCE
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.transforms.composition import ViewConfig

NUM_HEADS = 12
IMAGES = 256
NUM_ACTIONS = len(ViewConfig().entries)
CONTEXTS, CROPPED = "contexts", "contexts and targets, context_scale 0.85-1"
"""Names of packed sequences: the encoder's by default, and the predictor's if `mask.context_scale` is set."""
SDPA = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FA2": SDPBackend.FLASH_ATTENTION}
"""Backends of PyTorch's scaled_dot_product_attention by the names in the tables."""


def run(session: Session) -> None:
    """Time the teacher, the predictor and the encoder of the default settings, then other lengths."""
    count, heads = (2, 1) if session.device == "cpu" else (IMAGES, NUM_HEADS)
    contexts = masked_batch(count)[0].lengths
    context, target = masked_batch(count, mask=MaskConfig(context_scale=(0.85, 1.0)))
    cropped = [sum(pair) for pair in zip(context.lengths, target.lengths, strict=True)]
    teacher, predictor = ([GRID**2] * count, 64, ""), ([GRID**2] * count, 32, "")
    cases = [teacher, predictor, (contexts, 64, CONTEXTS), (cropped, 32, CROPPED)]
    if not session.quick:
        with_actions = [GRID**2 + NUM_ACTIONS] * count
        cases += [(with_actions, 32, ""), (contexts, 32, CONTEXTS), ([256] * count, 64, ""), ([256] * count, 32, "")]
    for lengths, head_dim, name in cases:
        compare(session, lengths, head_dim, name, heads)


def compare(session: Session, lengths: Sequence[int], head_dim: int, name: str, num_heads: int) -> None:
    """Check and time sequences of these lengths; packed ones have a name."""
    shape = {"N": name or lengths[0], "d": head_dim, "H": num_heads, "B": len(lengths)}
    what = "packed attention" if name else "attention"
    case = Case(what, shape, costs=attention_costs(lengths, num_heads, head_dim))
    if not session.has_time(case):
        return
    sequences = sequences_of(lengths, session.device)
    fused = make_provider(sequences, sum(lengths), (num_heads, head_dim, "bfloat16"), session.device)
    plain = fused._replace(name="varlen_attn", function=lambda qkv: REFERENCE.ragged_attention(qkv, sequences))
    peers = [plain]
    if sequences.offsets is None:
        peers = [Provider(name, with_backend(backend, plain.function), *fused[2:]) for name, backend in SDPA.items()]
    is_right = session.check(case, ("out", "d_qkv"), fused=fused, plain=plain, exact=fused.in_float64(plain.function))
    session.measure(case, [fused, *peers] if is_right else peers)


def make_provider(sequences: Sequences, rows: int, kind: tuple[int, int, str], device: str) -> Provider:
    """Return the fused attention of random rows with a random gradient; `kind` is heads, head size and dtype."""
    num_heads, head_dim, dtype = kind
    qkv = random_leaf(rows, 3, num_heads, head_dim, device=device, dtype=getattr(torch, dtype))
    d_out = torch.randn_like(qkv[:, 0]).contiguous()
    return Provider("fused", lambda qkv: FUSED.ragged_attention(qkv, sequences), (qkv,), (d_out,))


def sequences_of(lengths: Sequence[int], device: str) -> Sequences:
    """Return packed sequences of these lengths on a device."""
    return Sequences.from_lengths(torch.tensor([0, *lengths]).cumsum(0).int().to(device), lengths)


def with_backend(backend: SDPBackend, function: Function) -> Function:
    """Return a function that uses only this backend of PyTorch, and raises if the backend does not support a call."""

    def call(*inputs: Tensor) -> Tensor | Sequence[Tensor]:
        with sdpa_kernel(backend):
            return function(*inputs)

    return call


def check(session: Session) -> None:
    """Check every group of lengths on its own, all together, and equal lengths, at freshly drawn lengths."""
    rng = random.Random(time.time_ns())
    # The interpreter takes seconds for a head.
    is_trial = session.device == "cpu"
    count, num_heads = (0, 1) if is_trial else (24, NUM_HEADS)
    kinds = ((32, "float16"),) if is_trial else itertools.product(HEAD_DIMS, ("float16", "bfloat16"))
    for head_dim, dtype in kinds:
        groups = length_groups(head_dim, session.device)
        drawn = {f"{low}-{high}": [low, high, *rng.choices(range(low, high + 1), k=count)] for low, high in groups}
        longest = groups[-1][1]
        everything = [0, *itertools.chain(*drawn.values()), 0]
        equal = rng.randint(1, longest)
        for lengths in (*drawn.values(), everything):
            rng.shuffle(lengths)
        for name, lengths in (drawn | {f"0-{longest}": everything, "equal": [equal] * (count + 1)}).items():
            check_lengths(session, name, lengths, (num_heads, head_dim, dtype))


def length_groups(head_dim: int, device: str) -> list[tuple[int, int]]:
    """Return the shortest and longest length of every group that some launch computes differently."""
    configs = choose_configs(architecture(torch.device(device)), head_dim)
    splits = (split for config in configs.forward + configs.backward for split in config.key_splits)
    limits = sorted({0, *map(sum, splits)})
    return [(low + 1, high) for low, high in itertools.pairwise(limits) if high <= configs.max_length]


def check_lengths(session: Session, name: str, lengths: Sequence[int], kind: tuple[int, int, str]) -> None:
    """Compare with PyTorch's attention of one sequence after the other; `kind` is heads, head size and dtype."""
    _, head_dim, dtype = kind
    case = Case("attention at drawn lengths", {"N": name, "d": head_dim}, dtype)
    if session.is_measured(case._replace(what=f"{case.what} error")) or not session.has_time(case):
        return
    fused = make_provider(sequences_of(lengths, session.device), sum(lengths), kind, session.device)
    plain = fused._replace(name="plain", function=lambda qkv: one_by_one(qkv, lengths))
    exact = fused.in_float64(plain.function)
    is_right = False
    try:
        is_right = session.check(case, ("out", "d_qkv"), fused=fused, plain=plain, exact=exact)
    finally:
        # Also if the kernel has left the GPU unusable.
        if not is_right:
            session.record(case, "lengths", figures={"lengths": list(lengths)})


def one_by_one(qkv: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend within each sequence of (sum N, 3, H, d) by a call of its own."""
    outs = []
    for part in qkv.split(list(lengths)):
        query, key, value = part.permute(1, 2, 0, 3).unbind(0)
        outs.append(F.scaled_dot_product_attention(query, key, value).transpose(0, 1) if len(part) else part[:, 0])
    return torch.cat(outs)
