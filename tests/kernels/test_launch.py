"""How a kernel is started: what that needs, and which parameter each value is passed to."""

import shutil
import sysconfig
from types import SimpleNamespace

import pytest

from iwm_fast.kernels.launch import Launch, why_not_launchable

KERNEL = SimpleNamespace(arg_names=["x_ptr", "num_rows", "WIDTH"])


def test_values_are_passed_in_the_order_of_the_parameters_before_the_constants():
    launch = Launch.of(KERNEL, (1,), (None, 3), {"WIDTH": 16}, num_warps=4)
    assert launch.arguments == {"x_ptr": None, "num_rows": 3} and launch.constants == {"WIDTH": 16}
    assert Launch.of(KERNEL, (1,), (None, 3, 16), {}, num_warps=4).arguments["WIDTH"] == 16


@pytest.mark.parametrize("values", [(None,), (None, 3, 4)], ids=["too few", "too many"])
def test_a_missing_value_does_not_shift_the_others(values):
    with pytest.raises(ValueError, match="argument 2 is"):
        Launch.of(KERNEL, (1,), values, {"WIDTH": 16}, num_warps=4)


@pytest.mark.parametrize("scheme", ["posix_prefix", "posix_local"])
def test_pythons_headers_are_looked_for_where_triton_does(monkeypatch, tmp_path, scheme):
    # Debian's Python has its headers in /usr/include, and names /usr/local/include by default.
    folders = {"posix_prefix": tmp_path / "usr", "posix_local": tmp_path / "local"}
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: scheme)
    monkeypatch.setattr(sysconfig, "get_path", lambda name, chosen=scheme: str(folders[chosen] / name))
    folder = tmp_path / "usr" / "include"
    assert str(folder / "Python.h") in why_not_launchable()
    folder.mkdir(parents=True)
    (folder / "Python.h").touch()
    assert why_not_launchable() == ""
