"""What a pretend device writes down, and what each operation costs on a GPU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

FREE = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "select",
        "slice",
        "transpose",
        "permute",
        "t",
        "expand",
        "unsqueeze",
        "squeeze",
        "as_strided",
        "detach",
        "alias",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "diagonal",
        "empty",
        "empty_like",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "lift_fresh",
        "lift",
        "unfold",
        "narrow",
        "view_as",
        "expand_as",
        "numel",
        "sym_size",
        "sym_stride",
        "sym_numel",
        "sym_storage_offset",
        "movedim",
        "swapaxes",
        "is_same_size",
        "_local_scalar_dense",
        "record_stream",
        "is_pinned",
        "_pin_memory",
    ]
)  # views and allocations: no kernel
KERNELS = {
    "sort": 4,
    "topk": 3,
    "argsort": 4,
    "nonzero": 4,
    "unique2": 8,
    "_unique2": 8,
    "unique_dim": 10,
    "isin": 10,
    "cumsum": 2,
    "masked_select": 6,
}  # more than one each
SYNCING = frozenset(
    [
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "equal",
        "is_nonzero",
        "bincount",
    ]
)
CAT_BATCH = 64  # tensors that one launch of a strided `cat` takes (Shape.cu)


class CrossDeviceError(RuntimeError):
    """What CUDA would have raised."""


@dataclass
class Seen:
    """What happened while it watched.

    Attributes:
        launches: kernels launched.
        ops: launches by operation.
        by_line: launches by the line of the project that caused them.
        sync_lines: how often the host waited for the device, by what and where.
        copies: copies between host and device, by kind.
        copied_bytes: bytes of these.
        copy_lines: copies, by kind and where.
        violations: what a GPU would have refused or done wrong, by what and where.
    """

    launches: int = 0
    ops: Counter[str] = field(default_factory=Counter)
    by_line: Counter[str] = field(default_factory=Counter)
    sync_lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[str] = field(default_factory=Counter)
    copied_bytes: Counter[str] = field(default_factory=Counter)
    copy_lines: Counter[tuple[str, str]] = field(default_factory=Counter)
    violations: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def syncs(self) -> int:
        """How often the host waited for the device."""
        return sum(self.sync_lines.values())

    def table(self, top: int = 12) -> str:
        """Return the figures as text."""
        lines = [f"launches {self.launches}, host syncs {self.syncs}, copies {dict(self.copies)}"]
        lines += [f"  sync  x{n:<4} {what:34s} {where}" for (what, where), n in self.sync_lines.most_common()]
        lines += [f"  copy  x{n:<4} {what:34s} {where}" for (what, where), n in self.copy_lines.most_common(top)]
        lines += [f"  VIOLATION x{n} {what}  at {where}" for (what, where), n in self.violations.most_common()]
        lines += [f"  launch x{n:<5} {where}" for where, n in self.by_line.most_common(top)]
        return "\n".join(lines)
