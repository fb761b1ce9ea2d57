"""torch.cuda over the simulated device of simulated_cuda.cpp. Imported by sitecustomize.py, before torch.

A CPU build of torch lacks the Python side of CUDA: streams, events, graphs, memory figures. These stand in for it, as
far as fastar uses it. Under `FASTAR_REHEARSAL_COUNTS=1` a process prints its launches and waits when it ends.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
import time
from typing import Any

_device = ctypes.CDLL(os.environ["FASTAR_SIMULATED_CUDA"], ctypes.RTLD_GLOBAL)
_INT, _TEXT = ctypes.c_int64, ctypes.c_char_p
for _name, _result, _arguments in (
    ("sim_allocated", _INT, ()),
    ("sim_peak", _INT, ()),
    ("sim_reset_peak", None, ()),
    ("sim_limit", None, (_INT,)),
    ("sim_stream", _INT, (_INT,)),
    ("sim_current_stream", _INT, ()),
    ("sim_ticket", _INT, ()),
    ("sim_run_until", None, (_INT, _INT)),
    ("sim_queued", _INT, (_INT,)),
    ("sim_wait", ctypes.c_int, (_TEXT,)),
    ("sim_sync_errors", None, (_INT,)),
    ("sim_sync_names", _TEXT, ()),
    ("sim_launches", _TEXT, ()),
    ("sim_begin_capture", None, (_INT,)),
    ("sim_end_capture", _INT, ()),
    ("sim_replay", None, (_INT,)),
    ("sim_forget", None, (_INT,)),
    ("sim_is_capturing", _INT, ()),
    ("sim_seed", None, (_INT,)),
):
    _function = getattr(_device, _name)
    _function.restype, _function.argtypes = _result, _arguments

import torch  # noqa: E402
import torch.cuda  # noqa: E402

NAME = "simulated"
TOTAL_BYTES = 80 << 30
DEVICE = torch.device("cuda", 0)


def launches() -> dict[str, int]:
    """Operations run on the device so far, and how often; a kernel or more each."""
    return _counts(_device.sim_launches())


def waits() -> dict[str, int]:
    """What waited for the device so far, and how often."""
    return _counts(_device.sim_sync_names())


def _counts(text: bytes) -> dict[str, int]:
    return {name: int(count) for name, _, count in (line.rpartition("=") for line in text.decode().splitlines())}


def _wait(what: str) -> None:
    refused = _device.sim_wait(what.encode())
    if refused == 1:
        raise RuntimeError(f"CUDA error (simulated): operation not permitted when stream is capturing: {what}")
    if refused == 2:
        raise RuntimeError(f"called a synchronizing CUDA operation: {what}")


class Stream:
    """A queue of copies; all else runs at once."""

    _count = 0

    def __init__(self, device: Any = None, priority: int = 0, *, stream_id: int | None = None, **_: Any) -> None:
        if stream_id is None:
            Stream._count += 1
            stream_id = Stream._count
        self.stream_id = self.cuda_stream = stream_id
        self.device = DEVICE

    def wait_event(self, event: Event) -> None:
        event._pass()

    def wait_stream(self, other: Stream) -> None:
        _device.sim_run_until(other.stream_id, _device.sim_ticket())

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        _wait("Stream.synchronize")
        self.wait_stream(self)

    def query(self) -> bool:
        return int(_device.sim_queued(self.stream_id)) == 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.stream_id == self.stream_id

    def __hash__(self) -> int:
        return hash(self.stream_id)


class Event:
    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed = enable_timing
        self._place: tuple[int, int] | None = None
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self._place = (stream or current_stream()).stream_id, _device.sim_ticket()
        self._time = time.perf_counter()

    def _pass(self) -> None:
        if self._place is not None:
            _device.sim_run_until(*self._place)

    def wait(self, stream: Stream | None = None) -> None:
        self._pass()

    def synchronize(self) -> None:
        _wait("Event.synchronize")
        self._pass()

    def query(self) -> bool:
        self._pass()
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self._timed and end._timed):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True'.")
        if self._place is None or end._place is None:
            raise RuntimeError("Both events must be recorded before calculating elapsed time.")
        return max(1e-6, (end._time - self._time) * 1e3)


def current_stream(device: Any = None) -> Stream:
    return Stream(stream_id=int(_device.sim_current_stream()))


class _UseStream:
    """torch.cuda.stream."""

    def __init__(self, stream: Stream | None) -> None:
        self._stream = stream

    def __enter__(self) -> None:
        if self._stream is not None:
            self._before = _device.sim_stream(self._stream.stream_id)

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            _device.sim_stream(self._before)


class _UseDevice:
    """torch.cuda.device."""

    def __init__(self, device: Any) -> None:
        if torch.device(device).index not in (None, 0):
            raise RuntimeError("CUDA error (simulated): invalid device ordinal")

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        return


class CUDAGraph:
    def __init__(self, keep_graph: bool = False) -> None:
        self._captured: int | None = None

    def replay(self) -> None:
        if self._captured is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        _device.sim_replay(self._captured)

    def reset(self) -> None:
        if self._captured is not None:
            _device.sim_forget(self._captured)
            self._captured = None

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    def __del__(self) -> None:
        self.reset()


class _Capture:
    """torch.cuda.graph: captures on a stream of its own, or the one given."""

    def __init__(
        self, graph: CUDAGraph, pool: Any = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self._graph = graph
        self._stream = stream or Stream()

    def __enter__(self) -> None:
        synchronize()
        self._before = _device.sim_stream(self._stream.stream_id)
        _device.sim_begin_capture(self._stream.stream_id)

    def __exit__(self, *_: object) -> None:
        self._graph._captured = _device.sim_end_capture()
        _device.sim_stream(self._before)


def synchronize(device: Any = None) -> None:
    _wait("torch.cuda.synchronize")
    for number in range(Stream._count + 1):
        _device.sim_run_until(number, _device.sim_ticket())


class _Properties:
    name, major, minor, total_memory, multi_processor_count, warp_size = NAME, 9, 0, TOTAL_BYTES, 132, 32
    max_threads_per_multi_processor, regs_per_multiprocessor, gcnArchName = 2048, 65536, ""
    L2_cache_size, shared_memory_per_block_optin, is_integrated = 50 << 20, 232448, 0


def _cap(fraction: float, device: Any = None) -> None:
    # As torch: a device without an index is refused.
    torch.cuda._utils._get_device_index(device)  # type: ignore[attr-defined]
    _device.sim_limit(int(fraction * TOTAL_BYTES) if fraction < 1 else 0)


def _clone_storage(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    if storage.device.type != "cuda":
        return _plain_clone(storage)
    whole = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(storage, 0, (storage.nbytes(),), (1,))
    return whole.clone().untyped_storage()


_plain_clone = torch.UntypedStorage.clone


def _install() -> None:
    cuda: Any = torch.cuda
    binding: Any = torch._C
    torch.version.cuda = NAME
    # Answers that never change; a function each, since torch.compile tells functions by identity.
    for name, answer in {
        **dict.fromkeys(("init", "_lazy_init", "set_device", "empty_cache", "seed_all")),
        **dict.fromkeys(("current_device", "_exchange_device", "_maybe_exchange_device"), 0),
        **dict.fromkeys(("is_available", "is_initialized", "_is_compiled"), True),
        "device_count": 1,
        "get_device_name": NAME,
        "get_device_capability": (9, 0),
        "get_device_properties": _Properties(),
        "is_bf16_supported": True,
        "memory_stats": {},
        "memory_snapshot": [],
    }.items():
        setattr(cuda, name, _always(answer))
    for name, answer in {
        **dict.fromkeys(("_cuda_init", "_cuda_setDevice", "_cuda_emptyCache")),
        **dict.fromkeys(("_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"), 0),
        "_cuda_getDeviceCount": 1,
        "_cuda_memoryStats": {},
    }.items():
        setattr(binding, name, _always(answer))
    binding._cuda_isInBadFork = False
    binding._cuda_getCurrentRawStream = lambda index=0: _device.sim_current_stream()
    binding._cuda_getCurrentStream = lambda index=0: (_device.sim_current_stream(), 0, 1)
    binding._cuda_isCurrentStreamCapturing = lambda: bool(_device.sim_is_capturing())
    binding._cuda_resetPeakMemoryStats = lambda device=0: _device.sim_reset_peak()
    binding._cuda_synchronize = lambda: synchronize()
    cuda.is_current_stream_capturing = lambda: bool(_device.sim_is_capturing())
    cuda.synchronize = synchronize
    cuda.set_sync_debug_mode = lambda mode: _device.sim_sync_errors(mode in ("error", 2))
    cuda.Stream = cuda.streams.Stream = Stream
    cuda.Event = cuda.streams.Event = Event
    cuda.stream, cuda.device, cuda.CUDAGraph, cuda.graph = _UseStream, _UseDevice, CUDAGraph, _Capture
    cuda.current_stream, cuda.default_stream = current_stream, lambda device=None: Stream(stream_id=0)
    cuda.mem_get_info = lambda device=None: (TOTAL_BYTES - _device.sim_allocated(), TOTAL_BYTES)
    cuda.memory_allocated = lambda device=None: int(_device.sim_allocated())
    cuda.memory_reserved = lambda device=None: int(_device.sim_allocated())
    cuda.max_memory_allocated = lambda device=None: int(_device.sim_peak())
    cuda.max_memory_reserved = lambda device=None: int(_device.sim_peak())
    cuda.reset_peak_memory_stats = lambda device=None: _device.sim_reset_peak()
    cuda.set_per_process_memory_fraction = _cap
    cuda.manual_seed = lambda seed: _device.sim_seed(int(seed) % 2**63)
    cuda.manual_seed_all = lambda seed: _device.sim_seed(int(seed) % 2**63)
    cuda.default_generators = (torch.Generator(device="cuda"),)
    cuda.get_rng_state = lambda device="cuda": cuda.default_generators[0].get_state()
    cuda.set_rng_state = lambda state, device="cuda": cuda.default_generators[0].set_state(state)
    torch.UntypedStorage.clone = _clone_storage  # type: ignore[method-assign]


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer


_install()


def _report() -> None:
    waited = ", ".join(f"{name} {count}" for name, count in sorted(waits().items(), key=lambda pair: -pair[1]))
    print(f"simulated GPU: {sum(launches().values()):,} launches; waits: {waited or 'none'}", file=sys.stderr)


if os.environ.get("FASTAR_REHEARSAL_COUNTS") == "1":
    atexit.register(_report)
