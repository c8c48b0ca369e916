"""The README.md of an exported model: what it is, how it was made, what was measured, how to use it."""

from typing import Any

# numbers of metrics.jsonl that say what came out, not how the run was made
_RESULTS = ("loss/", "monitor/", "eval/")


def model_card(described: dict[str, Any], evaluations: dict[str, dict[str, Any]], last_row: dict[str, Any]) -> str:
    """Write the card.

    Args:
        described: the export's config.json.
        evaluations: results by name, as in the run's evaluations/.
        last_row: the last row of the run's metrics.jsonl up to the exported step, or nothing.
    """
    model = described["settings"]["model"]
    encoder, predictor = model["encoder"], model["predictor"]
    world = f" and a {predictor['depth']} x {predictor['dim']} world model" if predictor["depth"] else ""
    parts = [
        f"# ViT {encoder['depth']} x {encoder['dim']}, patches of {encoder['patch_size']}{world}",
        _what_it_is(described),
        "## Use\n\n" + _use(described),
        "## Training\n\n" + _training(described),
        "## Measured\n\n" + _measured(described["step"], evaluations, last_row),
        "## Licence\n\nNot stated yet: whoever publishes these weights names it here.",
    ]
    if predictor["depth"]:
        parts.insert(3, "## The action\n\n" + _actions(described["action"]))
    return "\n\n".join(parts) + "\n"


def _what_it_is(described: dict[str, Any]) -> str:
    counts = {name: f"{count / 1e6:.1f} M" for name, count in described["num_parameters"].items()}
    world = (
        "The predictor is kept: given an image's tokens and a description of a change (the action), it predicts the "
        "tokens of the changed image."
        if "predictor" in counts
        else "It was trained with the identity predictor, the invariant end; there is no world model to keep."
    )
    files = [
        f"`encoder.safetensors`: the EMA teacher, {counts['encoder']} parameters, which is what one uses",
        f"`trained_encoder.safetensors`: the encoder that was trained, {counts['encoder']} parameters",
    ]
    if "predictor" in counts:
        files.append(f"`predictor.safetensors`: the world model, {counts['predictor']} parameters")
    files.append("`config.json`: all that is needed to build them again")
    return (
        f"An Image World Model (arXiv 2403.00504), trained with iwm-fast for {described['step']:,} steps. {world}\n\n"
        + "\n".join(f"- {line}" for line in files)
    )


def _use(described: dict[str, Any]) -> str:
    size, dim = described["settings"]["views"]["size"], described["settings"]["model"]["encoder"]["dim"]
    mean, std = (", ".join(map(str, described[name])) for name in ("pixel_mean", "pixel_std"))
    text = (
        f"Images are {size} x {size}, RGB in 0..1, minus ({mean}), over ({std}). With timm alone:\n\n"
        "```python\nimport timm, torch\nfrom safetensors.torch import load_file\n"
        f"encoder = {described['encoder']['call']}.eval()\n"
        'encoder.load_state_dict(load_file("encoder.safetensors"))\n'
        f"features = encoder(torch.randn(1, 3, {size}, {size}))  # (1, {dim}), the mean over patches\n```"
    )
    if described["predictor"] is None:
        return text
    return (
        f"{text}\n\nThe world model, with iwm-fast:\n\n"
        "```python\nimport iwm_fast\n"
        'model = iwm_fast.load(".")\n'
        f'image = model.load_image("photo.jpg")  # (1, 3, {size}, {size})\n'
        f"action = model.action({described['action'][0]['name']}=0.5)\n"
        f"imagined = model.predict(image, action)  # (1, patches, {dim})\n```"
    )


def _actions(entries: list[dict[str, Any]]) -> str:
    rows = [f"| {number} | {entry['name']} | {entry['one_means']} |" for number, entry in enumerate(entries)]
    return "All zero: nothing changes.\n\n| place | entry | 1 means |\n| --- | --- | --- |\n" + "\n".join(rows)


def _training(described: dict[str, Any]) -> str:
    settings, data = described["settings"], described["data"]
    optim, views, mask = (settings[name] for name in ("optim", "views", "mask"))
    jitter = "/".join(f"{views[name]:g}" for name in ("brightness", "contrast", "saturation", "hue"))
    flags = "/".join(f"{views[f'{name}_probability']:g}" for name in ("grayscale", "blur", "solarize"))
    rows = {
        "images": f"{data['num_samples']:,}, content SHA-256 {data['content_digest']}",
        "epochs, global batch": f"{optim['epochs']:g}, {optim['global_batch_size']}",
        "learning rate": f"{optim['lr_start']:g} to {optim['lr']:g} over {optim['warmup_epochs']:g} epochs, then a "
        f"cosine to {optim['lr_end']:g}",
        "weight decay, EMA": " and ".join(f"{optim[name][0]:g} to {optim[name][1]:g}" for name in
                                          ("weight_decay", "teacher_momentum")),
        "precision": optim["precision"],
        "jitter (brightness/contrast/saturation/hue)": f"{jitter} with probability {views['jitter_probability']:g}",
        "source only (grayscale/blur/solarize)": flags,
        "predicted": f"{mask['num_target_blocks']} blocks of {100 * mask['block_scale'][0]:g}-"
        f"{100 * mask['block_scale'][1]:g} % of the patches",
        "versions": ", ".join(f"{name} {version}" for name, version in described["versions"].items()),
    }  # fmt: skip
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"Every setting stands in `config.json`.\n\n| setting | value |\n| --- | --- |\n{table}"


def _measured(step: int, evaluations: dict[str, dict[str, Any]], last_row: dict[str, Any]) -> str:
    rows = [
        (name, f"{row['subject']}, {row['metric']}", row["value"], result["step"])
        for name, result in sorted(evaluations.items())
        for row in result["rows"]
    ]
    rows += [
        ("training", key, value, last_row["step"])
        for key, value in last_row.items()
        if isinstance(value, int | float) and key.startswith(_RESULTS)
    ]
    if not rows:
        return "Nothing was measured before the export."
    lines = [f"| {name} | {key} | {value:.4g} | {at} |" for name, key, value, at in rows]
    head = f"These weights are of step {step}.\n\n| by | number | value | step |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(lines)
