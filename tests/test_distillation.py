# SPDX-License-Identifier: Apache-2.0
"""Distillation: the loss by its formula, what it refuses, and that it trains."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from compressing import batches, run, tiny
from torch import nn

import hetconv_kernels as hk
from hetconv_kernels.compression import WeakSubnetwork
from hetconv_kernels.compression.distillation import Distillation
from hetconv_kernels.errors import ArgumentError, InputTypeError


def given(*rows: list[float]) -> nn.Linear:
    """Builds a network that gives these outputs for the rows of the unit matrix."""
    layer = nn.Linear(len(rows), len(rows[0]), bias=False)
    layer.weight.data = torch.tensor(rows).T.contiguous()
    return layer


def by_formula(student: list[float], teacher: list[float], label: int, w: float, t: float) -> float:
    def softmax(z: list[float], t: float) -> list[float]:
        powers = [math.exp(value / t) for value in z]
        return [power / sum(powers) for power in powers]

    p, q = softmax(teacher, t), softmax(student, t)
    apart = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return -(1 - w) * math.log(softmax(student, 1)[label]) + w * t * t * apart


@pytest.mark.parametrize(("weight", "temperature"), [(0.7, 4.0), (0.0, 4.0), (1.0, 1.0)])
def test_the_loss_is_that_of_the_formula(weight: float, temperature: float) -> None:
    students, teachers = [[1.0, 2, -1], [0, 0.5, 3]], [[2.0, 1, 0], [-1, 0, 4]]
    step = Distillation(given(*teachers), weight, temperature)
    loss = step(given(*students), (torch.eye(2), torch.tensor([0, 2])))
    each = [
        by_formula(student, teacher, label, weight, temperature)
        for student, teacher, label in zip(students, teachers, (0, 2), strict=True)
    ]
    assert loss.item() == pytest.approx(sum(each) / 2, rel=1e-5)


def test_the_teacher_is_a_copy_that_nothing_trains() -> None:
    teacher = tiny().train()
    step = Distillation(teacher, weight=1.0)
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    student = tiny(seed=1)
    first = step(student, batches()[0])
    first.backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in (*teacher.parameters(), *step.teacher.parameters()))
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.zero_()
    assert teacher.training
    assert all(torch.equal(before[k], v) for k, v in step.teacher.state_dict().items())


def test_a_network_of_the_teachers_weights_has_nothing_to_learn_from_it() -> None:
    model = tiny().eval()
    assert Distillation(model, weight=1.0)(model, batches()[0]).item() == pytest.approx(0, abs=1e-6)


def test_compress_trains_towards_the_teacher() -> None:
    """Without labels, the network that learns comes nearer to what the dense one says."""
    dense = tiny().eval()
    with torch.no_grad():
        dense[-1].weight.mul_(20)  # it is sure of what it says
    judge = Distillation(dense, weight=1.0)

    def apart(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(judge(model.eval(), batch).item() for batch in batches())

    without, learned = (
        run(WeakSubnetwork(0.6, epochs=epochs), dense, train_step=judge).model for epochs in (0, 40)
    )
    assert apart(learned) < 0.5 * apart(without)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": 1.5}, "weight of Distillation.*1.5.*from 0 to 1"),
        ({"temperature": 0}, "temperature.*a finite number above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Distillation(tiny(), **settings)


def test_a_teacher_of_other_classes_and_a_batch_that_is_no_pair() -> None:
    other = Distillation(nn.Sequential(nn.Flatten(), nn.Linear(180, 10)))
    with pytest.raises(ArgumentError, match=r"output of the teacher.*\[8, 10\].*\[8, 3\]"):
        other(tiny(), batches()[0])
    with pytest.raises(InputTypeError, match="a pair"):
        Distillation(tiny())(tiny(), torch.randn(2, 5, 6, 6))


def test_it_is_where_the_other_parts_of_compression_are() -> None:
    assert hk.compression.Distillation is Distillation
