"""An emulator of NVIDIA GPUs that runs compiled Triton kernels on the CPU.

Triton compiles a kernel for a real GPU architecture as usual. The PTX (NVIDIA's assembly language) that comes out is
then executed here, with numpy, instead of being handed to ptxas and a GPU. Inside of ``with driver.emulated(90):``
kernels launch on CPU tensors as if these lay on an sm_90 GPU; ``python -m tests.emulator`` (``make emulate``) runs the
cases of ``dampr verify`` and a core set on every architecture. An instruction that the emulator does not know raises
``Trap: not emulated: ...`` and names it.

Besides computing numbers, the emulator checks: loads and stores outside of a tensor (in gaps of strided views too),
alignment, limits of shared memory and grid, barriers that only a part of a CTA reaches, warp-wide instructions in
divergent warps, and races. It sees three kinds of races: on shared memory, between warps since the last barrier; on
results of cp.async, wgmma and tcgen05 that are used before they are waited for; on global memory, between CTAs and,
since the last barrier, between warps. A note "read of shared memory that nobody wrote" is no fault by itself, since
Triton prefetches past the last step and reads whole 8 x 8 matrices. Such memory is full of NaN, so a value that counted
would show in the results.

The emulator does not see what ptxas makes of the PTX (its bugs, spills), time, the memory model beyond barriers, races
within a warp, streams and graphs, and the vendor's matrix products and convolutions (torch's on the CPU run instead). A
matrix product is summed in float64 and rounded once per instruction.
"""
