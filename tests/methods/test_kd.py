"""Distillation from trained teachers."""

from collections.abc import Callable

import pytest
import torch

from okddip.errors import ConfigError
from okddip.methods.base import Losses, Method
from okddip.outputs import GroupOutput

MakeMethod = Callable[..., Method]
ONE = torch.tensor(1.0)


def losses(method: Method, student: torch.Tensor, teacher: torch.Tensor) -> Losses:
    output = GroupOutput(student, torch.zeros(1, 6, 64), None, teacher)
    return method(output, torch.arange(6), ONE)


def test_the_student_imitates_the_mean_of_its_teachers_softened_predictions(make_method: MakeMethod) -> None:
    method = make_method("kd", "method.teacher=[a,b]")
    student, teachers = torch.randn(1, 6, 10), torch.randn(2, 6, 10)
    found = losses(method, student, teachers)
    mean = (teachers / 3).softmax(-1).mean(0)
    expected = 9 * torch.nn.functional.kl_div((student[0] / 3).log_softmax(-1), mean, reduction="batchmean")
    torch.testing.assert_close(found.parts["soft"], expected)
    assert method.measured == ("student", "teacher", "teacher0", "teacher1")
    torch.testing.assert_close((found.predictions[1] / 3).softmax(-1), mean)
    assert torch.equal(found.predictions[2:], teachers)


def test_two_equal_teachers_teach_what_one_does(make_method: MakeMethod) -> None:
    student, teacher = torch.randn(1, 6, 10), torch.randn(6, 10)
    one = losses(make_method("kd", "method.teacher=a"), student, teacher)
    listed = losses(make_method("kd", "method.teacher=[a]"), student, teacher)
    two = losses(make_method("kd", "method.teacher=[a,a]"), student, torch.stack([teacher, teacher]))
    assert torch.equal(one.total, listed.total)
    torch.testing.assert_close(one.total, two.total)


@pytest.mark.parametrize("teacher", ["[]", "3", "[a,3]", "[[a]]"])
def test_what_names_no_teacher_is_refused(make_method: MakeMethod, teacher: str) -> None:
    with pytest.raises(ConfigError, match=r"^method\.teacher( is not set|=)"):
        make_method("kd", f"method.teacher={teacher}")
