"""PROGRAM: what this machine has and lacks, and why, in words; and whether a run fits it, before anything starts."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

from astar_megatron.config_secrets import shown
from astar_megatron.run.machine import Finding, report


def main() -> int:
    """Print the report; returns 1 if something can't work."""
    findings = report()
    show(findings, Console())
    return int(any(finding.level == "fail" for finding in findings))


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print findings: a table on a terminal, else a line each."""
    if not console.is_terminal:
        for finding in findings:
            remedy = f"; {finding.remedy}" if finding.remedy else ""
            line = f"{finding.level:<4}  {finding.subject}: {finding.state}{remedy}"
            console.print(shown(line), markup=False, soft_wrap=True)
        return
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    table = Table("", "what", box=None)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for finding in findings:
        level = Text(finding.level, style=colours[finding.level])
        table.add_row(level, *(Text(shown(cell)) for cell in (finding.subject, finding.state, finding.remedy)))
    console.print(table)
