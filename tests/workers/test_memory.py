"""What doesn't fit into memory is refused at the start, where the kernel would kill the worker."""

import psutil
import pytest

from scheduler.worker import Worker, WorkerRefused
from tests.workers.configs import worker_config
from tests.workers.models import save, tiny
from workers.memory import available

MIB = 2**20


def group(folder, limit: str, used: int, files: int = 0):
    """A control group's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon {used - files}\nactive_file {files // 2}\ninactive_file {files // 2}\n")


@pytest.fixture
def ours(tmp_path):
    listed = tmp_path / "cgroup"
    listed.write_text("4:memory:/elsewhere\n0::/service/worker\n")
    return listed


def test_a_process_may_take_what_the_tightest_of_its_groups_has_left(tmp_path, ours):
    groups = tmp_path / "groups"
    group(groups / "service", str(9 * MIB), 5 * MIB, files=2 * MIB)
    group(groups / "service" / "worker", str(8 * MIB), MIB)
    group(groups / "service" / "other", str(MIB), MIB)
    assert available(groups, ours) == 6 * MIB
    group(groups / "service" / "worker", "max", MIB)
    assert available(groups, ours) == 6 * MIB
    group(groups / "service" / "worker", str(3 * MIB), MIB)
    assert available(groups, ours) == 2 * MIB


@pytest.mark.parametrize("listed", ["", "4:memory:/elsewhere\n", "0::/\n", "0::/gone\n"])
def test_without_limits_it_may_take_what_the_machine_has_left(tmp_path, ours, listed):
    """What others do meanwhile changes it a little."""
    ours.write_text(listed)
    for unlimited in (ours, tmp_path / "none"):
        assert available(tmp_path, unlimited) == pytest.approx(psutil.virtual_memory().available, rel=0.1)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
async def test_a_worker_refuses_a_cache_that_does_not_fit(tmp_path, tensor_parallel):
    """Each of two ranks has room for its half, but not both."""
    # float32 keys and values of 8 positions, of two layers with two heads of 8.
    fits = available() // (2 * 2 * 2 * 8 * 8 * 4)
    config = worker_config(save(tiny("llama"), tmp_path), num_blocks=fits * 3 // 2, tensor_parallel=tensor_parallel)
    told = r"\d+ MiB of keys and values don't fit into the \d+ MiB of memory that are left: lower engine\.num_blocks or"
    with pytest.raises(WorkerRefused, match=told):
        async with Worker(config, patience_s=60):
            pass
