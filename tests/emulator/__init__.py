"""Compiled Triton kernels without a GPU: Triton compiles for a real target, the PTX that comes out runs here, in numpy.

``with driver.emulated(90):`` launches on CPU tensors; ``python -m tests.emulator`` (``make emulate``) runs the cases of
``dampr verify`` and a core set on every architecture. An instruction that is not known raises ``Trap: not emulated:
...`` and names it.

Checked beside the numbers are loads and stores outside of a tensor (gaps of strided views too), alignment, limits of
shared memory and grid, barriers that a part of a CTA reaches, warp-wide instructions in divergent warps, and races:
shared memory between warps since the last barrier; cp.async, wgmma and tcgen05 used before they are waited for; global
memory between CTAs and, since the last barrier, between warps. A note "read of shared memory that nobody wrote" is no
fault by itself: such memory is full of NaN, so a value that counted would show. (Triton prefetches past the last step
and reads whole 8 x 8 matrices.)

Not seen are what ptxas makes of the PTX (its bugs, spills), time, the memory model beyond barriers, races within a
warp, streams and graphs, and the vendor's products and convolutions (torch's on the CPU run instead). Sums of a matrix
product are float64, rounded once per instruction.
"""
