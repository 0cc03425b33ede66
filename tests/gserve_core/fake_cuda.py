"""A CUDA driver with GPUs of our choice, for machines without one."""

import subprocess
from pathlib import Path

SOURCE = """
#include <stdlib.h>
#include <string.h>
static const char *visible(void) { const char *it = getenv("CUDA_VISIBLE_DEVICES"); return it ? it : "0,1"; }
int cuInit(unsigned flags) { return getenv("CUDA_IS_BROKEN") ? 999 : 0; }
int cuDeviceGetCount(int *count) {
  *count = 0;
  for (const char *at = visible(); *at; at++) *count += *at != ',';
  return 0;
}
int cuDeviceGet(int *device, int index) { *device = visible()[2 * index] - '0'; return 0; }
int cuDeviceGetName(char *name, int most, int device) { strncpy(name, device ? "Small" : "Large", most); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)(device ? 24 : 80) << 30; return 0; }
int cuDeviceGetAttribute(int *value, int which, int device) {
  if (which != 16) return 1;
  *value = device ? 50 : 132;
  return 0;
}
"""


def make_driver(folder: Path) -> None:
    """Write libcuda.so.1 to a folder: GPU 0 has 132 multiprocessors and 80 GiB, GPU 1 has 50 and 24 GiB."""
    source = folder / "cuda.c"
    source.write_text(SOURCE)
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", folder / "libcuda.so.1", source], check=True)
