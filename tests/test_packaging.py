"""Installing the project provides one import name and works next to foreign packages named kernels or pipelines."""

import os
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from fixtures.paths import PROJECT, TESTS
from iwm_fast.runtime.extras import DEMO_PACKAGES

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SITE_PACKAGES = next(path for path in sys.path if path.endswith("site-packages"))
VERSION = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]


def run(*command: str | Path, cwd: Path, python_path: Path | None = None, code: int = 0) -> str:
    """Run a command that must end with `code`; return its standard output, or its standard error if it must fail."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(python_path)} if python_path else {}
    result = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stderr if code else result.stdout


def pip(*arguments: str | Path, cwd: Path, python: str | Path = sys.executable) -> None:
    run(python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """Return a clean clone, which holds only committed files."""
    folder = tmp_path_factory.mktemp("clone") / "iwm-fast"
    run("git", "clone", "--quiet", PROJECT, folder, cwd=PROJECT)
    return folder


@pytest.fixture(scope="module")
def wheel(clone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", folder, clone, cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture
def foreign_folder(tmp_path) -> Path:
    """Return a working directory with a folder `pipelines` and a package `kernels` of another project."""
    for name in ("pipelines", "kernels"):
        (tmp_path / "work" / name).mkdir(parents=True)
    (tmp_path / "work" / "kernels" / "__init__.py").write_text("foreign = True\n")
    return tmp_path / "work"


def check_commands(python: str | Path, work: Path, installed: Path, python_path: Path | None = None) -> None:
    """Check, in the folder `work`, that imports and commands use the package in the folder `installed`."""

    def start(*arguments: str) -> str:
        return run(python, *arguments, cwd=work, python_path=python_path)

    origin = start("-c", "import iwm_fast.kernels.ops, iwm_fast.pipelines.loader as l; print(iwm_fast.__file__)")
    assert Path(origin.strip()).parent == installed
    assert "runtime.loader" in start("-m", "iwm_fast.train", "--help")
    assert "iwm demo" in start("-m", "iwm_fast.cli", "demo", "--help")
    assert start("-m", "iwm_fast", "--version") == f"iwm-fast {VERSION}\n"
    # The foreign package is still the one that its name imports.
    assert start("-c", "import kernels; print(kernels.foreign)").strip() == "True"


def test_a_wheel_installs_one_name_and_works_next_to_foreign_kernels(wheel, foreign_folder, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"iwm_fast"}
    assert {"iwm_fast/configs/demo.yaml", "iwm_fast/configs/tasks/demo.yaml", "iwm_fast/py.typed"} <= set(names)
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, wheel, cwd=tmp_path)
    check_commands(sys.executable, foreign_folder, target / "iwm_fast", target)
    assert "iwm demo" in run(target / "bin" / "iwm", "demo", "--help", cwd=foreign_folder, python_path=target)


def test_a_source_distribution_installs_all_modules(clone, foreign_folder, tmp_path):
    pip("install", "--target", tmp_path / "builder", "setuptools>=77", cwd=tmp_path)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    run(sys.executable, "-c", build, tmp_path, cwd=clone, python_path=tmp_path / "builder")
    (archive,) = tmp_path.glob("*.tar.gz")
    target = tmp_path / "target"
    pip("install", "--no-deps", "--target", target, archive, cwd=tmp_path)
    check_commands(sys.executable, foreign_folder, target / "iwm_fast", target)
    listed = run("git", "ls-files", "iwm_fast", "kernels", "pipelines", cwd=clone).splitlines()
    modules = [name for name in listed if name.endswith((".py", ".yaml"))]
    installed = [name if name.startswith("iwm_fast/") else f"iwm_fast/{name}" for name in modules]
    assert len(installed) > 150
    assert [name for name in installed if not (target / name).is_file()] == []


PREDICT = """
import sys, iwm_fast, torch
for folder in sys.argv[1:]:
    model = iwm_fast.load(folder)
    view = torch.zeros(1, 3, model.config.views.size, model.config.views.size)
    print(model.predict(view, model.action()).isfinite().all().item())
"""


def test_the_core_alone_loads_predicts_and_exports(wheel, clone, tmp_path):
    # All dependencies are installed, with nothing of the environment of the tests.
    venv.create(tmp_path / "venv", with_pip=True)
    python, iwm = (tmp_path / "venv" / "bin" / name for name in ("python", "iwm"))
    pip("install", "--constraint", clone / "constraints.txt", wheel, cwd=tmp_path, python=python)
    shutil.copytree(TESTS / "fixtures" / "run_e678dd7", tmp_path / "old")
    assert run(iwm, "--version", cwd=tmp_path) == f"iwm-fast {VERSION}\n"
    run(iwm, "export", "run=old/run", "to=export", cwd=tmp_path)
    assert run(python, "-c", PREDICT, "old/run", "old/export", "export", cwd=tmp_path).split() == ["True"] * 3
    message = run(iwm, "train", "old/run/config.yaml", "output.folder=run", cwd=tmp_path, code=2)
    assert message == (
        "error: nvidia.dali, deepspeed, tensorboard, pyarrow are not installed: "
        "pip install 'iwm-fast[train-cuda13]' (CUDA 12: train-cuda12)\n"
    )
    assert f"{', '.join(DEMO_PACKAGES)} are not installed" in run(iwm, "demo", cwd=tmp_path, code=2)
    assert "iwm-fast[eval]" in run(iwm, "evaluate", "knn", "run=old/run", cwd=tmp_path, code=2)


def test_an_editable_install_works(clone, foreign_folder, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    pip("install", "--no-deps", "--editable", clone, cwd=tmp_path, python=python)
    # Dependencies come from the environment of the tests. A .pth file appends them, after the project itself.
    (site_packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    (site_packages / "zz_tests.pth").write_text(SITE_PACKAGES + "\n")
    check_commands(python, foreign_folder, clone / "iwm_fast")
    # The environment of the tests has all extras.
    imports = "from importlib import import_module\nfrom iwm_fast.runtime.extras import DEMO_PACKAGES\n"
    run(python, "-c", f"{imports}for name in DEMO_PACKAGES: import_module(name)", cwd=tmp_path)
    assert run(tmp_path / "venv" / "bin" / "iwm", "--version", cwd=tmp_path) == f"iwm-fast {VERSION}\n"
