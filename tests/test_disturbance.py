# SPDX-License-Identifier: Apache-2.0
"""Other work on the machine is seen, and nothing is concluded from what it spoilt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from torch import nn

import hetconv_kernels as hk
from benchmarks import compare, record, table
from benchmarks.report import tables
from benchmarks.report.schema import problems
from hetconv_kernels.compression import base
from hetconv_kernels.errors import SpeedupError
from hetconv_kernels.measure import disturbance, timing
from hetconv_kernels.measure.disturbance import Disturbance, Watch, far_above, judged, spinning
from hetconv_kernels.measure.explanation import Candidate, Explanation
from hetconv_kernels.measure.profiling.record import LayerProfile, Profile
from hetconv_kernels.measure.roofline import Roofs
from hetconv_kernels.measure.samples import Timings

ROOT = Path(__file__).parents[1]
BUSY = Disturbance(("others kept 1.9 of 2 cores busy",), 0.5, (1.0, 2.0), 1.9, 8.0)


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disturbance, "_BEST", {})


def watched(
    spins: list[float],
    ceilings: tuple[float, float] = (1.0, 1.0),
    others: float = 0.0,
    load: float = 0.0,
) -> Disturbance:
    """Watches a measurement of ten seconds on a machine that is made of numbers."""
    left = iter([*[1.0] * 3, *spins])
    ceiling = iter([ceilings[0]] * 3 + [ceilings[1]] * 3)
    busy = iter([(100.0, 50.0), (100.0 + 10 * others + 15.0, 65.0)])
    clock = iter([0.0, 10.0])
    watch = Watch(
        spin=lambda: next(left), ceiling=lambda: next(ceiling), busy=lambda: next(busy),
        load=lambda: load, now=lambda: next(clock),
    )  # fmt: skip
    for _ in spins:
        watch.tick()
    return watch.finish()


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(disturbance, "cores", lambda: 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("two_cores")
def test_a_quiet_machine_has_nothing_to_say() -> None:
    found = watched([1.0, 1.1, 1.0, 1.2, 1.0], (1.0, 1.1), others=0.1, load=3.0)
    assert found.reasons == ()
    assert found.others == pytest.approx(0.1)
    assert found.ceiling == (1.0, 1.1)


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (lambda: watched([1.0, 1.0, 2.0]), "33% of the spins"),
        (lambda: watched([1.0] * 5, (1.0, 2.0)), "1.00× the best time at the begin, 2.00× at the"),
        (lambda: watched([1.0] * 5, (2.0, 1.0)), "2.00× the best time at the begin"),
        (lambda: watched([1.0] * 5, others=0.5), "others kept 0.5 of 2 cores busy"),
        (lambda: watched([1.0] * 5, load=9.0), "the load average was 9.0 on 2 cores"),
    ],
    ids=["spin", "ceiling at the end", "ceiling at the begin", "others", "load"],
)
def test_each_sign_of_other_work_is_told(seen: Callable[[], Disturbance], said: str) -> None:
    assert said in " ".join(seen().reasons)


def test_a_machine_that_was_busy_from_the_first_sample_is_known_by_an_earlier_best() -> None:
    assert watched([1.0] * 5).slow_spins == 0
    later = iter([5.0] * 8)
    watch = Watch("meta", spin=lambda: next(later), busy=lambda: None, load=lambda: 0.0)
    for _ in range(5):
        watch.tick()
    found = watch.finish()
    assert found.slow_spins == 1.0
    assert found.ceiling is None
    assert found.reasons


def test_free_cores_may_be_used_by_others() -> None:
    assert judged(0.0, (1.0, 1.0), 5.0, 7.0, threads=2, cores=8) == ()
    assert judged(0.0, (1.0, 1.0), 6.5, 7.0, threads=2, cores=8)


def test_a_real_spin_and_ceiling_take_time_and_others_are_not_negative() -> None:
    watch = Watch()
    watch.tick()
    found = watch.finish()
    assert found.others is None or found.others >= 0
    assert found.ceiling is not None
    assert min(found.ceiling) >= 1.0
    assert 0 <= found.slow_spins <= 1


def test_busy_shared_cores_name_the_spinning_barrier_and_the_way_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    said = " ".join(judged(0.0, None, 2.0, 0.0, threads=2, cores=2))
    assert "OMP_WAIT_POLICY=passive" in said
    assert "barrier spins" in said
    assert "barrier" not in " ".join(judged(0.0, None, 2.0, 0.0, threads=1, cores=2))
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "OMP_WAIT_POLICY=" not in spinning(2, 2)
    assert "OMP_NUM_THREADS" in spinning(2, 2)
    assert "OMP_WAIT_POLICY=passive" in (ROOT / "docs" / "benchmarks.md").read_text()


# The clock ------------------------------------------------------------------------------------


class Scripted:
    """Stands for a Watch: says what it is told to, one answer a measurement."""

    def __init__(self, *answers: Disturbance) -> None:
        self.answers, self.ticks = list(answers), 0

    def __call__(self) -> Any:
        return self

    def tick(self) -> None:
        self.ticks += 1

    def finish(self) -> Disturbance:
        return self.answers.pop(0)


def measured(watch: Any, **more: Any) -> Timings:
    calls = {"a": lambda: None, "b": lambda: None}
    return timing.interleaved(calls, rounds=7, warmup=0, min_time=0.0, watch=watch, **more)


def test_a_disturbed_measurement_says_so_and_keeps_its_samples() -> None:
    watch = Scripted(BUSY)
    found = measured(watch)
    assert found.disturbed == BUSY.reasons
    assert watch.ticks == 7
    assert len(found.samples["a"]) == 7
    assert found.to_dict()["disturbance"]["reasons"] == list(BUSY.reasons)
    assert found.to_dict()["disturbance"]["others"] == 1.9


def test_a_disturbed_measurement_is_taken_again_as_often_as_allowed() -> None:
    watch = Scripted(BUSY, BUSY, Disturbance(), BUSY)
    found = measured(watch, retake=3)
    assert found.disturbed == ()
    assert watch.ticks == 21
    assert len(found.samples["a"]) == 7
    assert measured(Scripted(BUSY, BUSY), retake=1).disturbed == BUSY.reasons


def test_an_undisturbed_measurement_is_taken_once() -> None:
    watch = Scripted(Disturbance())
    assert measured(watch, retake=3).disturbed == ()
    assert watch.ticks == 7


def test_the_benchmark_fixture_is_watched_too(benchmark: Any) -> None:
    watch = Scripted(BUSY)
    assert measured(watch, benchmark=benchmark).disturbed == BUSY.reasons
    assert watch.ticks in (7, 0 if benchmark.disabled else 7)


def test_without_a_watch_nothing_is_claimed() -> None:
    found = Timings("a", {"a": (1.0,)}, {"a": 1})
    assert found.disturbed == ()
    assert "disturbance" not in found.to_dict()


# Verdicts -------------------------------------------------------------------------------------


def timings(found: Disturbance | None, ours: float = 1e-3) -> Timings:
    samples = {"dense": (2e-3,) * 8, "composition:a": (2e-3,) * 8, "ours": (ours,) * 8}
    return Timings("dense", samples, dict.fromkeys(samples, 1), disturbance=found)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_no_verdict_is_made_from_a_disturbed_measurement(ratio: float) -> None:
    estimate = {"low": ratio * 0.9, "high": ratio * 1.1}
    assert record.verdict(estimate, BUSY.reasons) == "disturbed"
    assert record.verdict(estimate) in ("win", "even", "lose")


def test_rows_tables_and_comparisons_carry_the_mark() -> None:
    row = record.dispatch_row("without grad", "auto", 1e-9, timings(BUSY, 5e-3))
    assert row["disturbed"] == list(BUSY.reasons)
    assert problems(row, record_schema("DISPATCH_ROW")) == []
    shown = table.dispatch_table([row])[2]
    assert "disturbed" in shown
    assert "missed" not in shown
    verdict, cells = tables._dispatch(row)
    assert verdict == "disturbed"
    assert not [cell for cell in cells if cell.mark in ("win", "lose")]
    quiet = record.dispatch_row("without grad", "auto", 1e-9, timings(Disturbance(), 5e-3))
    assert "disturbed" not in quiet
    assert "missed" in table.dispatch_table([quiet])[2]
    assert tables._dispatch(quiet)[0] == "lose"
    assert compare._change("a", quiet, row, 0.05).verdict == "disturbed"
    assert compare._change("a", row, quiet, 0.05).verdict == "disturbed"
    assert compare._change("a", quiet, quiet, 0.05).verdict == "same"


def record_schema(name: str) -> Any:
    from benchmarks.report import schema

    return getattr(schema, name)


def test_a_layer_row_that_was_disturbed_is_neither_lost_nor_missed() -> None:
    estimate = {"ratio": 0.5, "low": 0.4, "high": 0.6}
    case = {"name": "a", "issue": "", "expected": "win", "target": 2.0, "dtype": "float32",
            "amp": False, "training": False}  # fmt: skip
    row: dict[str, Any] = {
        "kind": "layer", "case": case, "backend": {"asked": "cpu", "ran": "cpu"}, "macs": 1,
        "dense_macs": 2, "bytes": 1, "match": {"ok": True}, "median_s": 1.0, "floor_s": 0.5,
        "percent_of_roof": 50.0, "dense": estimate, "composition": estimate, "unfrozen": None,
        "prepacked": None, "verdict": "disturbed", "disturbed": ["others"],
    }  # fmt: skip
    verdict, cells = tables._layer(row)
    assert verdict == "disturbed"
    text = " ".join(cell.text for cell in cells)
    assert "disturbed, not judged" in text
    assert "missed" not in text
    assert "▼" not in text
    assert not tables.lost_to_composition(row)
    assert table.layer_table([row])[2].endswith("disturbed")
    del row["disturbed"]
    assert tables._layer(row | {"verdict": "lose"})[0] == "lose"


def test_no_committed_result_is_a_disturbed_one() -> None:
    for path in (ROOT / "benchmarks" / "results").rglob("*.json"):
        assert '"disturbed"' not in path.read_text(), path.name


# What users see -------------------------------------------------------------------------------


def explained(measured_s: float, disturbed: tuple[str, ...]) -> Explanation:
    candidates = (
        Candidate("cpu", (), 1.0, 1e-4, measured_s, ()),
        Candidate("vendor", (), 1.0, 1e-4, 1e-4, ()),
    )
    return Explanation("layer", "input", ((1, 1),), 1, 0.5, 1, 2, "cpu", False, candidates,
                       disturbed)  # fmt: skip


def test_explain_concludes_nothing_from_disturbed_times() -> None:
    assert explained(2e-4, ()).faster_than_dense is False
    assert "measured slower" in str(explained(2e-4, ()))
    disturbed = explained(2e-4, BUSY.reasons)
    assert disturbed.faster_than_dense is None
    assert "measured slower" not in str(disturbed)
    assert "disturbed, nothing is concluded: others kept" in str(disturbed)


def test_explain_and_profile_say_when_measured_is_far_above_predicted() -> None:
    assert "cpu took 9 times what was predicted" in str(explained(9e-4, ()))
    assert "predicted:" not in str(explained(2e-4, ()))
    layer = LayerProfile("conv", "HetConv2d", 1, 9e-4, 1.0, 1, 2, 1, 1.0, "cpu", "because",
                         predicted_seconds=1e-4)  # fmt: skip
    shown = str(Profile("M", "x", 1e-3, 1e-4, (layer,), {}, 1, BUSY.reasons))
    assert "Far above what is predicted: conv (9 times)" in shown
    assert "disturbed, nothing is concluded" in shown
    near = LayerProfile("conv", "HetConv2d", 1, 2e-4, 1.0, 1, 2, 1, 1.0, "cpu", "because",
                        predicted_seconds=1e-4)  # fmt: skip
    assert "Far above" not in str(Profile("M", "x", 1e-3, 1e-4, (near,), {}, 1))


@pytest.mark.parametrize(
    ("measured_s", "predicted_s", "far"),
    [
        (None, 1.0, False),
        (1.0, None, False),
        (1.0, 0.0, False),
        (2.9, 1.0, False),
        (3.1, 1.0, True),
    ],
)
def test_far_above(measured_s: float | None, predicted_s: float | None, far: bool) -> None:
    assert far_above(measured_s, predicted_s) is far


def test_profile_predicts_layers_of_ours_and_no_others() -> None:
    model = nn.Sequential(hk.nn.HetConv2d(8, 8, 3, p=2), nn.Conv2d(8, 8, 3)).eval()
    roofs = {"float32": Roofs(1e11, 1e10, "cpu", "float32")}
    found = hk.profile(model, torch.randn(1, 8, 9, 9), rounds=5, max_seconds=0.1, roofs=roofs)
    ours, plain = found.layers
    assert ours.predicted_seconds is not None
    assert ours.predicted_seconds > 0
    assert plain.predicted_seconds is None


def test_a_required_speed_up_is_not_judged_by_a_disturbed_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compressed(disturbed: tuple[str, ...], required: float) -> Any:
        real = base.clock.time_networks

        def whole(*arguments: Any) -> Any:
            return real(*arguments)._replace(disturbed=disturbed, speedup=(2.0, 1.9, 2.1))

        with monkeypatch.context() as patch:
            patch.setattr(base.clock, "time_networks", whole)
            return hk.compress(
                nn.Sequential(nn.Conv2d(8, 8, 3)), hk.methods.Het(p=2, epochs=0, stem=True),
                example=torch.randn(1, 8, 6, 6), progress=False, measure_seconds=0.02,
                require_speedup=required,
            )  # fmt: skip

    assert compressed((), 1.5).disturbed == ()
    with pytest.raises(SpeedupError, match=r"2\.00×"):
        compressed((), 3.0)
    for required in (1.5, 3.0):
        with pytest.raises(SpeedupError, match="cannot be said: the measurement is disturbed") as e:
            compressed(BUSY.reasons, required)
        assert e.value.report.disturbed == BUSY.reasons
        assert "disturbed, nothing is concluded" in str(e.value.report)


def test_benchmark_disable_checks_and_measures_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pytest_benchmark")
    done = fresh.python(
        "", "benchmarks", "-q", "--benchmark-disable",
        "-k", "lose-tiny or (dispatch and without)", "--results", str(tmp_path),
        "--backend", "vendor", "--seconds", "0.2", module="pytest",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "hetconv layers" not in done.stdout
    assert "Median" not in done.stdout
    assert list(tmp_path.iterdir()) == []
