"""What is read from a trace of PyTorch's profiler, and how bytes are counted."""

from typing import Any

import pytest
import torch

from okddip.tasks.benchmark.counting import ByteCounter
from okddip.tasks.benchmark.device_use import covered, device_use, overlap
from okddip.tasks.benchmark.settings import settings_for
from okddip.tasks.benchmark.tables import device_lines, settings_table


def event(
    category: str, name: str, begin: float = 0, duration: float = 0, number: int | None = None
) -> dict[str, Any]:
    args = {} if number is None else {"args": {"correlation": number}}
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": duration, **args}


TRACE = [  # two steps, in microseconds
    event("cuda_runtime", "cudaLaunchKernel", 1000, 3),
    event("cuda_driver", "cuLaunchKernelEx", 1004, 3),
    event("cuda_runtime", "cudaGraphLaunch", 1008, 3),
    event("cuda_runtime", "cudaMemcpyAsync", 1010, 3),
    event("cuda_runtime", "cudaDeviceSynchronize", 1015, 900),
    event("kernel", "void cudnn::convolution", 1010, 100),
    event("kernel", "triton_poi_fused_add_0", 1100, 50),  # on another stream, within the first for 10
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1150, 50),
    event("gpu_memset", "Memset (Device)", 1300, 10),
    event("gpu_user_annotation", "Optimizer.step#SGD.step", 1000, 900),
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
]


def test_a_gpu_waits_while_neither_a_kernel_nor_a_copy_runs() -> None:
    use = device_use(TRACE, steps=2, seconds=400e-6)
    share = pytest.approx(1 - 100 / 400)
    assert use == {"idle": share, "waiting": share, "kernels": 1, "launches": 1.5}
    assert device_use(TRACE, steps=2, seconds=50e-6)["waiting"] == 0  # a trace slows the device a little


def test_a_gpu_does_not_wait_for_the_host_between_kernels_that_were_started_before() -> None:
    trace = [
        event("cuda_runtime", "cudaGraphLaunch", 0, 5, number=1),
        *(event("kernel", "one", 10 + 30 * k, 20, number=1) for k in range(3)),  # until 90
        event("cuda_runtime", "cudaLaunchKernel", 110, 5, number=2),
        event("cuda_runtime", "cudaLaunchKernel", 116, 3, number=3),
        event("kernel", "another", 120, 20, number=2),  # was not started in time
        event("kernel", "another", 145, 5, number=3),
    ]
    use = device_use(trace, steps=1, seconds=140e-6)
    assert use["idle"] == pytest.approx(55 / 140)  # 10 + 10 + 30 + 5
    assert use["waiting"] == pytest.approx(30 / 140)


def test_a_gpu_to_which_each_kernel_comes_late_waits_however_long_the_host_takes_to_start_it() -> None:
    trace = []
    for number in range(100):
        trace.append(event("cuda_runtime", "cudaLaunchKernel", 10 * number, 4, number=number))
        trace.append(event("kernel", "short", 10 * number + 6, 2, number=number))
    use = device_use(trace, steps=1, seconds=700e-6)  # without a trace the host is quicker
    assert use["waiting"] == use["idle"] == pytest.approx(500 / 700)


def test_a_trace_without_kernels_says_nothing_of_the_device() -> None:
    assert device_use([each for each in TRACE if each.get("cat") != "kernel"], 2, 1) == {}


def test_intervals_that_overlap_count_once() -> None:
    assert covered([(5, 7), (0, 2), (1, 3), (1, 2)]) == 5
    assert covered([]) == 0
    assert overlap([(0, 4), (6, 8)], [(3, 7)]) == 2


def test_the_bytes_of_operators_are_those_they_read_and_write() -> None:
    a, b = torch.ones(10, 100), torch.ones(10, 100)  # 4,000 bytes each
    for run, expected in (
        (lambda: a + b, 12_000),
        (lambda: a.add_(b), 12_000),
        (lambda: torch.add(a, b, out=torch.empty(10, 100)), 16_000),
        (lambda: torch._foreach_add_([a, b], 1.0), 16_000),
        (lambda: a.t().view(100, 10, 1).detach(), 0),
        (lambda: torch.empty_like(a), 0),
        (lambda: a[:1].expand(10, 100).clone(), 4_000 + 4_000),  # a view of one row of a larger tensor
    ):
        with ByteCounter() as counter:
            run()
        assert counter.total == expected
    with ByteCounter() as counter:
        torch.ones(1).expand(1000) + 1  # one number, read again and again
    assert counter.total == 4 + 4 + 4000


def test_cuda_is_measured_with_graphs_too_and_each_device_from_simple_to_fast() -> None:
    cpu, cuda = (list(settings_for(torch.device(name))) for name in ("cpu", "cuda"))
    assert cuda == ["fp32", "TF32", "bf16", "bf16 compiled", "bf16 CUDA graphs"]
    assert cpu[0] == "fp32"
    assert cpu[-1] in ("fp32 compiled", "bf16 compiled")


def test_what_only_a_gpu_tells_has_its_place_in_the_tables() -> None:
    speed = {"median": 16000.0, "low": 15000.0, "high": 17000.0}
    eager: dict[str, Any] = {
        "setting": "fp32",
        "images_per_second": speed,
        "first_step_seconds": 1.5,
        "step": {"seconds": {"median": 0.008, "low": 0.0075, "high": 0.0085}, **device_use(TRACE, 2, 4e-4)},
        "memory": {"peak_bytes": 2**30, "reserved_bytes": 2**31},
        "flops": {"share_of_peak": 0.25},
        "bytes": {"share_of_copy": 0.5},
    }
    graphs = {**eager, "setting": "bf16 CUDA graphs", "bytes": {}}
    graphs["step"] = {"seconds": {"median": 0.002, "low": 0.002, "high": 0.002}}
    _, head, *rows, _, left_out = settings_table(
        [eager, graphs, {"setting": "bf16 compiled", "reason": "no compiler"}]
    )
    assert head.split()[0:2] == ["training", "step"]
    assert " ".join(rows[0].split()) == ("fp32 8.00 7.50 - 8.50 16,000 1.00x 75.0% 1 2 1,024 25.0% 50.0% 1.5")
    assert rows[1].split()[-8:] == ["4.00x", "-", "-", "-", "1,024", "25.0%", "-", "1.5"]
    assert {len(row) for row in (head, *rows)} == {len(head)}
    assert left_out == "left out: bf16 compiled. no compiler"
    waits, peak = device_lines(eager)
    assert waits.startswith("the GPU runs nothing in 75.0% of the step, and waits for the host in 75.0%; it")
    assert "1,024.0 MiB of tensors, 2,048.0 MiB taken" in peak
    assert settings_table([]) == []
