"""Rules of this code base that can be checked automatically."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fixtures.paths import PROJECT

PACKAGES = ("iwm_fast", "kernels", "pipelines", "benchmarks")
TOOLS = Path(sys.executable).parent
MAX_LINES, MAX_FILES = 500, 15
MAX_FUNCTION_LINES, MAX_DEVICE_FUNCTION_LINES = 50, 80
# Five parameters and self.
MAX_POSITIONAL = 6


def python_files() -> list[Path]:
    # The links iwm_fast/kernels and iwm_fast/pipelines are not followed, so that files are listed only once.
    return sorted(path for package in PACKAGES for path in (PROJECT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(PROJECT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def test_files_of_all_packages_are_checked():
    assert len(python_files()) > 200
    assert {name_of(path).partition("/")[0] for path in python_files()} == set(PACKAGES)


def test_temporary_files_of_tests_are_in_a_folder_that_pytest_removes(tmp_path_factory, pytestconfig):
    for folder in (tempfile.gettempdir(), os.environ["TMPDIR"], os.environ["IWM_CACHE"]):
        assert Path(folder).is_relative_to(tmp_path_factory.getbasetemp())
    assert pytestconfig.getini("tmp_path_retention_policy") == "failed"


def test_files_are_at_most_500_lines():
    assert [name_of(p) for p in python_files() if p.read_text(encoding="utf-8").count("\n") > MAX_LINES] == []


def test_folders_hold_at_most_15_files():
    folders = [path.parent for path in python_files()]
    assert [name_of(folder) for folder in set(folders) if folders.count(folder) > MAX_FILES] == []
    assert len(list((PROJECT / "iwm_fast").glob("*.py"))) <= 7


def test_functions_keep_their_size_budgets():
    too_long = []
    for path in python_files():
        is_device_code = (PROJECT / "kernels") in path.parents
        limit = MAX_DEVICE_FUNCTION_LINES if is_device_code else MAX_FUNCTION_LINES
        for node in functions(parse(path)):
            if (node.end_lineno or 0) - node.lineno >= limit:
                too_long.append(f"{name_of(path)}: {node.name}")
    assert too_long == []


def test_functions_take_at_most_five_positional_parameters():
    too_many = []
    for path in python_files():
        for node in functions(parse(path)):
            # Triton has no keyword-only parameters, and a kernel takes all its tensors and sizes as parameters.
            is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not is_kernel and len(node.args.posonlyargs) + len(node.args.args) > MAX_POSITIONAL:
                too_many.append(f"{name_of(path)}: {node.name}")
    assert too_many == []


def test_files_folders_and_public_names_have_docstrings():
    missing = []
    for path in python_files():
        tree = parse(path)
        if not ast.get_docstring(tree):
            missing.append(name_of(path))
        for node in tree.body:
            is_public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if is_public and not ast.get_docstring(node):
                missing.append(f"{name_of(path)}: {node.name}")
        if not (path.parent / "__init__.py").is_file():
            missing.append(f"{name_of(path.parent)}/__init__.py")
    assert missing == []


def test_docstrings_of_packages_ask_the_question_they_answer():
    folders = {path.parent for path in python_files()} - {PROJECT / name for name in ("iwm_fast", "benchmarks")}
    texts = {name_of(folder): ast.get_docstring(parse(folder / "__init__.py")) or "" for folder in folders}
    assert [name for name, text in texts.items() if "?" not in text] == []


def test_files_are_named_after_their_subject():
    assert [name_of(p) for p in python_files() if p.stem in ("utils", "helpers", "common", "misc")] == []


def test_kernels_and_pipelines_are_links_and_import_under_one_name():
    for name in ("kernels", "pipelines"):
        assert os.readlink(PROJECT / "iwm_fast" / name) == f"../{name}"
        # A script in the project's folder has that folder on its path, and could import them by their short names.
        code = f"import sys; sys.path.insert(0, {str(PROJECT)!r}); import {name}"
        result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=False)
        assert result.returncode == 1 and f"the folder {name}/ is imported as iwm_fast.{name}" in result.stderr


def test_the_runtime_type_checks_do_not_wrap_kernels():
    from iwm_fast.kernels import launch, residual_norm
    from iwm_fast.pipelines.sampling import masks

    # jaxtyping's hook wraps functions. Triton and torch.library cannot read the source or signature of a wrapper.
    assert hasattr(masks.all_patches, "__wrapped__")
    assert not any(
        hasattr(value, "__wrapped__") for module in (launch, residual_norm) for value in functions_of(module)
    )


def functions_of(module) -> list:
    return [value for value in vars(module).values() if type(value).__name__ == "function"]


def test_all_settings_have_explanations():
    from iwm_fast.cli import COMMANDS
    from iwm_fast.config.loading import iter_settings
    from iwm_fast.evaluate import import_object

    kinds = {import_object(command.settings) for command in COMMANDS.values() if command.settings}
    assert len(kinds) >= 8
    for kind in kinds:
        for name, _, _, text in iter_settings(kind):
            assert text.endswith("."), name


def test_no_file_refers_to_documents_outside_the_repository():
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True)
    private = re.compile(r"\.\./shared|design\.md|house\.md|\bissue [A-Z]\b")
    offenders = []
    for name in listed.stdout.split():
        path = PROJECT / name
        is_text = path.suffix in (".py", ".md", ".yaml", ".toml", ".txt") or name in ("Makefile", ".ci/run")
        if is_text and path != Path(__file__) and private.search(path.read_text(encoding="utf-8")):
            offenders.append(name)
    assert offenders == []


def test_no_other_part_knows_the_transformations_by_name():
    # What is done to pixels is defined in pipelines/transforms, which everything else reads from the composition.
    words = re.compile("solari[sz]e|posteri[sz]e|gr[ae]yscale|\\bhue|saturation", re.IGNORECASE)
    # The demo's labels, and torchvision's transforms that benchmarks are compared with.
    baselines = ("benchmarks/pipelines/baselines.py", "benchmarks/pipelines/dali_baselines.py")
    allowed = ("pipelines/transforms/", "pipelines/demo_data.py", *baselines)
    files = [path for path in python_files() if not name_of(path).startswith(allowed)]
    assert [name_of(path) for path in files if words.search(path.read_text(encoding="utf-8"))] == []


def test_files_of_transformations_are_short_and_import_numpy_only():
    folder = PROJECT / "pipelines" / "transforms" / "operations"
    for path in folder.glob("*.py"):
        assert path.read_text(encoding="utf-8").count("\n") <= 150, name_of(path)
        imports = [node for node in parse(path).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = {alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names}
        modules = names | {node.module or "" for node in imports if isinstance(node, ast.ImportFrom)}
        assert {module.partition(".")[0] for module in modules} & {"torch", "nvidia", "torchvision"} == set()


def test_files_named_in_the_documentation_exist():
    pattern = re.compile(r"`((?:iwm_fast|kernels|pipelines|benchmarks|tests|examples|docs)/[\w./-]*)`")
    pages = [PROJECT / "README.md", *(PROJECT / "docs").glob("*.md")]
    names = {name for page in pages for name in pattern.findall(page.read_text(encoding="utf-8"))}
    assert len(names) > 25
    assert sorted(name for name in names if not (PROJECT / name).exists()) == []


def run_tool(*command: str) -> None:
    result = subprocess.run(
        [str(TOOLS / command[0]), *command[1:]], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_respect_the_layers():
    run_tool("lint-imports", "--no-cache")


def test_ruff_finds_nothing():
    run_tool("ruff", "check", "--no-cache", ".")


def test_files_are_formatted():
    run_tool("ruff", "format", "--no-cache", "--check", ".")


@pytest.mark.timeout(300)
def test_types_check():
    run_tool("pyright")


def test_all_names_are_defined():
    # jaxtyping's axes are strings that look like undefined names. F821 is off elsewhere, and strings are ignored here.
    ruff = [str(TOOLS / "ruff"), "check", "--isolated", "--no-cache", "--select", "F821", "--output-format", "json"]
    folders = [*PACKAGES, "tests", "examples"]
    result = subprocess.run([*ruff, *folders], cwd=PROJECT, capture_output=True, text=True, check=False)
    undefined = []
    for finding in json.loads(result.stdout):
        line = Path(finding["filename"]).read_text(encoding="utf-8").splitlines()[finding["location"]["row"] - 1]
        is_in_string = line[: finding["location"]["column"] - 1].count('"') % 2 == 1
        if not is_in_string:
            undefined.append(f"{finding['filename']}: {finding['message']}")
    assert undefined == []
