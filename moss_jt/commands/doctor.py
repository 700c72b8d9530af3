"""moss-jt doctor."""

import sys

import click

from moss_jt.measure.doctor import examine

MARKS = {"ok": ("✓", "green"), "note": ("·", "yellow"), "problem": ("✗", "red")}


@click.command()
def command() -> None:
    """Check this machine: compiler, Jittor, oneDNN, processor, memory, disk, GPU, CUDA, models.

    Each line has a verdict and, where something is to be done, says what. Exit code 1 when there is a problem.
    """
    problems = 0
    for finding in examine():
        mark, colour = MARKS[finding.verdict]
        click.echo(f"{click.style(mark, fg=colour)} {finding.what:14} {finding.text}")
        if finding.advice:
            click.echo(f"  {'':14} {finding.advice}")
        problems += finding.verdict == "problem"
    if problems:
        click.echo(f"{problems} problem(s): moss-jt cannot run before they are mended.")
        sys.exit(1)
