"""Run in a process without jaxtyping's checks, which no compiler follows: the fused model as one graph."""

import json

import torch

from iwm_fast.commands.compile_kernels import noise
from iwm_fast.config.run import EncoderConfig, ModelConfig, PredictorConfig, RunConfig
from iwm_fast.kernels.ops import FUSED
from iwm_fast.models.student import build_student
from iwm_fast.pipelines.config import ViewConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def compare(conditioning: str) -> float:
    """Return by how much the compiled model's predictions and gradients differ from the eager one's."""
    encoder = EncoderConfig(dim=64, depth=1, num_heads=2, patch_size=4)
    predictor = PredictorConfig(dim=32, depth=1, num_heads=1, conditioning=conditioning)
    views = ViewConfig(size=16, blur_sigma=(0.1, 1.0))
    config = RunConfig(views=views, model=ModelConfig(encoder=encoder, predictor=predictor))
    batch, student = noise(config, DEVICE), build_student(config, FUSED).to(DEVICE)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)
    found = []
    for model in (compiled, student):
        out = model(batch).predicted_tokens
        found.append([out, *torch.autograd.grad(out.square().sum(), list(student.parameters()))])
    return max(float((one - other).detach().abs().max()) for one, other in zip(*found, strict=True))


if __name__ == "__main__":
    print(json.dumps({conditioning: compare(conditioning) for conditioning in ("feature", "sequence", "none")}))
