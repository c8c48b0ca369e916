"""Print how far the compiled fused model is from the eager one, without jaxtyping's checks: they cannot be traced."""

import json

import torch

from iwm_fast.commands.compile_kernels import random_batch
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.ops import FUSED
from iwm_fast.models.student import build_student
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def max_difference(conditioning: str) -> float:
    """Return the largest difference between predictions and gradients of the compiled and the eager model."""
    encoder = EncoderConfig(dim=64, depth=1, num_heads=2, patch_size=4)
    predictor = PredictorConfig(dim=32, depth=1, num_heads=1, conditioning=conditioning)
    views = ViewConfig(size=16, blur=Blur(sigma=(0.1, 1.0)))
    config = RunConfig(views=views, model=ModelConfig(encoder=encoder, predictor=predictor))
    batch, student = (
        random_batch(config, DEVICE, num_context=(7, 12), num_targets=(9, 4)),
        build_student(config, FUSED).to(DEVICE),
    )
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    results = []
    for model in (compiled, student):
        out = model(batch).predicted_tokens
        results.append([out, *torch.autograd.grad(out.square().sum(), list(student.parameters()))])
    return max(float((actual - expected).detach().abs().max()) for actual, expected in zip(*results, strict=True))


if __name__ == "__main__":
    print(json.dumps({conditioning: max_difference(conditioning) for conditioning in ("feature", "sequence", "none")}))
