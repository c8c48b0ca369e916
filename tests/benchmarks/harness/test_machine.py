"""What identifies the code that was measured."""

from benchmarks.harness import machine
from iwm_fast.runtime import provenance


def test_without_a_repository_the_version_is_a_hash_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "current_commit", lambda: "unknown")
    (tmp_path / "kernels").mkdir()
    (tmp_path / "tests").mkdir()
    kernel, test = tmp_path / "kernels/a.py", tmp_path / "tests/b.py"
    versions = []
    for path in (kernel, test):
        for content in ("1", "2"):
            path.write_text(content)
            versions.append(machine.source_version(project=tmp_path))
    assert versions[0] != versions[1] == versions[2] == versions[3], "tests do not change what is measured"
    before = machine.source_version("tests", project=tmp_path)
    test.write_text("3")
    assert machine.source_version("tests", project=tmp_path) != before
    assert machine.describe()["commit"] == machine.source_version() and machine.describe("x")["commit"] == "x"
    assert machine.source_version().startswith("sources-")


def test_in_a_repository_the_version_is_the_commit(monkeypatch):
    monkeypatch.setattr(provenance, "current_commit", lambda: "abc")
    assert machine.source_version("tests") == "abc"
