"""How a kernel is started: which parameter each value is passed to."""

from types import SimpleNamespace

import pytest

from iwm_fast.kernels.launch import Launch

KERNEL = SimpleNamespace(arg_names=["x_ptr", "num_rows", "WIDTH"])


def test_values_are_passed_in_the_order_of_the_parameters_before_the_constants():
    launch = Launch.of(KERNEL, (1,), (None, 3), {"WIDTH": 16}, num_warps=4)
    assert launch.arguments == {"x_ptr": None, "num_rows": 3} and launch.constants == {"WIDTH": 16}
    assert Launch.of(KERNEL, (1,), (None, 3, 16), {}, num_warps=4).arguments["WIDTH"] == 16


@pytest.mark.parametrize("values", [(None,), (None, 3, 4)], ids=["too few", "too many"])
def test_a_missing_value_does_not_shift_the_others(values):
    with pytest.raises(ValueError, match="argument 2 is"):
        Launch.of(KERNEL, (1,), values, {"WIDTH": 16}, num_warps=4)
