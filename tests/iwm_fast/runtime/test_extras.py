"""A core installation loads, predicts and exports; every other command names the extra that it lacks."""

import re
import subprocess
import sys
import tomllib

import pytest

from fixtures.launchers import tiny_yaml
from fixtures.paths import PROJECT, TESTS
from iwm_fast import cli
from iwm_fast.runtime import extras
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.extras import EXTRAS

# Packages whose distribution is not named like the import.
DISTRIBUTIONS = {"nvidia.dali": "nvidia-dali-cuda130", "skimage": "scikit-image", "sklearn": "scikit-learn"}
CUDA12 = " (CUDA 12: train-cuda12)\n"

# Runs the code of its second argument as if the packages of its first one were not installed.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if any(name == package or name.startswith(package + ".") for package in sys.argv[1].split()):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
exec(sys.argv[2])
"""


def run_without(packages: str, code: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", WITHOUT, packages, code]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def message_without(packages: str, *arguments: str) -> str:
    """Return what a command prints without these packages; it must print nothing else and end with code 2."""
    done = run_without(packages, f"from iwm_fast.cli import main; main({list(arguments)!r})")
    assert done.returncode == 2 and done.stdout == "", done.stdout + done.stderr
    return done.stderr


def dependencies() -> dict[str, set[str]]:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lists = {"core": project["dependencies"], **project["optional-dependencies"]}
    return {extra: {re.split(r"[\[<>=;]", name)[0] for name in names} for extra, names in lists.items()}


def test_messages_name_the_extras_that_contain_a_package():
    extras = dependencies()
    for package, names in EXTRAS.items():
        distribution = DISTRIBUTIONS.get(package, package)
        assert {extra for extra in names if distribution in extras[extra]} == set(names), package
        assert distribution not in extras["core"]
    listed = set.union(*(extras[name] for name in ("train-cuda13", "eval", "demo", "wandb")))
    assert listed == {DISTRIBUTIONS.get(package, package) for package in EXTRAS}


def test_the_training_extras_differ_only_in_the_build_of_dali():
    extras = dependencies()
    assert extras["train-cuda13"] ^ extras["train-cuda12"] == {"nvidia-dali-cuda130", "nvidia-dali-cuda120"}


def test_every_dependency_has_an_exact_version_in_the_constraints():
    pinned = {line.partition("==")[0].lower() for line in (PROJECT / "constraints.txt").read_text().split()}
    unpinned = {name.lower() for names in dependencies().values() for name in names} - pinned
    # The extra for CUDA 12 is not tested, and `test` names the project's own extras.
    assert unpinned == {"nvidia-dali-cuda120", "iwm-fast"}


def test_loading_predicting_and_exporting_need_no_extra(tmp_path):
    code = (
        "import iwm_fast, torch\nfrom iwm_fast.cli import main\n"
        f"main(['export', 'run={TESTS}/fixtures/run_e678dd7/run', 'to={tmp_path}/export'])\n"
        f"model = iwm_fast.load('{tmp_path}/export')\n"
        "view = torch.zeros(1, 3, model.config.views.size, model.config.views.size)\n"
        "print(model.predict(view, model.action()).shape[0])\n"
    )
    done = run_without(" ".join(EXTRAS), code)
    assert done.returncode == 0 and done.stdout.split()[-1] == "1", done.stderr


def test_one_message_names_everything_that_a_training_run_lacks(tiny_shards, tmp_path):
    settings = str(tiny_yaml(tmp_path / "run.yaml", tiny_shards))
    arguments = ("train", settings, f"output.folder={tmp_path / 'run'}")
    assert message_without("nvidia deepspeed", *arguments, "runtime.loader=dali", "runtime.engine=deepspeed") == (
        "error: nvidia.dali, deepspeed are not installed: pip install 'iwm-fast[train-cuda13]'" + CUDA12
    )
    plain = ("runtime.loader=torch", "runtime.engine=plain")
    assert message_without("nvidia.dali deepspeed tensorboard", *arguments, *plain) == (
        "error: tensorboard is not installed: pip install 'iwm-fast[train-cuda13]'" + CUDA12
    )
    assert not (tmp_path / "run").exists()


def test_one_message_names_all_extras_of_the_demo():
    message = message_without("nvidia matplotlib pyarrow sklearn", "demo")
    assert "nvidia.dali, pyarrow, matplotlib, sklearn are not installed" in message
    assert message.endswith("pip install 'iwm-fast[train-cuda13,eval,demo]'" + CUDA12)


def test_a_failed_import_is_reported_with_its_extra(tmp_path):
    message = message_without("webdataset", "shards", "pack", str(tmp_path), str(tmp_path / "shards"))
    assert message == "error: webdataset is not installed: pip install 'iwm-fast[train-cuda13]'" + CUDA12
    message = message_without("pyarrow", "evaluate", "knn", "run=absent")
    assert message == "error: pyarrow is not installed: pip install 'iwm-fast[eval]'\n"


def test_a_missing_package_of_no_extra_keeps_its_traceback():
    with pytest.raises(ModuleNotFoundError, match="absent"), user_facing_errors():
        raise ModuleNotFoundError("No module named 'absent'", name="absent")


def test_the_demo_does_not_need_the_logger_for_wandb(monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "wandb")
    started = []
    monkeypatch.setattr(cli, "import_object", lambda _: started.append)
    cli.main(["demo", "seed=1"])
    assert started == [["seed=1"]]
