"""Jittor's first compilation, in a few units where Jittor takes a file at a time: less than half of the processor time.

Most of a file's time are its headers, the same ones for 140 files. A unit is one source that includes neighbours, in the
order in which Jittor links them, so that what they initialise comes in the same order as before. Its object takes the place
of its first file's, and the others' are empty. With each file goes Jittor's own note of what it was compiled from, so that
Jittor finds everything done at every later start.

This runs in the process that compiles, see moss_jt.backend.build. What cannot be done so is left to Jittor's own way.
"""

import itertools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

UNIT_BYTES = (
    100_000  # of source text: units of some seconds and 500 MB, so that every processor has its share
)
COMPILER_BYTES = 1 << 30  # of memory for each compiler at work
# The files in which the environment switches something: Jittor compiles these anew by themselves when that changes.
SWITCHED = re.compile(r"#(?:ifdef|if) +JT")
COMMAND = re.compile(r'"([^"]+)" +"([^"]+)"( .*) -c -o "([^"]+)" *')
# What is a file's own, and must not meet the same name in another file of the unit; of constants Jittor has many.
STATIC = re.compile(r"^static\s[^;=({\n]*?\b(\w+)\s*[=;({]", re.MULTILINE)
CONSTANT = re.compile(r"^static auto (make_\w+) =", re.MULTILINE)
FUNCTION = re.compile(r"^\w[\w:<>*& ]*?\b(\w+)\([^;\n]*$", re.MULTILINE)
EXTERN = re.compile(r"^extern int use_cuda;", re.MULTILINE)  # a constant in the others, by a header
TOOL = re.compile(r' -o "[^"]*jit_utils_core[^"/]*" *$')
MACRO = re.compile(r"^\s*#\s*define\s+(\w+)", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """One of Jittor's commands: a source becomes an object. ``note`` is what Jittor writes beside it when that is done."""

    text: str
    compiler: str
    source: Path
    flags: str
    target: Path
    note: bytes

    @property
    def done(self) -> bool:
        note = note_path(self.target)
        return self.target.exists() and note.exists() and note.read_bytes() == self.note

    @property
    def generated(self) -> bool:
        return self.target.parent.parent in self.source.parents

    @property
    def seldom_used(self) -> bool:
        """Whether it is Jittor's tests of itself, or only hands arguments from Python on: these need less optimisation."""
        return self.generated or self.source.parent.name == "test"

    @property
    def kind(self) -> tuple[object, ...]:
        """What the files of a unit have in common."""
        extern = EXTERN.search(source_text(self.source)) is not None
        return self.compiler, self.flags, self.generated, self.seldom_used, extern, is_switched(self)


def install(utilities: Any) -> None:
    """Make Jittor compile so. ``utilities``: jittor_utils, before jittor is imported."""
    _use_processors(utilities)
    _compile_tool_once(utilities)

    def run(texts: list[str], cache_path: str, jittor_path: str, message: str = "") -> None:
        nvcc = os.environ.get("nvcc_path")
        kernels = [text for text in texts if nvcc and text.startswith(f'"{nvcc}"')]
        compile_units(
            utilities, [text for text in texts if text not in kernels], Path(cache_path), Path(jittor_path)
        )
        for text in kernels:  # Jittor has one such file, which initialises nothing
            utilities.do_compile((text, cache_path, jittor_path))

    utilities.run_cmds = run


def _use_processors(utilities: Any) -> None:
    """Jittor's pool has a process for each 3 GiB of memory, however many processors there are."""
    fitting = min(processors(), max(1, utilities.get_total_mem() // COMPILER_BYTES))
    utilities.get_total_mem = lambda: fitting * 3 << 30


def processors() -> int:
    return len(os.sched_getaffinity(0))


def _compile_tool_once(utilities: Any) -> None:
    """Jittor compiles its compiling tool twice, the second time only for the note that this tool itself writes."""
    run_command, import_tool = utilities.run_cmd, utilities.try_import_jit_utils_core
    compiled: list[str] = []

    def run(command: str, *arguments: Any, **options: Any) -> Any:
        if not TOOL.search(command):
            return run_command(command, *arguments, **options)
        compiled.append(command)
        sources = re.findall(r'"([^"]+\.cc)"', command)
        with tempfile.TemporaryDirectory(prefix="moss-jt-") as folder:
            unit = Path(folder, "tool.cc")
            unit.write_text("".join(f'#include "{source}"\n' for source in sources), encoding="utf-8")
            for source in sources:
                command = command.replace(f'"{source}"', f'"{unit}"' if source == sources[0] else "")
            return run_command(command, *arguments, **options)

    def import_and_note(*arguments: Any) -> None:
        import_tool(*arguments)
        while utilities.cc and compiled:
            text = compiled.pop()
            jittor_path = Path(utilities.__file__).parent.with_name("jittor")
            target, note = note_of(utilities, text, Path(utilities.cache_path), jittor_path)
            note_path(target).write_bytes(note)

    utilities.run_cmd, utilities.try_import_jit_utils_core = run, import_and_note


def note_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.key")


def note_of(utilities: Any, text: str, cache_path: Path, jittor_path: Path) -> tuple[Path, bytes]:
    """A command's target, and the note that Jittor writes for it, without doing it: with a compiler that does nothing."""
    compiler = re.match(r'"[^"]+"', text)
    target = re.search(r' -o "([^"]+)" *$', text)
    assert compiler and target, text
    scratch = cache_path / "tmp" / f"moss-jt-{os.getpid()}.o"
    scratch.parent.mkdir(exist_ok=True)  # with CUDA Jittor's is in a folder below
    idle = f'"true"{text[compiler.end() : target.start()]} -o "{scratch}"{text[target.end(1) + 1 :]}'
    utilities.cc.cache_compile(idle, str(cache_path), str(jittor_path))
    note = note_path(scratch).read_bytes()
    note_path(scratch).unlink()
    head, rest = note.split(b"\n", 1)
    head = os.fsencode(compiler[0]) + head.removeprefix(b'"true"')
    return Path(target[1]), head.replace(os.fsencode(scratch), os.fsencode(target[1])) + b"\n" + rest


def compile_units(utilities: Any, texts: Sequence[str], cache_path: Path, jittor_path: Path) -> None:
    """Do Jittor's commands, all of them or, where nothing has changed, none.

    Raises:
        RuntimeError: a file that was left to Jittor's own way does not compile.
    """
    commands = [command_of(utilities, text, cache_path, jittor_path) for text in texts]
    if all(command.done for command in commands):
        return
    folder = cache_path / "moss-jt-units"
    folder.mkdir(exist_ok=True)
    jobs: dict[str, list[Command]] = {}
    for number, members in enumerate(split(commands)):
        if len(members) > 1 or members[0].seldom_used:
            jobs[write_unit(folder / f"{number}.cc", members)] = members
        else:
            jobs[members[0].text] = members
    nothing = folder / "nothing.cc"
    nothing.write_text("// Its code is in another object.\n", encoding="utf-8")
    empty = f'"{commands[0].compiler}" "{nothing}"{commands[0].flags} -c -o "{nothing}.o"'
    workers = utilities.get_total_mem() // (3 << 30)
    # The longest come first, or else one would be left at the end.
    ordered = sorted(jobs, key=lambda text: -sum(member.source.stat().st_size for member in jobs[text]))
    fork = multiprocessing.get_context("fork")  # with Jittor's compiling tool in it
    with ProcessPoolExecutor(workers, fork, utilities.pool_initializer) as pool:

        def failures(texts: Sequence[str]) -> list[str]:
            arguments = [(text, str(cache_path), str(jittor_path)) for text in texts]
            return [text for text in pool.map(failure, arguments) if text is not None]

        alone = [member for text in failures([empty, *ordered]) for member in jobs.pop(text)]
        if failed := failures([member.text for member in alone]):
            raise RuntimeError(f"{len(failed)} files do not compile, the first with: {failed[0]}")
    settle({text: members for text, members in jobs.items() if text != members[0].text}, folder)


def failure(job: tuple[str, str, str]) -> str | None:
    """In a process of the pool: do a command unless it is done already. Returns the command if that failed."""
    try:
        sys.modules["jittor_utils"].do_compile(job)
    except RuntimeError:
        return job[0]
    return None


def command_of(utilities: Any, text: str, cache_path: Path, jittor_path: Path) -> Command:
    parts = COMMAND.fullmatch(text)
    if parts is None:
        raise RuntimeError(f"not a command of Jittor {utilities.get_jittor_version()}: {text}")
    compiler, source, flags, _ = parts.groups()
    target, note = note_of(utilities, text, cache_path, jittor_path)
    return Command(text, compiler, Path(source), flags, target, note)


def split(commands: Sequence[Command]) -> Iterator[list[Command]]:
    """Cut the files, in their order, into units that compile as one source."""
    for _, alike in itertools.groupby(commands, key=lambda command: command.kind):
        unit: list[Command] = []
        for command in alike:
            together = [*unit, command]
            size = sum(len(source_text(member.source)) for member in together)
            if unit and (size > UNIT_BYTES or is_switched(command) or names_meet(together)):
                yield unit
                together = [command]
            unit = together
        yield unit


def names_meet(members: Sequence[Command]) -> bool:
    """Whether a name that is one file's own is also another file's: of generated files the names are known to differ."""
    seen, statics = set[str](), set[str]()
    for member in members:
        if member.generated:
            continue
        text = source_text(member.source)
        own = set(STATIC.findall(text)) - set(CONSTANT.findall(text))
        functions = set(FUNCTION.findall(text))
        if own & seen or functions & statics:
            return True
        seen |= own | functions
        statics |= own
    return False


def is_switched(command: Command) -> bool:
    """Whether the source, or a header of it that Jittor's note names, has a switch of the environment's in it."""
    lines = command.note.decode(errors="surrogateescape").splitlines()[1:]
    return any(has_switch(Path(line[2:].rpartition(": ")[0])) for line in lines)


@cache
def has_switch(path: Path) -> bool:
    return SWITCHED.search(source_text(path)) is not None


@cache
def source_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def write_unit(source: Path, members: Sequence[Command]) -> str:
    """Write a unit's source. Returns the command that compiles it."""
    lines = []
    for number, member in enumerate(members):
        text = source_text(member.source)
        constants = CONSTANT.findall(text)
        lines += [f"#define {name} {name}_{number}\n" for name in constants]
        lines.append(f'#include "{member.source}"\n')
        lines += [f"#undef {name}\n" for name in (*constants, *MACRO.findall(text))]
    source.write_text("".join(lines), encoding="utf-8")
    first = members[0]
    flags = re.sub(r"(?<= )-O2(?= )", "-O1", f"{first.flags} ") if first.seldom_used else first.flags
    return f'"{first.compiler}" "{source}"{flags} -c -o "{source}.o"'


def settle(units: dict[str, list[Command]], folder: Path) -> None:
    """Put the objects where Jittor looks for them. Notes come last: what is interrupted here is done anew."""
    members = [member for unit in units.values() for member in unit]
    for member in members:
        note_path(member.target).unlink(missing_ok=True)
    for text, unit in units.items():
        Path(text.rpartition(' -o "')[2].rstrip('" ')).replace(unit[0].target)
        for member in unit[1:]:
            shutil.copyfile(folder / "nothing.cc.o", member.target)
    for member in members:
        note_path(member.target).write_bytes(member.note)
    shutil.rmtree(folder)


def files_done(folder: Path) -> int:
    """How many of Jittor's files are compiled in a folder and those below it, for a display of progress."""
    done = sum(1 for _ in folder.glob("**/obj_files/*.o"))
    for compiled in folder.glob("moss-jt-units/*.cc.o"):
        try:
            done += compiled.with_suffix("").read_text(encoding="utf-8").count("#include")
        except OSError:  # it went meanwhile
            continue
    return done


def start_anew(folder: Path) -> None:
    """Remove the objects of a build that went wrong, for Jittor to compile each file by itself."""
    for objects in ("obj_files", "moss-jt-units"):
        shutil.rmtree(folder / objects, ignore_errors=True)
