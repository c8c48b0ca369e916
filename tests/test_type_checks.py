"""Types and sizes of arrays are checked while the tests run, with fewer calls than by jaxtyping's own decorator."""

import numpy as np
import pytest

pytest.importorskip("beartype")

from beartype.roar import BeartypeCallHintViolation
from jaxtyping import TypeCheckError

from iwm_fast.evals.results import accuracy_gain, bootstrap
from iwm_fast.evals.retrieval.mrr import chance_mrr, mean_reciprocal_rank
from iwm_fast.runtime.sharding import drop_padding


def test_functions_of_the_package_refuse_other_types():
    with pytest.raises(BeartypeCallHintViolation, match="bank_size='4'"):
        chance_mrr("4")


@pytest.mark.parametrize(
    ("function", "arguments", "problem"),
    [
        (bootstrap, (np.zeros((2, 2)),), "has 2 dimensions"),
        (drop_padding, (np.zeros(2, np.float32),), "dtype"),
        (accuracy_gain, (np.zeros(3), np.zeros(2), 0), "size of dimension images"),
        (mean_reciprocal_rank, (np.zeros((2, 3)),), "dtype"),
    ],
)
def test_functions_of_the_package_refuse_other_arrays(function, arguments, problem):
    with pytest.raises((BeartypeCallHintViolation, TypeCheckError), match=problem):
        function(*arguments)
