"""What scripts/bench_gpu.py calculates and writes: floors, targets, memory, what the sanitizer said, tables. No GPU is
needed for any of it.

Legend: B sequences, L tokens, D channels, N states of the scan; T tokens, d width (in and out), n parameter tokens of
Pattention.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

SCAN_FORWARD, SCAN_BACKWARD = 0.16, 0.48  # milliseconds, of GOAL_SHAPE in bfloat16 on GOAL_GPU
GOAL_SHAPE, GOAL_GPU = (8, 2048, 1536, 16), "H200"
SHARE_OF_MATRIX = 0.6  # of the measured rate of a large product, at d of WIDE and more
TIMES_FORMULA = {"wide": 0.9, "narrow": 1.3}  # times as fast as the formula under torch.compile
WIDE, NARROW = 1024, 256  # of d: from, and up to
SPARE = 1.1  # of the memory that is counted: an allocator rounds up
WRONG_WAY = 1.05  # how much slower the way that the rule takes may be than the other
KEPT = 64  # tokens between the states that the scan's forward keeps
# Of a multiprocessor, in a clock: instructions of a lane, and exponentials.
LANES = {"nvidia": (128, 16), "amd": (64, 16)}
KERNELS = re.compile(
    r"\b((back_)?ends_kernel|carry_kernel|(for|back)ward_kernel|(first|second)_product|row_sums|score_gradients"
    r"|settle|weight_gradient)\b"
)


class Rates(NamedTuple):
    """Of a GPU, as measured in the run they are for."""

    bytes_per_second: float  # read and written together
    matrix_flops_per_second: float  # of a large product in bfloat16
    clock: float | None  # of its multiprocessors, in hertz; None where it cannot be read
    processors: int
    make: str  # of LANES


def scan_bytes(shape: Sequence[int], element: int) -> dict[str, int]:
    """What forward (in training) and backward must read and write, each tensor once, gated, with a bias of Δ."""
    B, L, D, N = shape
    rows, vectors, states = B * L * D * element, B * L * N * element, 4 * B * D * N
    weights, kept = 4 * (D * N + 2 * D), states * -(-L // KEPT)
    return {
        "forward": 4 * rows + 2 * vectors + weights + kept + states,  # x, dt, z, y; B, C; A, D, bias; states
        "backward": 7 * rows + 4 * vectors + 2 * weights + kept,  # x, dt, z, dy, dx, d_dt, dz; B, C, dB, dC
    }


def scan_floors(
    shape: Sequence[int], element: int, rates: Rates, instructions: dict[str, float | None]
) -> dict[str, dict[str, float | None]]:
    """Milliseconds below which no scan goes, for each pass: its bytes; one exponential for every state of every token;
    ``instructions``, of the kernel at hand, for every such state. None where the clock or their number is not known."""
    B, L, D, N = shape
    moved, states = scan_bytes(shape, element), B * L * D * N
    lanes, exponentials = LANES[rates.make]
    per_second = None if rates.clock is None else rates.clock * rates.processors
    found: dict[str, dict[str, float | None]] = {}
    for way in ("forward", "backward"):
        each = instructions.get(way)
        found[way] = {
            "bytes": 1e3 * moved[way] / rates.bytes_per_second,
            "exponentials": None if per_second is None else 1e3 * states / (exponentials * per_second),
            "issue": None if per_second is None or each is None else 1e3 * states * each / (lanes * per_second),
        }
    return found


def pattention_flops(T: int, d: int, n: int) -> int:
    """Useful ones, forward and backward: two products and four. What is made again does not count."""
    return 12 * T * n * d


def pattention_bytes(T: int, d: int, n: int, chunk: int, slots: int) -> int:
    """What forward and backward in sixteen bits may have at once beside x, keys, values and the gradient that comes in:
    O(T d + n d + chunk n). ``slots``: tiles of columns, each with a partial sum for every row of a chunk."""
    rows = min(chunk, T)
    outputs = 2 * 2 * T * d + 4 * T  # the output, the gradient of x, sums of squares
    weights = (4 + 2) * 2 * n * d  # gradients of keys and values, in float32 and then narrow
    return outputs + weights + rows * (3 * 2 * n + 4 * slots + 4)


def targets(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Each with what was found, the goal, and whether it is met: None where it was not measured, or not on the GPU it
    is set for."""
    found = [*_scan_targets(report), *_pattention_targets(report)]
    return [row | {"met": None} for row in found] if report["machine"]["interpreted"] else found


def _scan_targets(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    name = report["machine"]["device"]
    rows = [r for r in report.get("scan", ()) if tuple(r["shape"]) == GOAL_SHAPE and r["dtype"] == "bfloat16"]
    for way, goal in (("forward", SCAN_FORWARD), ("backward", SCAN_BACKWARD)):
        found = rows[0]["milliseconds"][way].get("triton") if rows else None
        at = f"scan {way}, {' × '.join(map(str, GOAL_SHAPE))} bfloat16, ms, on an {GOAL_GPU}"
        counts = GOAL_GPU in name
        yield _target(at, found, goal, most=True) | ({} if counts else {"met": None})


def _pattention_targets(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    rows = report.get("pattention", ())
    wide, narrow = [r for r in rows if r["shape"][1] >= WIDE], [r for r in rows if r["shape"][1] <= NARROW]
    for theta in dict.fromkeys(row["theta"] for row in rows):
        here = [row for row in wide if row["theta"] == theta]
        share = _of_all(min, here, "share_of_matrix_rate")
        yield _target(f"Pattention {theta}, d ≥ {WIDE}: share of the measured matrix rate", share, SHARE_OF_MATRIX)
        for label, those, which in ((f"d ≥ {WIDE}", here, "wide"), (f"d ≤ {NARROW}", narrow, "narrow")):
            times = _of_all(min, [row for row in those if row["theta"] == theta], "times_formula")
            at = f"Pattention {theta}, {label}: times as fast as the formula under torch.compile"
            yield _target(at, times, TIMES_FORMULA[which])
    if rows:
        yield _target("Pattention: memory, of the formula's", _of_all(max, rows, "memory_of_formula"), 1.0, most=True)
        counted = _of_all(max, rows, "memory_of_counted")
        yield _target("Pattention: memory, of O(T d + n d + chunk n) as counted", counted, SPARE, most=True)
    if report.get("norms"):
        wrong = _of_all(max, report["norms"], "rule_over_best")
        yield _target("Pattention: the norm's way by rule, time over the faster one", wrong, WRONG_WAY, most=True)


def _of_all(which: Any, rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """The worst; None if one was not measured."""
    values = [row[key] for row in rows]
    return None if None in values or not values else which(values)


def _target(name: str, found: float | None, goal: float, *, most: bool = False) -> dict[str, Any]:
    met = None if found is None else (found <= goal if most else found >= goal)
    return {"target": name, "found": found, "goal": goal, "most": most, "met": met}


def sanitizer_verdict(output: str) -> dict[str, Any]:
    """What compute-sanitizer printed: ``ours``, reports that name a kernel of growkit's, and ``others``, which are of
    torch's libraries; or why it ``did_not_run``."""
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", output)
    if not summary or "Device not supported" in output:  # which some virtual machines' devices are not
        said = [line for line in output.splitlines() if line.strip()]
        return {"did_not_run": said[-1].strip() if said else "it said nothing"}
    lines = [line.removeprefix("=========") for line in output.splitlines() if line.startswith("=========")]
    reports = [part for part in re.split(r"\n\s*\n", "\n".join(lines)) if "SUMMARY" not in part]
    ours = sum(KERNELS.search(part) is not None for part in reports)
    return {"ours": ours, "others": max(0, int(summary[-1]) - ours)}


def failures(report: dict[str, Any]) -> list[str]:
    """What makes the run a failed one: a wrong result, results that change, a report of the sanitizer's."""
    found = [f"{check['case']}: {check['problem']}" for check in report.get("checks", ()) if check["problem"]]
    for tool, said in report.get("sanitizer", {}).items():
        if said.get("ours"):
            found.append(f"compute-sanitizer, {tool}: {said['ours']} reports in kernels of growkit")
        if said.get("failed"):
            found.append(f"under compute-sanitizer, {tool}: {said['failed']}")
    return found


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(map(cell, cells)) + " |"

    return "\n".join([line(columns), "|" + "---|" * len(columns), *(line(row) for row in rows)])


def cell(value: Any) -> str:
    """Three digits of a number; a dash where there is none."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def tables(report: dict[str, Any]) -> str:
    """All that was measured, for docs/benchmarks.md."""
    parts = [_machine(report), *(_scan(report, way) for way in ("forward", "backward")), _pattention(report)]
    return "\n\n".join(part for part in (*parts, _norms(report), _targets(report)) if part)


def _machine(report: dict[str, Any]) -> str:
    machine = report["machine"]
    return markdown(("", ""), [(name.replace("_", " "), value) for name, value in machine.items()])


def _scan(report: dict[str, Any], way: str) -> str:
    rows = report.get("scan", ())
    if not rows:
        return ""
    arms = list(dict.fromkeys(arm for row in rows for arm in row["milliseconds"][way]))
    columns = (f"scan, {way}: B × L × D × N", *(f"{arm}, ms" for arm in arms), "floors: bytes", "exponentials", "issue")
    return markdown(
        columns,
        [
            (
                f"{' × '.join(map(str, row['shape']))} {row['dtype']}",
                *(row["milliseconds"][way].get(arm, row["without"].get(arm)) for arm in arms),
                *(row["floors"][way][floor] for floor in ("bytes", "exponentials", "issue")),
            )
            for row in rows
        ],
    )


def _pattention(report: dict[str, Any]) -> str:
    rows = report.get("pattention", ())
    columns = {
        "triton_milliseconds": "ms",
        "teraflops": "TFLOP/s",
        "share_of_matrix_rate": "of the matrix rate",
        "times_formula": "times the formula, compiled",
        "times_eager": "times the formula, eager",
        "megabytes": "memory, MB",
        "memory_of_formula": "of the compiled formula's",
        "memory_of_counted": "of what is counted",
    }
    cells = [(", ".join(map(str, row["shape"])), row["theta"], *(row[key] for key in columns)) for row in rows]
    return markdown(("Pattention: T, d, n", "Θ", *columns.values()), cells) if cells else ""


def _norms(report: dict[str, Any]) -> str:
    columns = ("norm, forward: T, d, n", "n/d", "sums of squares, ms", "Gram matrix, ms", "the rule takes", "over best")
    cells = [
        (
            ", ".join(map(str, row["shape"])),
            row["shape"][2] / row["shape"][1],
            *(row["milliseconds"][way] for way in ("squares", "gram")),
            row["rule"],
            row["rule_over_best"],
        )
        for row in report.get("norms", ())
    ]
    return markdown(columns, cells) if cells else ""


def _targets(report: dict[str, Any]) -> str:
    cells = [
        (row["target"], row["found"], f"{'≤' if row['most'] else '≥'} {cell(row['goal'])}", row["met"])
        for row in targets(report)
    ]
    return markdown(("target", "found", "goal", "met"), cells)
