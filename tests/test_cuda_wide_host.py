# SPDX-License-Identifier: Apache-2.0
"""The wide CUDA kernel, compiled for the CPU (see `shim`), against the oracle.

Products of a warpgroup, barriers of phases, bulk copies and clusters have a meaning on the CPU too
(tests/native/cuda/hopper_machine.h), so nothing of the kernel is exempt. What this cannot see is
what only a GPU does: timing, the encodings of instructions, and whether the meaning that is given
to them here is the GPU's; csrc/cuda/hopper.h and mbarrier.h list what is taken on trust.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import shim
import torch
from wide_shim import Layer, wide_case

from hetconv_kernels import Support

pytestmark = pytest.mark.skipif(shim.compiler() is None, reason="g++ is not installed here")

EPILOGUE = ("scale", "shift", "residual")


def het(filters: int, channels: int, p: int) -> np.ndarray:
    """Returns the mask of a HetConv layer of 3x3."""
    return np.array(Support.het(channels, filters, 3, p=p).mask)


def dense(filters: int, channels: int, kernel: int = 3) -> np.ndarray:
    """Returns the mask of a dense layer."""
    return np.ones((filters, channels, kernel, kernel), bool)


def scattered(*taps: tuple[int, int]) -> np.ndarray:
    """Returns a mask whose blocks of 64 channels have one tap of 3x3 each."""
    mask = np.zeros((64, 64 * len(taps), 3, 3), bool)
    for block, tap in enumerate(taps):
        mask[:, 64 * block : 64 * block + 64, tap[0], tap[1]] = True
    return mask


CASES: dict[str, Callable[[], shim.Case]] = {
    "two segments, two blocks": lambda: wide_case(
        Layer(het(128, 128, 2), (10, 11)), epilogue=EPILOGUE
    ),
    "three segments": lambda: wide_case(
        Layer(het(192, 192, 3), (6, 9)), 1, epilogue=EPILOGUE, act="relu"
    ),
    "tails": lambda: wide_case(
        Layer(dense(72, 40), (9, 17)), 2, torch.float16, epilogue=EPILOGUE, act="gelu"
    ),
    "one stage": lambda: wide_case(Layer(het(128, 128, 2), (10, 11)), stages=1, slots=3),
    "three stages": lambda: wide_case(
        Layer(het(128, 128, 2), (18, 11)), pixels=128, stages=3, slots=4, epilogue=("residual",)
    ),
    "224 pixels": lambda: wide_case(
        Layer(dense(64, 64), (29, 8)), pixels=224, grid=1, epilogue=EPILOGUE
    ),
    "256 pixels": lambda: wide_case(
        Layer(dense(64, 64), (31, 5)), 1, torch.float16, pixels=256, grid=1, epilogue=EPILOGUE
    ),
    "stacked images": lambda: wide_case(
        Layer(het(128, 128, 2), (7, 7)), 3, pixels=128, images=4, epilogue=EPILOGUE
    ),
    "stride": lambda: wide_case(Layer(dense(64, 64), (13, 17), 2), epilogue=EPILOGUE),
    "one tap a block": lambda: wide_case(
        Layer(scattered((1, 1), (0, 2), (2, 0), (1, 2)), (10, 11)), stages=1, epilogue=EPILOGUE
    ),
    "one tap a block, stacked": lambda: wide_case(
        Layer(scattered((2, 1), (0, 0), (1, 1)), (5, 6)), 5, pixels=128, images=3
    ),
    "one tap a block, stride": lambda: wide_case(
        Layer(scattered((2, 2), (1, 1), (0, 1)), (13, 17), 2), cluster=2
    ),
    "one tap a block, dgrad": lambda: wide_case(
        Layer(scattered((2, 2), (1, 1), (0, 1)), (9, 12), 2), back=True
    ),
    "stride, stacked": lambda: wide_case(Layer(dense(64, 64), (7, 6), 2), 4, images=3),
    "dgrad": lambda: wide_case(Layer(het(128, 64, 2), (7, 9)), back=True),
    "dgrad, four classes": lambda: wide_case(
        Layer(dense(64, 64), (9, 12), 2), back=True, epilogue=("shift",)
    ),
    "dgrad, classes without taps": lambda: wide_case(
        Layer(dense(64, 64, 1), (9, 12), 2, 0), back=True
    ),
    "1x1": lambda: wide_case(
        Layer(dense(64, 192, 1), (9, 12), 1, 0), epilogue=EPILOGUE, act="silu"
    ),
    "cluster": lambda: wide_case(
        Layer(het(128, 128, 2), (10, 11)), cluster=2, grid=2, epilogue=EPILOGUE
    ),
    "two clusters, a tile too many": lambda: wide_case(
        Layer(het(128, 128, 2), (7, 11)), 1, cluster=2, grid=4, pixels=128, images=2
    ),
    "flattened rows": lambda: wide_case(
        Layer(het(128, 128, 2), (9, 14)), 3, pixels=208, flat=True, epilogue=EPILOGUE
    ),
    "flattened rows, a cluster": lambda: wide_case(
        Layer(het(128, 192, 2), (5, 17)), 5, pixels=224, flat=True, cluster=2, epilogue=EPILOGUE
    ),
    "flattened rows, dgrad": lambda: wide_case(
        Layer(dense(64, 72), (7, 9)), 9, torch.float16, back=True, act="gelu", pixels=208, flat=True
    ),
    "flattened rows, 5x5, some channels read at one tap": lambda: wide_case(
        Layer(scattered((2, 2), (1, 1), (0, 1)), (4, 11), padding=2),
        7,
        pixels=224,
        flat=True,
        stages=1,
    ),
    "flattened rows, 1x1": lambda: wide_case(
        Layer(dense(64, 192, 1), (4, 8), 1, 0), 9, pixels=208, flat=True, epilogue=EPILOGUE
    ),
    "cluster, four classes": lambda: wide_case(
        Layer(dense(64, 64), (9, 12), 2), back=True, cluster=2, grid=4, epilogue=("shift",)
    ),
}


def test_layers_match_the_oracle(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shim.run([make() for make in CASES.values()], tmp_path)


def random_case(seed: int) -> shim.Case:
    """A case that nobody thought of; its blocks of weights are live by lot, some filters dead."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    filters, channels = (8 * int(n) for n in rng.integers(1, 20, 2))
    kernel = int(rng.choice([1, 2, 3, 3, 3, 5]))
    shape = -(-filters // 8), -(-channels // 32), kernel, kernel
    live = rng.random(shape) < rng.uniform(0.05, 1.0)
    mask = live.repeat(8, axis=0).repeat(32, axis=1)[:filters, :channels]
    mask[0, 0, 0, 0] = True
    padding = int(rng.integers(0, kernel // 2 + 1))
    sizes = [int(n) for n in rng.integers(kernel, 20, 2)]
    layer = Layer(mask, (sizes[0], sizes[1]), int(rng.choice([1, 1, 2])), padding)
    asked = [name for name in EPILOGUE if rng.integers(2)]
    cluster = int(rng.integers(1, 3))
    flat = layer.stride == 1 and bool(rng.integers(2))
    heights = [208, 224] if flat else [64, 64, 128, 224]
    return wide_case(
        layer,
        int(rng.integers(1, 5)),
        (torch.bfloat16, torch.float16)[int(rng.integers(2))],
        back=bool(rng.integers(2)),
        act=str(rng.choice(shim.ACTS)),
        epilogue=tuple(asked),
        pixels=int(rng.choice(heights)) if layer.stride == 1 else 64,
        flat=flat,
        images=int(rng.integers(1, 5)),
        stages=int(rng.integers(1, 3)),
        slots=int(rng.integers(2, 4)),
        cluster=cluster,
        grid=cluster * int(rng.integers(1, 4)),
    )


def test_random_cases_match_the_oracle(tmp_path: Path) -> None:
    cases = [random_case(seed) for seed in range(24)]
    shim.run(cases, tmp_path, seed=5)
    numbers = [case.numbers for case in cases]
    assert {n["cluster"] for n in numbers} == {1, 2}
    assert {n["class_count"] for n in numbers} >= {1, 4}
    assert {(n["pixels"], n["flat_pitch"] > 0) for n in numbers} >= {
        *((64, False), (128, False), (224, False), (208, True), (224, True))
    }
    stacks = {int(images) for case in cases for images in case.arrays["classes"][:, 4]}
    assert len(stacks) > 1


def test_two_runs_agree_bit_for_bit(tmp_path: Path) -> None:
    """Whatever order the threads run in and the copies land in: every seed has another one."""
    torch.manual_seed(0)
    cases = [CASES[name]() for name in ("cluster", "stacked images")]
    found = set()
    for seed in range(4):
        done = shim.execute(cases, tmp_path, seed=seed)
        assert done.returncode == 0, done.stderr
        found.add((tmp_path / "results").read_bytes())
    assert len(found) == 1


# The shim can fail ------------------------------------------------------------------------------


def simple(cluster: int = 1) -> shim.Case:
    """A case of several tiles a block, two segments and two blocks of channels."""
    how = {"grid": 2, "cluster": cluster, "epilogue": ("residual",)}
    return wide_case(Layer(het(128, 128, 2), (10, 11)), **how)


@pytest.mark.parametrize(
    ("mistake", "at", "said"),
    [
        ("skip-phase", 0, "race|nobody has written|copy is on its way"),  # halo or slab: multiply
        ("skip-phase", 1, "race|nobody has written|copy is on its way"),
        ("skip-phase", 9, "race|copy is on its way"),
        ("skip-arrive", 0, "deadlock"),
        ("skip-arrive", 5, "deadlock"),
        ("skip-fence", 0, "without a fence"),
        ("skip-fence", 1, "without a fence"),
        ("skip-products-wait", 1, "race"),  # computed: the slab is overwritten
        ("skip-products-wait", 10, "race|differ"),  # computed: the halo is
        ("skip-named", 1, "race"),  # residual: added
        ("skip-named", 2, "race"),  # results: written out
        ("skip-bulk", 3, "deadlock"),
        ("skip-copy", 100, "nobody has written"),
        ("wrong-operand", 7, "nobody has written|outside of|not ordered|where a barrier lies"),
        ("wrong-address", 0, "outside of"),
    ],
)
@pytest.mark.parametrize("cluster", [1, 2])
def test_mistakes_are_found(mistake: str, at: int, said: str, cluster: int, tmp_path: Path) -> None:
    done = shim.execute([simple(cluster)], tmp_path, (mistake, str(at)))
    assert done.returncode == 3, f"not found: {done.stderr}"
    assert any(words in done.stderr for words in said.split("|")), done.stderr


def test_results_wait_for_those_of_the_tile_before(tmp_path: Path) -> None:
    """Seven parts take turns in two buffers, so that the next tile begins where the last ended."""
    case = wide_case(Layer(dense(64, 64), (29, 8)), pixels=224, grid=1)
    done = shim.execute([case], tmp_path, ("skip-named", "8"))
    assert done.returncode == 3
    assert "race" in done.stderr, done.stderr


def test_ending_before_its_copies_is_found(tmp_path: Path) -> None:
    done = shim.execute([simple()], tmp_path, ("skip-wait", "0"))
    assert "ends with copies that it never waited for" in done.stderr


def test_leaving_a_cluster_too_early_is_found(tmp_path: Path) -> None:
    """Only where a block runs ahead of the other, which few seeds make it do."""
    case = wide_case(Layer(dense(64, 64), (8, 8)), 2, cluster=2, grid=2)
    found = [shim.execute([case], tmp_path, ("skip-cluster", "1"), seed) for seed in range(12)]
    assert any("which has ended" in done.stderr for done in found)


def test_reading_past_the_end_of_a_tensor_is_found(tmp_path: Path) -> None:
    case = simple()
    case.numbers["image_h"] += 1
    done = shim.execute([case], tmp_path)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("table", "change", "said"),
    [
        ("steps", lambda t: t + 200, "nobody has written|outside of"),
        ("steps", lambda t: t[::-1], "differ"),
        ("rows", lambda t: t[:, ::-1], "differ"),
        ("source", lambda t: np.roll(t, 1), "differ"),
        ("blocks", lambda t: t + (np.arange(16) == 14), "nobody has written|differ"),
    ],
    ids=[
        *("windows outside of the halo", "taps exchanged", "segments exchanged", "weights moved"),
        "a column that is read not brought",
    ],
)
def test_wrong_tables_are_found(
    table: str, change: Callable[[np.ndarray], np.ndarray], said: str, tmp_path: Path
) -> None:
    case = simple()
    case.arrays[table] = np.ascontiguousarray(change(case.arrays[table]))
    with pytest.raises(AssertionError, match=said):
        shim.run([case], tmp_path)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    for name, value, said in (
        ("pixels", 96, "64, 128, 224 or 256 pixels"),
        ("pixels", 208, "with flattened rows for 208 or 224"),
        ("flat_pitch", 15, "64, 128, 224 or 256 pixels"),
        ("dtype", 0, "bf16 and fp16"),
        ("cluster", 3, "one or two blocks"),
        ("slots", 1, "two or more slots"),
        ("plane_pitch", 128, "multiple of eight"),
        ("stages", 30, "do not fit"),
    ):
        case = simple()
        case.numbers[name] = value
        numbers = case.numbers
        numbers["shared"] = numbers["stages"] * numbers["plane_pitch"] * 128 + 18432
        numbers["shared"] += numbers["slots"] * 16384
        numbers["shared"] += 16 * (numbers["stages"] + 2 * numbers["slots"] + 1)
        done = shim.execute([case], tmp_path)
        assert done.returncode == 3
        assert said in done.stderr or name == "dtype", done.stderr
