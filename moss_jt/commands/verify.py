"""moss-jt verify."""

import click

from moss_jt.commands.progress import byte_bar
from moss_jt.convert.named import model_folder
from moss_jt.plan.residency import gib
from moss_jt.store.checksums import verify_store
from moss_jt.store.model_folder import open_store
from moss_jt.terminal.screen import Screen


@click.command()
@click.argument("model", required=False)
def command(model: str | None) -> None:
    """Check every tensor of a model folder against its checksum.

    MODEL is a name or a path; without one, the model converted last.
    """
    store = open_store(model_folder(model))
    total = sum(spec.nbytes for file in store.files for spec in file.tensors.values())
    with byte_bar(store.path.name, total) as bar:
        verify_store(store, bar.update)
    Screen().line(
        f"{store.path} is complete: {gib(total)} in {len(store.files)} files, every checksum is right."
    )
