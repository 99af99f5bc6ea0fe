"""The account of a plan as text."""

from __future__ import annotations

from typing import Any

from experiments.h100.plan import Setup

SHOWN = 24  # rows of the launch table


def describe(name: str, setup: Setup, report: dict[str, Any]) -> str:
    """Totals, kernels of ours, and launches, the costliest first."""
    title = (f"{name}, {setup.target.dtype}, budget {setup.tree.budget}, context {setup.context}, batch "
             f"{setup.batch}, {'one H100 SXM' if setup.devices == 1 else f'each of {setup.devices} H100s SXM'}")
    parts = [title, report["basis"], "", *totals(report), "", *kernel_table(report["kernels"]), "",
             *launch_table(report["rows"])]
    return "\n".join(parts)


def totals(report: dict[str, Any]) -> list[str]:
    memory, launches, plain, prompt = (report[key] for key in ("memory", "launches", "plain", "prefill"))
    giga = {key: f"{value / 1e9:.2f} GB" for key, value in memory.items()}
    lines = [
        f"memory     {giga['total_bytes']}, {'fits' if report['fits'] else 'does NOT fit'} in 80 GB: weights "
        f"{giga['weight_bytes']}, caches {giga['cache_bytes']}, temporaries {memory['temp_bytes'] / 1e6:.0f} MB",
        f"launches   {launches['total']} a round; at most {launches['per_target_layer']} in a target layer, "
        f"{launches['per_head_layer']} in a head layer; {launches['outside_graphs']} outside CUDA graphs"
        + (f", the others in {launches['graphs']} graphs" if launches["graphs"] else ""),
        "           " + ", ".join(f"{count} {kind}" for kind, count in launches["by_kind"].items()),
        *collective_lines(report["collectives"], report["weight_collective_bytes"]),
        *([f"experts    {report['expert_weight_bytes'] / 1e9:.2f} GB of their weights read in a round, "
           f"{plain['expert_weight_bytes'] / 1e9:.2f} GB plain"] if report["expert_weight_bytes"] else []),
        f"copies     {report['weight_copy_bytes']} bytes of weights, {report['cache_copy_bytes']} bytes of caches",
        f"host       {report['host_syncs_per_round']} synchronisations a round, {report['host_transfers']} transfers",
        f"round      {times(report)}",
        f"plain      {times(plain)}; {plain['launches']['total']} launches",
        f"prompt     {times(prompt)}; {prompt['launches']} launches in {prompt['chunks']} chunks, "
        f"{prompt['weight_copy_bytes']} bytes of weights copied"]
    if report["sampled"]:
        sampled = report["sampled"]
        lines.append(f"sampled    {ms(sampled['estimate_seconds'])} estimated at temperature {sampled['temperature']}; "
                     f"{sampled['launches']['total']} launches, {sampled['host_syncs_per_round']} synchronisations")
    return [*lines, f"tokens/s   {report['tokens_per_second']:.0f} with {report['accepted']} tokens a round, "
                    f"{plain['tokens_per_second']:.0f} plain: {report['speedup']:.2f} times"]


def collective_lines(rows: list[dict[str, Any]], weights: int) -> list[str]:
    """What the devices tell each other in a round."""
    if not rows:
        return []
    kinds = ", ".join(f"{row['count']} {row['kind']} ({row['bytes'] / 1e6:.1f} MB, {ms(row['seconds'])})"
                      for row in rows)
    return [f"links      {kinds}; {weights} bytes of weights"]


def kernel_table(kernels: list[dict[str, Any]]) -> list[str]:
    lines = ["kernel                       registers  spilled   shared  wgmma   blocks  launches"]
    for kernel in kernels:
        mark = "*" if kernel["wgmma_serialized"] else " "
        lines.append(f"{kernel['name']:28s} {kernel['registers']:9d} {kernel['spill_bytes']:8d} "
                     f"{kernel['shared_bytes']:8d} {kernel['wgmma']:6d}{mark}{kernel['blocks']:8d} "
                     f"{kernel['launches']:9d}")
    if any(kernel["wgmma_serialized"] for kernel in kernels):
        lines.append("* ptxas makes them wait for each other")
    return lines


def launch_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["     time  launches  MB each  GFLOP each  waits for  what"]
    for row in rows[:SHOWN]:
        lines.append(f"{row['seconds'] * 1e6:6.0f} us {row['launches']:9d} {row['bytes'] / 1e6:8.2f} "
                     f"{row['flops'] / 1e9:11.2f}  {row['bound']:9s}  {row['kind']}: {row['place'] or row['kernel']}")
    rest = rows[SHOWN:]
    if rest:
        lines.append(f"{sum(row['seconds'] for row in rest) * 1e6:6.0f} us {sum(row['launches'] for row in rest):9d}"
                     f"{'':34s}{len(rest)} more")
    return lines


def times(account: dict[str, Any]) -> str:
    return (f"{ms(account['estimate_seconds'])} estimated, {ms(account['floor_seconds'])} floor, ratio "
            f"{account['estimate_over_floor']:.2f}")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"
