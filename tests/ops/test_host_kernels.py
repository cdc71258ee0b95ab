"""The shim that runs CUDA kernels on the CPU notices what only a GPU would suffer from."""

import host_kernels
import pytest
import torch
from host_kernels import HostLaunch

from torch_utils.ops import cubins, cuda_kernels

NEIGHBOURS = """\
#include "common.cuh"

struct Params {
  float* y;
};

__device__ void neighbour(const Params& p) {
  __shared__ float row[64];
  row[threadIdx.x] = threadIdx.x;
  BARRIER
  p.y[64 * blockIdx.x + threadIdx.x] = threadIdx.x > 0 ? row[threadIdx.x - 1] : 0;
  __syncthreads();
  row[threadIdx.x] = -1;
}

ENTRY(neighbour, Params, neighbour)
"""


@pytest.mark.parametrize("barrier", ["__syncthreads();", ""], ids=["barrier", "none"])
def test_a_missing_barrier_shows(barrier, monkeypatch, tmp_path):
    monkeypatch.setattr(host_kernels, "CSRC", tmp_path)
    (tmp_path / "common.cuh").write_text((cubins.SOURCES / "common.cuh").read_text())
    (tmp_path / "row.cu").write_text(NEIGHBOURS.replace("BARRIER", barrier))
    kernel = cuda_kernels.CudaKernel("row", "row.cu", lambda device: None, HostLaunch("row.cu", tmp_path), "cpu")
    y = torch.empty(2, 64)
    kernel.run("neighbour", (2, 1, 1), (64, 1, 1), "P", y.data_ptr(), device=y.device)
    expected = (torch.arange(64.0) - 1).clamp(min=0).expand(2, 64)
    assert torch.equal(y, expected) == bool(barrier)
    with pytest.raises(AssertionError, match="neighbour is compiled for blocks of 256 threads"):
        kernel.run("neighbour", (1, 1, 1), (512, 1, 1), "P", y.data_ptr(), device=y.device)
