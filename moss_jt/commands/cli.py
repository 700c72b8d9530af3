"""The command line. A command's module is imported when that command runs, so that ``--help`` returns at once."""

import difflib
import importlib
import io
import sys
from importlib.metadata import version

import click

from moss_jt.terminal.ending import end, open_closed_streams, told_on_one_line
from moss_jt.terminal.output import bounded

# Name, module of moss_jt.commands that holds a click command named `command`, and the line that --help shows.
COMMANDS = {
    "convert": ("convert", "Turn a Hugging Face checkpoint into a model folder."),
    "chat": ("chat", "Talk to a model, with plugins."),
    "ask": ("ask", "Ask one question; standard output gets the answer alone."),
    "generate": ("generate", "Continue a text."),
    "serve": ("serve", "Serve a model over HTTP, with OpenAI's interface and others."),
    "batch": ("batch", "Answer many prompts from a file, many at once."),
    "plan": ("plan", "Would a model run here, or elsewhere, and how fast? Downloads nothing."),
    "list": ("list", "Show the models that are here."),
    "rm": ("rm", "Remove a model."),
    "finetune": ("finetune", "Teach a model from conversations (LoRA)."),
    "merge": ("merge", "Make an adapter part of its model."),
    "eval": ("eval", "Perplexity on a text, and what quantization costs."),
    "bench": ("bench", "Measure speed beside the machine's own limits."),
    "verify": ("verify", "Check a model folder against its checksums."),
    "doctor": ("doctor", "Check this machine, and say what to do."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and one-line helps without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"moss_jt.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            close = difflib.get_close_matches(name, COMMANDS, 1)
            ctx.fail(f"No such command {name!r}.{f' Did you mean {close[0]!r}?' if close else ''}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("moss-jt"), prog_name="moss-jt")
def root() -> None:
    """MOSS, the 16-billion-parameter chat model, in little memory.

    \b
    First steps:
      moss-jt chat moss-tiny                              a small MOSS that comes with the program
      moss-jt plan moss-moon-003-sft-plugin-int4          would the real one run here, and how fast?
      moss-jt convert fnlp/moss-moon-003-sft-plugin-int4  download and convert it
      moss-jt chat                                        talk to the model used last
      moss-jt ask "What is 37 times 48?"                  one question, one answer
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: exit code 0 done, 1 the input or the machine is at fault, 2 usage."""
    open_closed_streams()
    with told_on_one_line():
        try:
            code = root.main(args=arguments, prog_name="moss-jt", standalone_mode=False)
        except click.exceptions.Abort:
            end("moss-jt: stopped.", 130)
        except click.ClickException as error:
            text = io.StringIO()
            error.show(text)
            end(bounded(text.getvalue().rstrip()), error.exit_code)
    sys.exit(code if isinstance(code, int) else 0)
