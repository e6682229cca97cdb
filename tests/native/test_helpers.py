"""Each helper in C++ equals its reference in Python."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megalm.data.permutation import Permutation
from megalm.native.helpers import helpers
from megalm.native.toolchain import find_compiler

from .small import ROOT


@pytest.fixture(autouse=True)
def module() -> None:
    found = helpers()
    if isinstance(found, str):
        if find_compiler() is None:
            pytest.skip(f"no helpers: {found}")
        pytest.fail(found)


def test_permutations_equal_the_reference(campaign_seed: int) -> None:
    draw = random.Random(campaign_seed)
    sizes = [1, 2, 63, 64, 65, 1000, 2**20, 2**31 + 5, 2**61 + 1, 2**62]
    for size in [*sizes, *(draw.randrange(1, 2**40) for _ in range(20))]:
        order = Permutation(size, draw.randrange(100), "samples")
        for index in {0, size - 1, *(draw.randrange(size) for _ in range(30))}:
            assert order(index) == order.reference(index)


def test_a_whole_permutation_is_one() -> None:
    order = Permutation(777, 3)
    assert sorted(order(index) for index in range(777)) == list(range(777))
    assert [order(index) for index in range(777)] == [order.reference(index) for index in range(777)]


def test_beyond_64_bits_the_reference_computes() -> None:
    order = Permutation(2**70, 3)
    assert order(2**69) == order.reference(2**69)


def test_threads_that_load_them_together() -> None:
    """They once found a module without functions, about one time in ten."""
    code = (
        "import sys, threading; from megalm.native.helpers import helpers; sys.setswitchinterval(1e-6)\n"
        "met, found = threading.Barrier(8), []\n"
        "def load(): met.wait(); found.append(hasattr(helpers(), 'copy_rows'))\n"
        "threads = [threading.Thread(target=load) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(found == [True] * 8)"
    )
    for _ in range(10):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        assert out.strip() == "True"


@pytest.mark.parametrize(("index", "n", "half"), [(5, 5, 3), (0, 1, 0), (0, 1, 33), (0, 65, 3)])
def test_arguments_that_do_not_fit(index: int, n: int, half: int) -> None:
    found = helpers()
    assert not isinstance(found, str)
    with pytest.raises(ValueError, match="does not fit"):
        found.permuted(index, n, half, bytes(64))


def test_rows_are_copied_as_numpy_does(campaign_seed: int) -> None:
    found, draw = helpers(), np.random.default_rng(campaign_seed)
    assert not isinstance(found, str)
    for dtype in ("u1", "u2", "u4", "u8"):
        for _ in range(40):
            shape = (*draw.integers(0, 5, draw.integers(0, 3)).tolist(), int(draw.integers(0, 700)))
            whole = tuple(n + int(draw.integers(0, 40)) for n in shape)
            values = draw.integers(0, 255, whole).astype(dtype)
            to = np.zeros((*whole[:-1], whole[-1] + 9), dtype)
            box = tuple(slice(a := int(draw.integers(0, w - n + 1)), a + n) for w, n in zip(whole, shape, strict=True))
            expected = to.copy()
            expected[box] = values[box]
            values.setflags(write=False)
            found.copy_rows(to[box], values[box])
            assert np.array_equal(to, expected), (dtype, shape, box)


def test_rows_that_do_not_fit() -> None:
    found, to = helpers(), np.zeros((3, 4), "u4")
    assert not isinstance(found, str)
    for values in (np.zeros((3, 5), "u4"), np.zeros((3, 4), "u8"), np.zeros(4, "u4"), np.zeros((3, 8), "u4")[:, ::2]):
        with pytest.raises(ValueError, match=r"must be contiguous|two arrays"):
            found.copy_rows(to, values)
    to.setflags(write=False)
    with pytest.raises(ValueError, match="can be written"):
        found.copy_rows(to, to.copy())


@pytest.mark.parametrize("variables", [{"MEGALM_NATIVE": "off"}, {"CXX": "no-such-compiler"}])
def test_without_them_python_computes(variables: dict[str, str], tmp_path: Path) -> None:
    code = (
        "from megalm.data.permutation import Permutation; from megalm.native import build, helpers\n"
        f"from pathlib import Path; build.INSTALLED = Path({str(tmp_path)!r})\n"
        "print(isinstance(helpers.helpers(), str), [Permutation(100, 7)(i) for i in range(5)])"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MEGALM_CACHE": str(tmp_path), **variables}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == f"True {[Permutation(100, 7)(i) for i in range(5)]}"
