"""What a user of the command line sees: help, results, and one message for each mistake."""

import ast
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

import iwm_fast
from fixtures.launchers import tiny_yaml
from fixtures.paths import PROJECT
from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.cli import COMMANDS, main
from iwm_fast.lab.config import LAB_KEYS


def refused(capsys, *arguments: str) -> str:
    """Run a command that must be refused, and return its message."""
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err.startswith("error: ") and "Traceback" not in printed.err and printed.out == ""
    return printed.err


@pytest.fixture
def run_yaml(tmp_path, tiny_shards):
    def write(**data) -> str:
        settings = {
            "data": {"train": tiny_shards.pattern, **data},
            "views": {"size": 16, "blur": {"sigma": [0.1, 1.0]}},
            "model": {"encoder": {"dim": 16, "depth": 1, "num_heads": 1, "patch_size": 4},
                      "predictor": {"dim": 16, "depth": 1, "num_heads": 1}},
            "optim": {"global_batch_size": 16, "epochs": 1, "warmup_epochs": 0, "precision": "fp32"},
            "runtime": {"engine": "plain", "device": "cpu"},
            "output": {"folder": str(tmp_path / "run")},
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(settings))
        return str(path)

    return write


def test_help_of_every_command_works_without_importing_torch():
    names = [name.split() for name in COMMANDS]
    script = (
        "import sys\nfrom iwm_fast.cli import main\n"
        f"for name in {names!r}:\n    main([*name, '--help'])\nmain([])\nmain(['--help'])\nmain(['shards'])\n"
        "assert not {'torch', 'deepspeed', 'nvidia.dali', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "optim.lr (float, 0.001)\n      Peak learning rate." in done.stdout
    assert "bank_size (int, 256)" in done.stdout


def test_the_version_is_printed_by_the_command_and_the_module(capsys):
    expected = f"iwm-fast {version('iwm-fast')}\n"
    main(["--version"])
    assert capsys.readouterr().out == expected
    command = [sys.executable, "-m", "iwm_fast", "--version"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == expected
    assert iwm_fast.__version__ == version("iwm-fast")


def test_help_of_demo_and_lab_explains_files_and_settings(capsys):
    main(["demo", "--help"])
    printed = capsys.readouterr().out
    assert "runs/demo/summary.json" in printed and "resumes" in printed and "global_batch_size: 64" in printed
    main(["lab", "--help"])
    printed = capsys.readouterr().out
    assert "lab.json" in printed and "lab_cpu.yaml" in printed
    assert {key for key in LAB_KEYS if f"\n  {key}:" not in printed} == set()


def test_an_unknown_command_lists_the_known_ones(capsys):
    assert "unknown command 'trian run.yaml'; the commands are train, check, warmup, show" in refused(
        capsys, "trian", "run.yaml"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["optm.lr=1"], "unknown setting 'optm.lr'; did you mean 'optim.lr'?"),
        (["data.train=absent-{000..002}.tar"], "absent-{000..002}.tar"),
        (["runtime.micro_batch_size=5"], "runtime.micro_batch_size must satisfy micro_batch_size * 1 ranks"),
        (["runtime.device=cuda"], "runtime.device=cuda needs a GPU"),
        (["data.train="], "data.train must name the training shards"),
    ],
)
def test_an_impossible_run_ends_with_one_message_and_writes_nothing(capsys, run_yaml, tmp_path, arguments, message):
    path = run_yaml()
    assert message in refused(capsys, "train", path, *arguments)
    assert not (tmp_path / "run").exists()


def test_an_empty_folder_and_a_tar_without_images_are_refused(capsys, run_yaml, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(capsys, "train", run_yaml(train=str(tmp_path / "empty")))
    write_tar(tmp_path / "texts.tar", [("a.txt", b"no image"), ("a.cls", b"1")])
    message = refused(capsys, "train", run_yaml(train=str(tmp_path / "texts.tar")))
    assert "texts.tar" in message and "jpg" in message
    with tarfile.open(tmp_path / "nothing.tar", "w"):
        pass
    assert "nothing.tar" in refused(capsys, "train", run_yaml(train=str(tmp_path / "nothing.tar")))


def test_all_commands_work_on_one_run(capsys, run_yaml, tmp_path, tiny_shards):
    path = run_yaml(val=tiny_shards.pattern)
    main(["show", path])
    main(["train", path])
    main(["evaluate", "mrr", f"run={tmp_path / 'run'}", "num_images=4", "bank_size=8"])
    main(["evaluate", "knn", f"run={tmp_path / 'run'}"])
    main(["imagine", f"run={tmp_path / 'run'}", "num_images=2", "bank_size=8"])
    main(["export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'export'}"])
    main(["imagine", f"run={tmp_path / 'export'}", f"data.val={tiny_shards.pattern}", "num_images=2", "bank_size=8"])
    printed = capsys.readouterr().out
    assert f"  iwm evaluate mrr run={tmp_path / 'run'}\n" in printed
    assert "0.3397" in printed and "untrained predictor" in printed and "untrained encoder" in printed
    for name in ("show.png", "imagine.png", "evaluations/mrr_default.json", "evaluations/knn.json"):
        assert (tmp_path / "run" / name).stat().st_size > 100
    assert (tmp_path / "export" / "README.md").is_file() and (tmp_path / "export" / "imagine.png").is_file()
    assert "exists already" in refused(capsys, "export", f"run={tmp_path / 'run'}", f"to={tmp_path / 'export'}")
    assert "to must name a folder to write, got ''" in refused(capsys, "export", f"run={tmp_path / 'run'}")
    assert "already holds a run" in refused(capsys, "train", path)
    assert "other settings" in refused(capsys, "train", path, "resume=auto", "model.encoder.dim=32")


def test_a_run_holds_from_any_working_directory(capsys, run_yaml, tmp_path, tiny_shards, monkeypatch):
    shards = Path(tiny_shards.pattern)
    monkeypatch.chdir(shards.parent)
    main(["train", run_yaml(train=shards.name, val=f"./{shards.name}")])
    monkeypatch.chdir(tmp_path)
    main(["evaluate", "mrr", "run=run", "num_images=2", "bank_size=4"])
    main(["evaluate", "knn", "run=run"])
    path = tmp_path / "run" / "config.yaml"
    path.write_text(path.read_text().replace(str(shards.parent), "moved"))
    capsys.readouterr()
    message = refused(capsys, "evaluate", "mrr", "run=run")
    assert f"set data.val to their current location; relative paths start from {tmp_path}" in message
    assert "set data.train to their current location" in refused(
        capsys, "evaluate", "knn", "run=run", f"data.val={tiny_shards.pattern}"
    )


def test_configurations_are_listed_and_started_by_name(capsys, tmp_path, tiny_shards, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["configs"])
    assert "  vit_s16       ViT-S/16" in capsys.readouterr().out
    main(["init", "vit_s16", "mine.yaml"])
    assert capsys.readouterr().out == "mine.yaml\n"
    assert "is not overwritten" in refused(capsys, "init", "vit_s16", "mine.yaml")
    assert "did you mean 'vit_s16'?" in refused(capsys, "train", "vit_s61")
    assert "data.train must name the training shards" in refused(capsys, "show", "mine.yaml", "data.train=")


def test_a_label_is_required_only_where_it_is_used(capsys, run_yaml, tmp_path):
    crop = photograph("coffee.png")[:60, :60]
    write_tar(tmp_path / "unlabelled.tar", [(f"{n:02}.jpg", encode(crop + n)) for n in range(16)])
    path = run_yaml(train=str(tmp_path / "unlabelled.tar"), val=str(tmp_path / "unlabelled.tar"))
    main(["train", path])
    main(["evaluate", "mrr", f"run={tmp_path / 'run'}", "num_images=2", "bank_size=4"])
    capsys.readouterr()
    message = refused(capsys, "evaluate", "knn", f"run={tmp_path / 'run'}")
    assert "unlabelled.tar" in message and "'00'" in message


def test_an_evaluation_without_run_or_validation_shards_names_them(capsys, run_yaml, tmp_path):
    assert "run must name the folder" in refused(capsys, "evaluate", "mrr")
    assert "is not a run folder" in refused(capsys, "evaluate", "mrr", f"run={tmp_path}")
    assert "did you mean 'bank_size'?" in refused(capsys, "evaluate", "mrr", "run=x", "bank_sise=3")
    main(["train", run_yaml()])
    capsys.readouterr()
    assert "data.val must name validation shards" in refused(capsys, "evaluate", "knn", f"run={tmp_path / 'run'}")


def test_packed_shards_are_listed_and_train(capsys, run_yaml, tmp_path):
    from PIL import Image

    for name in ("cats", "cups"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            Image.fromarray(photograph("chelsea.png")[number : number + 50, :50]).save(
                tmp_path / "images" / name / f"{number}.png"
            )
    main(["shards", "pack", str(tmp_path / "images"), str(tmp_path / "shards")])
    assert "shard-000000.tar" in capsys.readouterr().out
    main(["train", run_yaml(train=str(tmp_path / "shards"))])
    assert "finished at step 1\n" in capsys.readouterr().out
    assert "expected 2 arguments" in refused(capsys, "shards", "pack", str(tmp_path / "images"))
    message = "expected a folder to write to, got the setting 'val_share=0.1'; write ./val_share=0.1"
    assert message in refused(capsys, "shards", "pack", str(tmp_path / "images"), "val_share=0.1")


def test_sets_packed_together_are_evaluated_and_mixed_classes_refused(capsys, run_yaml, tmp_path):
    images, shards = tmp_path / "images", tmp_path / "shards"
    for name in ("cats", "cups"):
        (images / name).mkdir(parents=True)
        for number in range(10):
            (images / name / f"{number}.jpg").write_bytes(encode(photograph("chelsea.png")[number:50, :50]))
    main(["shards", "pack", str(images), str(shards), "val_share=0.2"])
    expected = f"{shards}/train: images 16, classes 2, shards 1; {shards}/val: images 4, classes 2, shards 1"
    assert capsys.readouterr().out.splitlines()[-1] == expected
    main(["train", run_yaml(train=f"{shards}/train", val=f"{shards}/val")])
    main(["evaluate", "knn", f"run={tmp_path / 'run'}"])
    (images / "cats").rename(images / "dogs")
    main(["shards", "pack", str(images), str(tmp_path / "dogs")])
    capsys.readouterr()
    message = refused(capsys, "evaluate", "knn", f"run={tmp_path / 'run'}", f"data.val={tmp_path / 'dogs'}")
    assert f"class 0 is 'cats' in {shards}/train/classes.json, but 'cups' in {tmp_path / 'dogs'}" in message


FRAMES = """
import sys, traceback
from iwm_fast.training import pretraining

def show(*_, **__):
    print(*[f"FRAME {frame.name}" for frame in traceback.extract_stack() if "iwm_fast" in frame.filename], sep="\\n")
    sys.stdout.flush()
    sys.exit(0)

pretraining.train_step = show
from iwm_fast.cli import main
sys.argv = ["iwm", "train", *sys.argv[1:]]
main()
"""


def test_there_are_few_calls_between_the_command_line_and_the_step(tiny_shards, tmp_path):
    settings = tiny_yaml(tmp_path / "run.yaml", tiny_shards, runtime={"engine": "plain", "loader": "torch"})
    command = [sys.executable, "-c", FRAMES, str(settings), f"output.folder={tmp_path / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    frames = [line.removeprefix("FRAME ") for line in done.stdout.splitlines() if line.startswith("FRAME ")]
    assert frames == ["main", "run_and_exit", "train", "run", "run", "step"], done.stdout + done.stderr


def messages() -> list[str]:
    """Return all strings of the packages that are not docstrings."""
    texts = []
    packages = [PROJECT / name for name in ("iwm_fast", "pipelines", "kernels")]
    for path in (path for package in packages for path in package.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings)
        texts += [node.value for node in nodes if isinstance(node.value, str)]
    return texts


def test_messages_name_commands_that_exist_and_no_modules():
    texts = messages()
    named = {name for text in texts for name in re.findall(r"`iwm ([a-z]+(?: (?:pack|check|demo)\b)?)", text)}
    assert {"shards pack", "shards check"} <= named
    commands = {*COMMANDS, *(name.split()[0] for name in COMMANDS), "configs"}
    assert sorted(named - commands) == []
    # Only the help of the modules that launchers start names them.
    usage = [text for text in texts if "python -m" in text or "-m iwm_fast.pipelines" in text]
    assert all(text.startswith("python -m iwm_fast.train RUN.yaml [key=value") for text in usage)
