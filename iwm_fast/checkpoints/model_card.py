"""The model card of an export, its README.md: what the model is, how to use it, how it was trained and measured."""

from typing import Any

# The Hugging Face Hub reads these lines. A licence is the publisher's choice.
_FRONT_MATTER = """---
# license: name it here when you publish these weights
library_name: timm
pipeline_tag: image-feature-extraction
tags:
- timm
- image-feature-extraction
- image-world-model
- jepa
- iwm-fast
---"""
# Metrics that describe the result of training; the others describe its schedules and speed.
_RESULT_PREFIXES = ("loss/", "monitor/", "eval/")


def model_card(description: dict[str, Any], evaluations: dict[str, dict[str, Any]], last_row: dict[str, Any]) -> str:
    """Return the text of the model card, in Markdown.

    Args:
        description: the content of the export's iwm.json.
        evaluations: the run's evaluation results, by file name without ending.
        last_row: the last row of the run's metrics.jsonl up to the exported step; empty if there is none.
    """
    model = description["settings"]["model"]
    encoder, predictor = model["encoder"], model["predictor"]
    world = f" and a {predictor['depth']} x {predictor['dim']} world model" if predictor["depth"] else ""
    sections = [
        _FRONT_MATTER,
        f"# ViT {encoder['depth']} x {encoder['dim']}, patches of {encoder['patch_size']}{world}",
        _summary(description),
        "## Use\n\n" + _usage(description),
        "## Training\n\n" + _training_table(description),
        "## Measured\n\n" + _results_table(description["step"], evaluations, last_row),
        "## Licence\n\nNot stated yet: name it here when you publish these weights.",
    ]
    if predictor["depth"]:
        # After the front matter, the title, the summary and the usage.
        sections.insert(4, "## The action\n\n" + _action_table(description["action"]))
    return "\n\n".join(sections) + "\n"


def _summary(description: dict[str, Any]) -> str:
    counts = {name: f"{count / 1e6:.1f} M" for name, count in description["num_parameters"].items()}
    world = (
        "The predictor is included: from an image's tokens and a description of a change (the action), it predicts the "
        "tokens of the changed image."
        if "predictor" in counts
        else "It was trained with the identity predictor, for invariant features; there is no world model to include."
    )
    files = [
        f"`model.safetensors`: the EMA teacher, {counts['encoder']} parameters, recommended for downstream use",
        f"`trained_encoder.safetensors`: the encoder trained by gradient descent, {counts['encoder']} parameters",
    ]
    if "predictor" in counts:
        files.append(f"`predictor.safetensors`: the world model, {counts['predictor']} parameters")
    if description["pixel_decoder"] is not None:
        files.append("`pixel_decoder.safetensors`: a decoder from tokens to pixels, to look at tokens and predictions")
    files += ["`config.json`: what timm needs to build the encoder", "`iwm.json`: everything else, for iwm-fast"]
    return (
        f"An Image World Model (arXiv 2403.00504), trained with iwm-fast for {description['step']:,} steps. {world}\n\n"
        + "\n".join(f"- {line}" for line in files)
    )


def _usage(description: dict[str, Any]) -> str:
    size, dim = description["settings"]["views"]["size"], description["settings"]["model"]["encoder"]["dim"]
    mean, std = (", ".join(map(str, description[name])) for name in ("pixel_mean", "pixel_std"))
    text = (
        f"Images are {size} x {size}, RGB in 0..1, minus the mean ({mean}), divided by the standard deviation ({std}). "
        "With timm alone, in this folder (or as `hf-hub:OWNER/NAME`, once it is on the Hugging Face Hub):\n\n"
        "```python\nimport timm, torch\n"
        'encoder = timm.create_model("local-dir:.", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))  # of PIL images\n"
        f"features = encoder(torch.randn(1, 3, {size}, {size}))  # (1, {dim}), the mean over patches\n```"
    )
    if description["predictor"] is None:
        return text
    return (
        f"{text}\n\nThe world model, with iwm-fast:\n\n"
        "```python\nimport iwm_fast\n"
        'model = iwm_fast.load(".")\n'
        f'tokens = model.encode("photo.jpg")  # (1, patches, {dim})\n'
        f"action = model.action({description['action'][0]['name']}=0.5)\n"
        f'imagined = model.predict("photo.jpg", action)  # (1, patches, {dim})\n```'
    )


def _action_table(entries: list[dict[str, Any]]) -> str:
    rows = [f"| {number} | {entry['name']} | {entry['one_means']} |" for number, entry in enumerate(entries)]
    head = "If all entries are zero, nothing changes.\n\n| index | entry | a value of 1 means |\n| --- | --- | --- |\n"
    return head + "\n".join(rows)


def _training_table(description: dict[str, Any]) -> str:
    settings, data = description["settings"], description["data"]
    optim, views, mask = (settings[name] for name in ("optim", "views", "mask"))
    rows = {
        "images": f"{data['num_samples']:,}, content SHA-256 {data['content_digest']}",
        "epochs, global batch": f"{optim['epochs']:g}, {optim['global_batch_size']}",
        "learning rate": f"{optim['lr_start']:g} to {optim['lr']:g} over {optim['warmup_epochs']:g} epochs, then a "
        f"cosine to {optim['lr_end']:g}",
        "weight decay, EMA": " and ".join(f"{optim[name][0]:g} to {optim[name][1]:g}" for name in
                                          ("weight_decay", "teacher_momentum")),
        "precision": optim["precision"],
        "image size": _sizes(description["trained_size"], views["size"]),
        **{f"views.{name}": _settings(group) for name, group in views.items() if _is_on(group)},
        "target patches": f"{mask['num_target_blocks']} blocks of {100 * mask['block_scale'][0]:g}-"
        f"{100 * mask['block_scale'][1]:g} % of the patches",
        "versions": ", ".join(f"{name} {version}" for name, version in description["versions"].items()),
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"`iwm.json` lists all settings.\n\n| setting | value |\n| --- | --- |\n{table}"


def _sizes(trained: int, exported: int) -> str:
    recomputed = f"; positions are recomputed for {exported} x {exported}" if exported != trained else ""
    return f"{trained} x {trained}{recomputed}"


def _is_on(group: Any) -> bool:
    """Return whether these are the settings of a transformation that training applied."""
    return isinstance(group, dict) and group.get("probability", 1) > 0


def _settings(group: dict[str, Any]) -> str:
    texts = {name: "to".join(f" {x:g} " for x in value).strip() if isinstance(value, list) else value
             for name, value in group.items() if value is not None}  # fmt: skip
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in texts.items())


def _results_table(step: int, evaluations: dict[str, dict[str, Any]], last_row: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['subject']}, {row['metric']}", row["value"], result["step"])
        for name, result in sorted(evaluations.items())
        for row in result["rows"]
    ]
    rows += [
        ("training", key, value, last_row["step"])
        for key, value in last_row.items()
        if isinstance(value, int | float) and key.startswith(_RESULT_PREFIXES)
    ]
    if not rows:
        return "The run was not evaluated before the export."
    lines = [f"| {name} | {key} | {value:.4g} | {at} |" for name, key, value, at in rows]
    head = "| evaluation | metric | value | step |\n| --- | --- | --- | --- |\n"
    return f"The weights are those of step {step}.\n\n{head}" + "\n".join(lines)
