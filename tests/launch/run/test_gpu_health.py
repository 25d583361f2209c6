"""What NVML says of GPUs, from a stand-in of its bindings: broken, worth a warning, or not to be asked."""

import ast
import inspect
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepwarm.launch.cli import doctor
from keepwarm.launch.run import gpu_health, gpu_watch, node_check
from keepwarm.launch.run.gpu_health import look, problems, warnings
from keepwarm.launch.run.gpu_watch import GpuWatch
from keepwarm.trainer.job.files import load_job, save_job
from tests.launch.run.fake_nvml import FakeGpu, FakeNvml

DEADLINE = 60.0


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    """A server of two GPUs."""
    fake = FakeNvml(FakeGpu(uuid="GPU-aaaa"), FakeGpu(uuid="GPU-bbbb"))
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for module in (gpu_watch, node_check, doctor):
        monkeypatch.setattr(module, "gpu_count", lambda: len(fake.gpus))
    yield fake
    until(lambda: fake.open in (0, 1))  # a watch may still be open, and a look that is late about to end


def until(ready: Callable[[], Any]) -> Any:
    end = time.monotonic() + DEADLINE
    while not (found := ready()):
        assert time.monotonic() < end
        time.sleep(0.01)
    return found


def used() -> set[str]:
    """Every name of the bindings that the product uses."""
    names: set[str] = set()
    for module in (gpu_health, gpu_watch):
        source = inspect.getsource(module)
        tree = ast.parse(source)
        names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
    return {name for name in names if re.fullmatch(r"(nvml|NVML)[A-Za-z0-9_]+", name)}


def test_names_of_the_stand_in_and_of_the_product_are_those_of_the_real_bindings() -> None:
    import pynvml

    assert {"nvmlDeviceGetRemappedRows", "NVML_NVLINK_ERROR_DL_CRC_DATA", "NVMLError_Timeout"} <= used()
    fake = FakeNvml()
    for name in sorted(used()):
        real, mine = getattr(pynvml, name), getattr(fake, name)
        if isinstance(real, int):
            assert real == mine, name
        elif inspect.isfunction(real):
            wanted = [*inspect.signature(real).parameters.values()]
            given = [*inspect.signature(mine).parameters.values()]
            required = [one for one in wanted if one.default is one.empty]
            assert len(required) == len(given), name
    for name in ("NVMLError_GpuIsLost", "NVMLError_NotSupported", "NVMLError_Timeout"):
        assert issubclass(getattr(pynvml, name), pynvml.NVMLError)


def test_healthy_gpus_have_no_problem(nvml: FakeNvml) -> None:
    seen = look()
    assert (seen.driver, [gpu.uuid for gpu in seen.gpus]) == ("575.57.08", ["GPU-aaaa", "GPU-bbbb"])
    assert seen.gpus[0].link_errors == 0
    assert problems(seen, seen) == warnings(seen) == []
    assert nvml.open == 0


def test_problems_name_the_gpu_and_what_is_wrong(nvml: FakeNvml) -> None:
    before = look()
    nvml.gpus[0].uncorrected = 2
    nvml.gpus[1].rows = (0, 1, 0, 1)
    assert problems(look(), before) == [
        "GPU 0: 2 new uncorrectable ECC errors in its memory",
        "GPU 1: its memory is broken and cannot be remapped any more",
    ]
    assert problems(look(), look()) == problems(look()) == [problems(look())[0]]  # old ECC errors were dealt with
    nvml.gpus[1].lost = True
    assert problems(look())[-1] == "GPU 1 cannot be used: GPU is lost"
    del nvml.gpus[1]
    assert problems(look(), before)[-1] == "GPU 1 is gone: the driver does not list it any more"


def test_warnings_are_no_problems(nvml: FakeNvml) -> None:
    nvml.gpus[0].clocks = 0x40 | 0x04  # too hot; and capped, which is usual
    nvml.gpus[0].rows = (1, 1, 1, 0)
    nvml.gpus[1].links = [0, 3]
    assert problems(look()) == []
    assert warnings(look()) == [
        "GPU 0 needs a reset: rows of its memory are to be remapped",
        "GPU 0 is slowed down: too hot (slowed by the hardware)",
        "GPU 1: 3 NVLink errors since its counters were reset",
    ]


def test_gpu_without_ecc_and_links_is_healthy(nvml: FakeNvml) -> None:
    nvml.gpus = [FakeGpu(uuid="GPU-cccc", supports=False)]
    (gpu,) = look().gpus
    assert (gpu.uncorrected, gpu.remap_pending, gpu.link_errors, gpu.lost) == (None, None, None, "")
    assert problems(look(), look()) == []


@pytest.mark.parametrize(("chosen", "found"), [("1", [1]), ("GPU-aaaa", [0]), ("1,0", [0, 1]), ("", [])])
def test_look_sees_the_gpus_that_are_visible_to_its_node(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, chosen: str, found: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert [gpu.index for gpu in look().gpus] == found


def test_missing_bindings_or_driver_are_a_reason(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    nvml.broken = "Driver Not Loaded"
    assert look().skipped == "NVML: Driver Not Loaded"
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert look().skipped == "nvidia-ml-py is not installed: pip install 'keepwarm[gpu]'"


def test_node_check_refuses_a_broken_gpu_and_another_number_or_driver(nvml: FakeNvml, tmp_path: Path) -> None:
    save_job(load_job(Path("configs/ci/tiny.yaml"), []), tmp_path / "run.json")
    here = node_check.look(tmp_path)
    assert (here["gpus"], here["gpu_driver"], here["gpu_problems"]) == (2, "575.57.08", [])
    assert node_check.problems(here, here) == []
    assert node_check.problems(here | {"gpus": 1, "gpu_driver": "1"}, here) == [
        "gpus is 1, not 2",
        "gpu_driver is 1, not 575.57.08",
    ]
    nvml.gpus[1].lost = True
    assert node_check.problems(node_check.look(tmp_path), here) == ["GPU 1 cannot be used: GPU is lost"]


def test_doctor_shows_the_health_of_gpus(nvml: FakeNvml) -> None:
    def shown() -> tuple[bool, str]:
        (found,) = (one for one in doctor.findings() if one.name == "NVML")
        return found.usable, found.detail

    assert shown() == (True, "2 healthy GPUs, driver 575.57.08")
    nvml.gpus[0].links = [5]
    assert shown() == (False, "GPU 0: 5 NVLink errors since its counters were reset")


def test_watch_reports_fatal_errors_of_its_own_gpus_and_new_counts(nvml: FakeNvml) -> None:
    watch = GpuWatch()
    nvml.gpus[0].uncorrected = 7  # long ago
    watch.start()
    until(lambda: len(nvml.watched) == 2)
    assert watch.problem() is None
    for xid in (31, 43, 79):  # of programs, and the bus
        nvml.xids.put((nvml.gpus[1], xid))
    nvml.xids.put((FakeGpu(uuid="GPU-of-another-job"), 79))
    assert until(watch.problem) == "GPU 1: Xid 79, GPU has fallen off the bus"
    assert watch.problem() is None  # it is reported once
    nvml.gpus[0].uncorrected = 8
    assert watch.problem() == "GPU 0: 1 new uncorrectable ECC errors in its memory"
    watch.close()


def test_watch_takes_a_driver_that_does_not_answer_for_a_problem(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = GpuWatch()
    watch.start()
    until(lambda: len(nvml.watched) == 2)
    answers = threading.Event()
    nvml.before_look = answers.wait
    monkeypatch.setattr(gpu_watch, "ANSWER_TIMEOUT_S", 0.2)
    assert watch.problem() == "the driver of its GPUs has not answered within 0.2 s"
    answers.set()
    watch.close()


def test_watch_without_gpus_or_bindings_does_nothing(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, module in (([], nvml), (nvml.gpus, None)):
        nvml.gpus = list(gpus)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        watch = GpuWatch()
        watch.start()
        assert watch.problem() is None
