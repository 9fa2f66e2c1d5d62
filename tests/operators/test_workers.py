"""Threads, forked children, DataLoader workers, fresh interpreters: no shared state that breaks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import pytest
import torch
from reference import assert_equal

from lenet_ext import Net


def _python(code: str, timeout: float = 120, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, **env},
        check=False,
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


def test_many_python_threads():
    """The GIL is no protection where a kernel releases it, nor for a cache in Python."""
    net = Net()
    batches = [torch.randn(n, 1, 32, 32) for n in (1, 3, 16, 33)]
    with torch.no_grad():
        expected = [net(x) for x in batches]
    expected_grads = [torch.autograd.grad(net(x).sum(), list(net.parameters())) for x in batches]
    errors: list[BaseException] = []

    def work(i: int):
        try:
            for k in range(12):
                j = (i + k) % len(batches)
                with torch.no_grad():
                    assert_equal(net(batches[j]), expected[j], "logits")
                grads = torch.autograd.grad(net(batches[j]).sum(), list(net.parameters()))
                for a, b in zip(grads, expected_grads[j], strict=True):
                    assert_equal(a, b, "grad")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    assert not errors, errors[0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_child():
    """One thread in the child after a threaded parent: what stock manages, and DataLoader workers do."""
    out = _python(
        """
        import os, torch, lenet_ext
        torch.manual_seed(0)
        net, x = lenet_ext.Net(), torch.randn(64, 1, 32, 32)
        torch.set_num_threads(2)
        net(x).sum().backward()
        with torch.no_grad():
            expected = net(x)
        pid = os.fork()
        if pid == 0:
            torch.set_num_threads(1)
            with torch.no_grad():
                ok = torch.equal(net(x), expected)
            net.zero_grad()
            net(x).sum().backward()
            os._exit(0 if ok and net.conv1.weight.grad.any() else 3)
        _, status = os.waitpid(pid, 0)
        print("child", os.waitstatus_to_exitcode(status))
        """
    )
    assert out.split() == ["child", "0"]


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.extended)])
def test_dataloader_worker(tmp_path, context):
    """A frozen net as part of the data set's transform, computed in two worker processes."""
    (tmp_path / "worker_test.py").write_text(
        textwrap.dedent(
            f"""
            import torch, lenet_ext

            class Embedded(torch.utils.data.Dataset):
                def __init__(self):
                    torch.manual_seed(0)
                    self.net = lenet_ext.Net().eval()
                    self.images = torch.randn(12, 1, 32, 32)
                def __len__(self):
                    return 12
                def __getitem__(self, i):
                    with torch.no_grad():
                        return self.net(self.images[i][None])[0]

            if __name__ == "__main__":
                data = Embedded()
                data[0]
                loader = torch.utils.data.DataLoader(
                    data, batch_size=4, num_workers=2, multiprocessing_context={context!r}, timeout=100
                )
                result = torch.cat(list(loader))
                assert torch.equal(result, torch.stack([data[i] for i in range(12)]))
                print("loaded", len(result))
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(tmp_path / "worker_test.py")], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "loaded 12" in done.stdout


def test_number_of_threads_is_left_alone():
    before = torch.get_num_threads()
    Net()(torch.randn(64, 1, 32, 32)).sum().backward()
    assert torch.get_num_threads() == before


def test_default_dtype_and_device_do_not_matter():
    """torch.set_default_dtype(float64) changes what Net() makes, not what a kernel does with float32."""
    out = _python(
        """
        import torch, lenet_ext
        x, w = torch.randn(2, 3, 9, 9), torch.randn(4, 3, 3, 3)
        before = lenet_ext.functional.conv_relu_max_pool2d(x, w)
        torch.set_default_dtype(torch.float64)
        after = lenet_ext.functional.conv_relu_max_pool2d(x, w)
        assert after.dtype == torch.float32 and torch.equal(before, after)
        assert lenet_ext.Net().conv1.weight.dtype == torch.float64
        torch.set_default_device("meta")
        assert torch.equal(lenet_ext.functional.conv_relu_max_pool2d(x, w), before)
        assert lenet_ext.Net().conv1.weight.device.type == "meta"
        print("fine")
        """
    )
    assert out.split() == ["fine"]


def test_omp_num_threads():
    out = _python(
        """
        import torch, lenet_ext
        torch.manual_seed(0)
        net, x = lenet_ext.Net(), torch.randn(70, 1, 32, 32)
        net(x).sum().backward()
        print(net.conv1.weight.grad.isfinite().all().item())
        """,
        OMP_NUM_THREADS="5",
    )
    assert out.split() == ["True"]
