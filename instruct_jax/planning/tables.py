"""The results of plans, as they were written to JSON, in Markdown."""

from collections.abc import Sequence
from typing import Any

GIB = 2.0**30


def plan_tables(results: Sequence[dict[str, Any]]) -> str:
    """Two tables: a row a plan, and a row a program; `results` are {"command", "plans"}."""
    plans = [(plan, result["command"]) for result in results for plan in result["plans"]]
    lines = [
        "| configuration | chips | mesh | micro-batches | peak / usable GiB | fits "
        "| step, s | run, days | chip-hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for plan, _ in plans:
        peak = "out of memory" if plan["peak"] is None else f"{plan['peak'] / GIB:.1f}"
        usable = f"{plan['memory'] / GIB:.1f}" if plan["memory"] else "-"
        split = f"{plan['micro_batches']}"
        if plan.get("ptx_micro_batches") is not None:  # no plan had it at first
            split += f", text {plan['ptx_micro_batches']}"
        times = "| - | - | - |"
        if "step_seconds" in plan:
            times = (
                f"| {plan['step_seconds']:.1f} | {plan['days']:.2f} | {plan['chip_hours']:.0f} |"
            )
        lines.append(
            f"| {_name(plan)} | {plan['topology']} | {short(plan['mesh'])} "
            f"| {split} | {peak} / {usable} "
            f"| {'yes' if plan['fits'] else 'no'} {times}"
        )
    lines += [
        "",
        "| configuration | program | estimate | compiler, peak GiB | off by "
        "| collectives: times, GiB | roofline, s | compiled in, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for plan, _ in plans:
        for part in plan["parts"]:
            lines.append(f"| {_name(plan)}, {plan['topology']} | {_program(part)} |")
    lines += ["", *dict.fromkeys(f"    {command}" for _, command in plans)]
    return "\n".join(lines)


def scaling_table(rows: Sequence[dict[str, Any]]) -> str:
    """A row a kind of scaling and number of devices; bytes are those of one device."""
    lines = [
        "| scaling | devices | rows | held GiB | peak GiB | gathered GiB | reduced GiB | other GiB "
        "| collectives |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        other = row["sent"] - row["gathered"] - row["reduced"]
        sizes = (row["held"], row["peak"], row["gathered"], row["reduced"], other)
        lines.append(
            f"| {row['kind']} | {row['devices']} | {row['rows']} | "
            + " | ".join(f"{size / GIB:.3f}" for size in sizes)
            + f" | {row['count']:.0f} |"
        )
    return "\n".join(lines)


def short(mesh: str) -> str:
    """The axes of "data:1,fsdp:64,tensor:1" that are not 1."""
    return ",".join(axis for axis in mesh.split(",") if not axis.endswith(":1")) or "one device"


def _name(plan: dict[str, Any]) -> str:
    return plan["job"].rpartition("/")[2].replace(".py:", " ")


def _program(part: dict[str, Any]) -> str:
    estimate, done = part["peak_estimated"] / GIB, part["compiled"]
    seconds = "-" if part["seconds"] is None else f"{part['seconds']:.2f}"
    if done is None or done["error"]:
        word = "-" if done is None else "out of memory"
        return f"{part['name']} | {estimate:.2f} | {word} | - | - | {seconds} | -"
    peak = done["peak"] / GIB
    sent = ", ".join(
        f"{kind} {found['count']:.0f}, {found['bytes'] / GIB:.1f}"
        for kind, found in done["collectives"].items()
    )
    return (
        f"{part['name']} | {estimate:.2f} | {peak:.2f} | {estimate / peak - 1:+.0%} "
        f"| {sent or 'none'} | {seconds} | {done['seconds']:.0f}"
    )
