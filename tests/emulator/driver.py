"""A Triton driver whose GPU is the emulator.

Triton's real compiler compiles a kernel for a real architecture, and Triton's real JITFunction launches the kernel;
only the driver, which would hand the binary to CUDA, is replaced. Within ``with emulated(80):`` dampr treats CPU
tensors as tensors on a GPU of compute capability 8.0.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend

from tests.emulator import execute, memory, ptx
from tests.emulator.arithmetic import RAW
from tests.emulator.meter import Meter
from tests.emulator.program import Program

# A cache of its own, not Triton's: where Triton stores a cubin, PTX is stored here.
CACHE = Path(tempfile.gettempdir()) / f"dampr-emulator-cache-{os.getuid()}"
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB that a CTA may have
GRID_LIMIT = 2**31 - 1, 65535, 65535
SCALARS = {
    "i1": np.int8,
    "i8": np.int8,
    "i16": np.int16,
    "i32": np.int32,
    "i64": np.int64,
    "u32": np.uint32,
    "u64": np.uint64,
    "fp32": np.float32,
}


IN_PLACE = ("dependency_generator", "norm_stats_join")  # kernels that may write the bytes that they read


@dataclass
class Log:
    """What happened on the emulator: by kernel the number of launches and the largest shared memory in bytes, and notes
    (races and the like), each beginning with its kernel's name.
    """

    launches: Counter[str] = field(default_factory=Counter)
    shared: dict[str, int] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def faults(self) -> list[str]:
        """The notes that mean an error whatever the numbers are: races, loads outside of a tensor or from gaps of a
        view, and bytes that one launch both reads and writes.

        Kernels in IN_PLACE may read and write the same bytes: the one hands values from program to program behind a
        barrier of its own, the other updates running statistics, each program its own channels.
        """
        return [
            note
            for note in self.notes
            if "RACE" in note
            or "outside" in note
            or ("both read" in note and not any(kernel in note for kernel in IN_PLACE))
        ]


@dataclass
class Emulation:
    """The settings of one :func:`emulated` block, and the log of what ran in it."""

    capability: int
    approximate: int | None = None  # seed of the errors of approximate instructions; None: they round correctly
    order: np.random.Generator | None = None  # draws the order in which CTAs run
    edit: Callable[[str], str] | None = None  # changes the PTX of a kernel before it runs
    # (kernel, grid) -> CTAs to run, on paged memory; None: all, on a copy
    chosen: Callable[[str, execute.Grid], np.ndarray] | None = None
    observe: Callable[[Program, execute.Grid], None] | None = None  # called before each launch
    meter: Meter | None = None  # counts what launches do
    recording: bool = False  # launches are logged, and nothing runs
    # address of a table of pointers -> what it points to
    pointed: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    log: Log = field(default_factory=Log)

    def take_log(self) -> Log:
        """The log since the last call; a new one begins."""
        taken, self.log = self.log, Log()
        return taken


_current: Emulation | None = None


def current() -> Emulation:
    """The emulation of the ``with`` block that surrounds the call. Raises RuntimeError outside of any."""
    if _current is None:
        raise RuntimeError("a kernel was launched on the emulator outside of `with emulated(...)`")
    return _current


@functools.lru_cache(maxsize=64)
def program_of(text: str) -> Program:
    """The program of a PTX text. Programs are cached, as translating blocks takes time."""
    return Program(ptx.parse(text))


def bytes_of(storage: torch.UntypedStorage) -> np.ndarray:
    """The bytes of a storage as a uint8 array that shares its memory."""
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _storages(tensors: list[torch.Tensor]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(address, bytes, validity) of each distinct storage, with the bytes that belong to one of the tensors marked."""
    found: dict[int, tuple[torch.UntypedStorage, np.ndarray]] = {}
    for t in tensors:
        storage = t.untyped_storage()
        size, key = storage.nbytes(), storage.data_ptr()
        if size == 0:
            continue
        if key not in found:
            found[key] = storage, np.full(size, memory.GAP, np.uint8)
        inside = torch.zeros(size // t.itemsize, dtype=torch.bool)
        if t.numel():
            inside.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(True)
        marked = np.repeat(inside.numpy(), t.itemsize)
        found[key][1][: len(marked)][marked] = memory.INSIDE
    return [(key, bytes_of(storage), valid) for key, (storage, valid) in found.items()]


class Launcher:
    """Launches a compiled kernel on the emulator; Triton calls it with the arguments that its own launcher takes."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.signature = [kind for kind in source.signature.values() if kind != "constexpr"]
        self.constant = [kind == "constexpr" for kind in source.signature.values()]
        self.metadata = metadata
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise memory.Trap("not emulated: scratch memory")

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        program: Program,
        packed: Any,
        launch: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        grid = x, y, z
        if not all(0 < size <= limit for size, limit in zip(grid, GRID_LIMIT, strict=True)):
            raise memory.Trap(f"{program.function.name}: grid {grid}")
        given = [arg for arg, constant in zip(args, self.constant, strict=True) if not constant]
        tensors = [arg for arg in given if isinstance(arg, torch.Tensor)]
        emulation, name = current(), program.function.name
        if emulation.observe is not None:
            emulation.observe(program, grid)
        if emulation.recording:
            emulation.log.launches[name] += 1
            return
        try:
            (self._run if emulation.chosen is None else self._run_chosen)(emulation, program, grid, given, tensors)
        except memory.Trap as trap:
            shapes = [(tuple(t.shape), t.stride(), str(t.dtype)) for t in tensors]
            scalars = [arg for arg in given if not isinstance(arg, torch.Tensor)]
            raise memory.Trap(f"{name}: {trap}; grid {grid}, tensors {shapes}, scalars {scalars}") from None
        emulation.log.launches[name] += 1
        emulation.log.shared[name] = max(emulation.log.shared.get(name, 0), self.metadata.shared)

    def _run(
        self, emulation: Emulation, program: Program, grid: execute.Grid, given: list[Any], tensors: list[torch.Tensor]
    ) -> None:
        """Run every CTA on copies of the storages that the launch was given; storages that the kernel wrote are copied
        back.
        """
        tables = {
            table.data_ptr(): emulation.pointed[table.data_ptr()]
            for table in tensors
            if table.data_ptr() in emulation.pointed
        }
        storages = _storages([*tensors, *(t for pointed in tables.values() for t in pointed)])
        device = memory.Global(storages, grid[0] * grid[1] * grid[2], program.function.threads)
        for table in tensors:
            if table.data_ptr() in tables:
                _translate(table, tables[table.data_ptr()], device)
        values = self._values(program, given, device)
        if emulation.meter is not None:
            emulation.meter.begin(program.function.name)
        notes = execute.run(
            program,
            grid,
            values,
            device,
            self.metadata.shared,
            emulation.approximate,
            emulation.order,
            meter=emulation.meter,
        )
        device.note_both_ways()
        if emulation.meter is not None:
            emulation.meter.traffic(device)
        self._keep(emulation, program, notes + device.notes)
        for key, data, _ in storages:
            if device.written(key, len(data)):
                start = device.where[key]
                data[:] = device.data[start : start + len(data)]

    def _run_chosen(
        self, emulation: Emulation, program: Program, grid: execute.Grid, given: list[Any], tensors: list[torch.Tensor]
    ) -> None:
        """Run a few CTAs of a launch on tensors that are too large to copy."""
        assert emulation.chosen is not None
        ranges = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        device = memory.Paged(list(ranges.items()), grid[0] * grid[1] * grid[2], program.function.threads)
        ctas = emulation.chosen(program.function.name, grid)
        notes = execute.run(
            program, grid, self._values(program, given, device), device, self.metadata.shared, ctas=ctas
        )
        device.write_back()
        self._keep(emulation, program, notes + device.notes)

    def _values(self, program: Program, given: list[Any], device: memory.Global) -> list[Any]:
        """The numpy scalars of the kernel's parameters: device addresses of tensors, raw bits of numbers, zeros for
        Triton's scratch pointers, which no kernel here uses.
        """
        values: list[Any] = []
        for arg, kind in zip(given, self.signature, strict=True):
            if kind.startswith("*"):
                values.append(np.uint64(_pointer(arg, device)))
            else:
                number: Any = SCALARS[kind](arg)
                values.append(number.view(RAW[number.itemsize]))
        # scratch that no kernel asked for
        return values + [np.uint64(0)] * (len(program.function.params) - len(values))

    @staticmethod
    def _keep(emulation: Emulation, program: Program, notes: Counter[str]) -> None:
        """Add a launch's notes to the log, each with the kernel's name in front."""
        emulation.log.notes.update({f"{program.function.name}: {note}": n for note, n in notes.items()})


def _translate(table: torch.Tensor, pointed: list[torch.Tensor], device: memory.Global) -> None:
    """Replace host addresses in the device's copy of a table, int64 (layers, 4), pointers in the first two columns."""
    known = {t.data_ptr(): _pointer(t, device) for t in pointed}
    start = device.where[table.untyped_storage().data_ptr()]
    words = device.data[start : start + 8 * table.numel()].view(np.int64).reshape(table.shape)
    for i, j in np.ndindex(len(words), 2):
        words[i, j] = known[int(words[i, j])]


def _pointer(arg: torch.Tensor | None, device: memory.Global) -> int:
    """The device address of a tensor's first element; 0 (a null pointer) for None and for a tensor without memory."""
    if arg is None or arg.untyped_storage().nbytes() == 0:
        return 0
    storage = arg.untyped_storage().data_ptr()
    return device.device_address(storage, arg.data_ptr() - storage)


class Utilities:
    """The device properties and the loading of binaries that Triton asks a driver for."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        """The limits of the emulated GPU, under the names of Triton's own driver."""
        limit = SHARED_LIMIT[current().capability] * 1024
        return {"max_shared_mem": limit, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    @staticmethod
    def load_binary(name: str, binary: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """The parsed program in the places of the module and of the function handle; then registers, spills and
        threads.
        """
        text, edit = binary.decode(), current().edit
        program = program_of(text if edit is None else edit(text))
        return program, program, 0, 0, 1024


class Driver(DriverBase):
    """A Triton driver with one device for each compute capability, and one stream."""

    def __init__(self) -> None:
        self.utils, self.launcher_cls = Utilities(), Launcher

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return current().capability  # so that Triton keeps the kernels of each apart

    def get_current_stream(self, device: int) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", current().capability, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("times of an emulated GPU mean nothing")


def _text_for_binary(self: Any, text: Any, metadata: dict[str, Any], options: Any, arch: int) -> bytes:
    """Takes the place of ptxas: the "binary" is the PTX text itself."""
    return text.encode() if isinstance(text, str) else text


def _unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot take a dtype, or None if it can; replaces the check that asks for a CUDA device."""
    from dampr.ops.backend_triton import host

    return None if dtype in host.DTYPE_NAMES else f"it takes float32, bfloat16 and float16, not {dtype}"


def _remembering(real: Callable[[Any], torch.Tensor], emulation: Emulation) -> Callable[[Any], torch.Tensor]:
    """``real``, which makes a table of pointers, wrapped so that the emulation learns which tensors a table
    points to.
    """

    def table_of(held: Any) -> torch.Tensor:
        table = real(held)
        emulation.pointed[table.data_ptr()] = list(held)
        return table

    return table_of


@contextlib.contextmanager
def emulated(capability: int = 80, shuffled: bool = True, **options: Any) -> Iterator[Emulation]:
    """Triton compiles for sm_``capability`` and launches on the emulator, and dampr takes CPU tensors for CUDA tensors.

    ``shuffled``: CTAs run in some order; ``options``: fields of :class:`Emulation`.
    """
    from dampr.ops import backend_triton, backends
    from dampr.ops.backend_triton import dependency_generator, host

    global _current
    kept_driver, kept = getattr(triton.runtime.driver, "_active", None), _current
    emulation = Emulation(capability, order=np.random.default_rng(1) if shuffled else None, **options)
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": os.environ.get("DAMPR_EMULATOR_CACHE", str(CACHE))})
        )
        stack.enter_context(
            mock.patch.object(dependency_generator, "_table", _remembering(dependency_generator._table, emulation))
        )
        # Backends that are selected in the block must not stay selected after it.
        stack.enter_context(mock.patch.dict(backends._selected, clear=True))
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", _text_for_binary))
        stack.enter_context(mock.patch.object(backend_triton, "unavailable", _unavailable))
        stack.enter_context(mock.patch.object(host, "capability", return_value=capability))
        _current = emulation
        triton.runtime.driver.set_active(Driver())
        try:
            yield emulation
        finally:
            _current = kept
            triton.runtime.driver._active = kept_driver
