"""What `iwm demo --help` and `iwm lab --help` explain: files, settings and how to stop and resume."""

from pathlib import Path

_CONFIGS = Path(__file__).parents[1] / "configs"

_DEMO = """\
Pastes parts of photographs that scikit-image and scikit-learn contain onto others, writes the images as shards, trains
a world model on them under the DeepSpeed launcher (1, 2, 4 or 8 GPUs, or two ranks on a CPU), evaluates it by mean
reciprocal rank and k-NN, trains a decoder that shows its tokens as pixels, draws pictures, and prints a table. Nothing
is downloaded. It takes about 8 minutes on two CPU cores.

Files, in the current folder:
  data/demo/                shards: 8 for training, 2 for validation
  runs/demo/                the run: config.yaml, metrics.jsonl, tensorboard/, checkpoints/, evaluations/
  runs/demo/show.png        views, masks and actions, as the model sees them
  runs/demo/imagine.png     images that the world model imagines, and that its predictions retrieve
  runs/demo/summary.json    the numbers of the table

The same command resumes a demo that was stopped, and prints the table of a finished one at once. To start from
scratch, delete runs/demo and data/demo (`make clean-demo`). Images that another version has written are renamed to
data/demo.old, and a run that was trained on them is refused.

Settings are those of a run, as key=value; `iwm train --help` explains them. They replace values of the file below.
Settings that differ from those of an earlier demo need another folder:
  iwm demo optim.epochs=5 output.folder=runs/short
"""

_LAB = """\
Trains every cell of a grid, which is one run with a few settings of its own, once per seed, evaluates the runs, and
judges claims: a claim is a list of pairs of numbers of which the first should be larger. It holds if the 95 % interval
over the seeds lies above zero for every pair, fails if one lies below, and is undecided otherwise.

Keys of the YAML file:
  folder: runs/lab                     where the results are written
  base: iwm_fast/configs/demo.yaml     the run that all cells start from
  settings: {optim.epochs: 20}         settings of all cells; by default none
  cells:                               settings of each cell, by its name
    feature: {}
    none: {model.predictor.conditioning: none}
  seeds: [0, 1, 2]                     one run per cell and seed; this is the default
  workers: 2                           runs at a time; by default one per GPU, without a GPU one per core
  demo_data: true                      whether to write the shards of `iwm demo` first; by default false
  evaluations:                         evaluations, the cells they are for (by default all), and their settings
    - {task: mrr, cells: [feature, none], settings: {bank_size: 64}}   {seed} in a value is replaced by the run's seed
  claims:
    conditioning:                      name of the claim
      text: what is claimed, in one sentence
      paper: the paper's numbers
      margin: 0.01                     how much the first number may be smaller; by default 0
      compare:                         pairs of numbers, each CELL RESULT SUBJECT METRIC
        - [feature mrr_default jitter mrr, none mrr_default jitter mrr]
  curves:
    few labels:                        name of a chart of results over some quantity; its other texts: text, y_label
      x_label: labels
      x: [10, 100]
      lines: {predictor: [feature finetune_10 predictor accuracy, feature finetune_100 predictor accuracy]}
  like: other.yaml                     another lab, whose keys apply unless they are given here; settings are merged

Files in its folder:
  cells/CELL-seedN/                    a run with its evaluations; lab.log has the output of its commands
  lab.json                             all numbers, the verdicts, and correlations of MRR with accuracies
  report.html, claims.png              the same as a page and a picture; `iwm report lab=FOLDER` writes them again

Ctrl-C or SIGTERM stops the runs, which save checkpoints first; the exit code is 75. The same command resumes, and
repeats only what is missing or has other settings.

Examples:
  {configs}/lab_cpu.yaml
  {configs}/lab_objects.yaml
  {configs}/lab_gpu.yaml
"""


def demo_help() -> str:
    """Return the explanation of `iwm demo`, with the settings of its run."""
    path = _CONFIGS / "demo.yaml"
    return f"{_DEMO}\n{path}:\n\n{path.read_text(encoding='utf-8').rstrip()}"


def lab_help() -> str:
    """Return the explanation of `iwm lab` and of its YAML file."""
    return _LAB.replace("{configs}", str(_CONFIGS)).rstrip()
