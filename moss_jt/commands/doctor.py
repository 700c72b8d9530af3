"""moss-jt doctor."""

import sys

import click

from moss_jt.measure.doctor import examine
from moss_jt.terminal.output import bounded
from moss_jt.terminal.screen import Screen

MARKS = {"ok": "✓", "note": "·", "problem": "✗"}


@click.command()
@click.option(
    "--gpu",
    is_flag=True,
    help="Whatever --gpu lacks counts as a problem, and the steps to get it are listed.",
)
def command(gpu: bool) -> None:
    """Check this machine: compiler, Jittor, oneDNN, processor, memory, disk, GPU, CUDA, models. Downloads nothing.

    Each line has a verdict, and says what to do where something needs doing. Exit code 1 if there is a problem.
    """
    screen, problems = Screen(), 0
    for finding in examine(gpu):
        screen.write(MARKS[finding.verdict], finding.verdict)
        screen.write(f" {finding.what:14} {finding.text}\n")
        if finding.advice:
            screen.line(f"  {'':14} {bounded(finding.advice)}")
        problems += finding.verdict == "problem"
    if problems:
        count = "1 problem" if problems == 1 else f"{problems} problems"
        screen.line(f"{count} to solve before {'--gpu works' if gpu else 'moss-jt can run'}.")
        sys.exit(1)
