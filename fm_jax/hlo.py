"""What a compiled program does between devices, and how long its compiler thinks the rest takes: read from HLO text.

Layer 0: text in, figures out. `compiled.as_text()` is the one description of a program that every backend gives;
`cost_analysis()` counts the body of a loop once, so a model of scanned layers looks as large as one of them.

    for c in hlo.collectives(compiled.as_text(), mesh.shape): ...
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute",
         "collective-broadcast")
_BITS = dict(pred=8, s2=2, u2=2, s4=4, u4=4, s8=8, u8=8, s16=16, u16=16, bf16=16, f16=16, s32=32, u32=32, f32=32,
             s64=64, u64=64, f64=64, c64=64, c128=128)
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .* )?\{")
_OP = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
_CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations|true_computation|false_computation)="
                     r"(\{[^}]*\}|%?[\w.\-]+)")
_BETWEEN_SLICES = re.compile(r'"xla_megascale_runtime".*_xla_megascale_transfer_type="(\w+)"')   # of a TPU's sends
_UNKNOWN_CYCLES = 10 ** 12   # the compiler writes the largest integer where it has no estimate


class Collective(NamedTuple):
    """One collective operation of a program.

    nbytes: of the whole array on one device each time: what is gathered, reduced (before it is scattered) or sent.
    times: how often a run of the program does it. overlapped: other work goes on between its start and its end.
    """

    kind: str
    axes: tuple[str, ...]   # of the mesh, along which the devices of a group differ
    nbytes: float
    times: int
    overlapped: bool


class Op(NamedTuple):
    shape: str
    name: str
    rest: str      # operands and attributes


def collectives(text: str, mesh_shape: dict[str, int]) -> list[Collective]:
    """Returns the collectives of a compiled program that is partitioned over a mesh of this shape."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    behind = _asynchronous(computations)
    out = []
    for name, ops in computations.items():
        targets = " ".join(op.rest for op in ops if op.name == "custom-call")
        # A TPU's fused asynchronous collective: its start, its steps and its end each repeat the operation.
        starts = "AsyncCollectiveStart" in targets
        fused = starts or "async_collective" in name or "AsyncCollectiveDone" in targets
        for op in ops if times[name] and (starts or not fused) else ():
            kind = op.name.removesuffix("-start")
            if op.name == "send" and (found := _BETWEEN_SLICES.search(op.rest)):
                kind = found[1].lower().replace("_", "-")
                kind = kind if kind in KINDS else "collective-permute"
                out.append(Collective(kind, ("slice",), _bytes(op, 1), times[name], True))
            elif kind in KINDS:
                group, axes = _group(op.rest, mesh_shape)
                overlapped = (fused or name in behind or op.name.endswith("-start")
                              or "async_collective_name=" in op.rest)
                nbytes = _bytes(op, group)
                if name.startswith("all-reduce-scatter"):   # a TPU's fusion of the sum with the slice kept of it
                    kind = "reduce-scatter"
                if group > 1:
                    out.append(Collective(kind, axes, nbytes, times[name], overlapped))
    return out


def cycles(text: str) -> int:
    """Returns the compiler's own estimate of a TPU program's cycles, loops counted; 0 where it wrote none.

    Without collectives, and without Pallas kernels, for which it has no estimate.
    """
    computations, entry = _computations(text)
    times, total = _times(computations, entry), 0
    for name, ops in computations.items():
        for op in ops:
            found = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
            if found and op.name.removesuffix("-start").removesuffix("-done") not in KINDS:
                total += (int(found[1]) if int(found[1]) < _UNKNOWN_CYCLES else 0) * times[name]
    return total


def kernels(text: str) -> int:
    """Returns how often a run of a TPU program calls Pallas kernels."""
    computations, entry = _computations(text)
    times = _times(computations, entry)
    return sum(times[name] for name, ops in computations.items() for op in ops
               if 'custom_call_target="tpu_custom_call"' in op.rest)


def _computations(text):
    """Returns ({name: its Ops}, name of the entry)."""
    found, here, entry = {}, None, None
    for line in text.splitlines():
        if line[:1].strip():
            if match := _COMPUTATION.match(line):
                here = found[match[2]] = []
                entry = match[2] if match[1] else entry
        elif here is not None and (match := _OP.match(line)):
            here.append(Op(*match.groups()))
    return found, entry


def _times(computations, entry):
    """Returns {computation: how often it runs in one run of the program}."""
    called = collections.defaultdict(list)
    for name, ops in computations.items():
        for op in ops:
            if op.name == "while":
                body = re.search(r"body=%?([\w.\-]+)", op.rest)[1]
                called[name].append((body, _trips(op, computations)))
                continue
            for match in _CALLED.finditer(op.rest):
                called[name] += [(other, 1) for other in re.findall(r"[\w.\-]+", match[1]) if other in computations]
    times = collections.Counter()

    def run(name, n):
        times[name] += n
        for other, m in called[name]:
            run(other, n * m)

    run(entry, 1)
    return times


def _trips(loop, computations):
    """Returns how often a loop runs: known to the compiler, or the one constant of its condition; 1 where neither."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = computations.get(re.search(r"condition=%?([\w.\-]+)", loop.rest)[1], [])
    constants = [int(match[1]) for op in condition if op.name == "constant"
                 and (match := re.match(r"(\d+)\)", op.rest))]
    return constants[0] if len(constants) == 1 else 1


def _asynchronous(computations):
    """Returns the computations that an async-start runs beside others."""
    return {other for ops in computations.values() for op in ops if op.name == "async-start"
            for match in _CALLED.finditer(op.rest) for other in re.findall(r"[\w.\-]+", match[1])}


def _bytes(op, group):
    """Returns the bytes of the whole array on one device, from the shape of what an operation over `group` gives."""
    sizes = [(kind, math.prod(map(int, filter(None, dims.split(",")))) * bits / 8)
             for kind, dims in _SHAPE.findall(op.shape)
             if (bits := _BITS.get(kind, 8 if kind.startswith("f8") else 4 if kind.startswith("f4") else 0))]
    if op.name in ("send", "collective-permute-start"):               # counters beside them
        sizes = [s for s in sizes if s[0] not in ("u32", "s32")] or sizes
    total = sum(b for _, b in sizes)
    if op.name in ("all-gather-start", "reduce-scatter-start"):       # operands and results, of which one is the whole
        return total * group / (group + 1)
    if op.name.endswith("-start") and op.name != "all-reduce-start":  # operands and results of one size
        return total / 2
    return total * group if op.name == "reduce-scatter" else total


def _group(rest, mesh_shape):
    """Returns (devices in a group, mesh axes along which they differ)."""
    sizes, names = tuple(mesh_shape.values()), tuple(mesh_shape)
    if match := re.search(r"replica_groups=(\[\d+,\d+\]<=\S+)", rest):
        member = _iota(match[1])[0]
    elif match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? \{([^}]*)\}", rest):
        # By the axes of a mesh of the compiler's own: 'axis_1', or a part of it as 'axis_1':(before it)size.
        whole = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        count = math.prod(whole.values())
        ids = _iota(f"[{count}]<={match[2] or f'[{count}]'}").reshape(*whole.values())
        within = {name: (int(before or 1), int(size or whole[name]))
                  for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", match[3])}
        steps = [np.arange(size) * (n // before // size) for name, n in whole.items()
                 for before, size in [within.get(name, (n, 1))]]
        member = ids[np.ix_(*steps)].ravel()
    elif match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        pairs = np.array([[int(x) for x in p] for p in re.findall(r"\{(\d+),(\d+)\}", rest.partition(
            "source_target_pairs=")[2].partition("}}")[0] + "}")])
        at = np.array(np.unravel_index(pairs, sizes))
        axes = tuple(name for name, a in zip(names, at) if (a[:, 0] != a[:, 1]).any())
        return (math.prod(mesh_shape[a] for a in axes), axes) if axes else (1, ())
    elif match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        member = np.array([int(d) for d in match[1].split(",")])
    elif "replica_groups={}" in rest:           # all
        member = np.arange(math.prod(sizes))
    else:
        raise ValueError(f"a form of groups that is not known here: {rest[:300]}")
    at = np.unravel_index(member, sizes)
    return len(member), tuple(name for name, a in zip(names, at) if len(set(a.tolist())) > 1)


def _iota(text):
    """Returns the array of device numbers that "[4,2]<=[2,4]T(1,0)" writes: counted, transposed, reshaped."""
    shape, counted, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    numbers = lambda written: [int(n) for n in written.split(",")]
    ids = np.arange(math.prod(numbers(counted))).reshape(numbers(counted))
    return (ids.transpose(numbers(order)) if order else ids).reshape(numbers(shape))
