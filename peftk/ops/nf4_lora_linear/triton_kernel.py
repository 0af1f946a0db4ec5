"""triton_thin.py beside nf4_linear's kernels."""

from functools import partial

from peftk.ops.nf4_linear.triton_kernel import KERNELS
from peftk.ops.nf4_lora_linear import on_gpu, triton_thin

run, run_backward = partial(on_gpu.run, KERNELS, triton_thin), partial(on_gpu.run_backward, KERNELS, triton_thin)
run_many, run_many_backward = (partial(f, KERNELS, triton_thin) for f in (on_gpu.run_many, on_gpu.run_many_backward))
kernel, kernel_backward = partial(on_gpu.kernel, KERNELS), partial(on_gpu.kernel_backward, KERNELS)
