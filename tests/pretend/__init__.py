"""A pretend accelerator: tensors that say they live on cuda:0 (or cuda:1, mps, xpu) and compute on the CPU.

It needs no GPU, no compiler and no CUDA build of PyTorch. What it does:

- An operation whose tensors live on different devices raises as CUDA would (0-dim CPU tensors, CPU index tensors and
  copies are let through, as there), and is written down as a violation.
- What makes the host wait for the device is counted, with the line of the project that asked for it: `.item()`,
  `.tolist()`, `.cpu()`, `nonzero`, boolean masks, `torch.tensor(..., device=)`, pageable copies and the like.
- Kernel launches are counted, by the line of the project that caused them.
- Streams are kept apart: a tensor written on one stream and read on another without an event between is a violation
  (a data race on a GPU), and so is one that is freed while a stream that was not `record_stream`ed may still read it.
- Page-locked memory is remembered, so that copies are told apart: pinned and asynchronous, pinned and blocking,
  pageable.
- As `mps` it has no float64, no page-locked memory and no streams.

How: a wrapper subclass (`torch.Tensor._make_wrapper_subclass`) over a CPU tensor. Its C++ device is PrivateUse1, with
the device guard in Python that torch ships from 2.9 on (`_setup_privateuseone_for_python_backend`), and `.device` in
Python says `cuda:0`. Factories (`torch.arange(..., device=)`) and `torch.cuda.*` are patched while it is on.

    with PretendDevice() as device:
        model = model.to("cuda:0")
        ...
        with device.watch() as seen:
            llm.prefill(question, chunks)
        print(seen.syncs, seen.launches)

What it cannot see: which kernels CUDA has, their rounding, and how long anything takes. Its tensors cannot be pickled
or deep-copied or change their shape in place, and no compiled model or CUDA graph runs on it.
"""

from pretend.device import PretendDevice
from pretend.seen import CrossDeviceError, Seen
from pretend.streams import Event, Stream
from pretend.tensor import PretendTensor

__all__ = ["CrossDeviceError", "Event", "PretendDevice", "PretendTensor", "Seen", "Stream"]
