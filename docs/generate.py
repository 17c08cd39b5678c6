"""The pages of the reference that follow from the code: commands, keys of plan and policy, exit codes, one page per module.

Commands come from the command line itself. Modules are read, not imported, so the documentation needs none of the
libraries that Confide trains with.
"""

import ast
import importlib
import inspect
import re
import textwrap
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer.main

from confide.client import policy
from confide.common import cli, errors, plan

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("common", "client", "server", "simulations")
_WIDEST = 100
# The headings that a docstring may have, each at the beginning of a line.
_HEADING = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Guarantee|Source|Example):(?: (.*))?$", re.MULTILINE)
_ITEM = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*): (.*)")


def write_reference(directory: Path) -> None:
    """Bring `directory` up to date: all generated pages and no others; unchanged ones are not written."""
    pages = {
        "cli.md": cli_page(),
        "plan.md": plan_page(),
        "policy.md": policy_page(),
        "exit-codes.md": exit_code_page(),
        "code.md": code_page(),
    }
    for module, file in modules():
        pages[f"{module}.md"] = module_page(module, ast.parse(file.read_bytes()))
    directory.mkdir(parents=True, exist_ok=True)
    for stale in set(directory.glob("*.md")) - {directory / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        page = directory / name
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (dotted name, file) for every module, package by package."""
    for package in PACKAGES:
        for file in sorted((ROOT / package).glob("*.py")):
            name = f"confide.{package}"
            yield (name if file.stem == "__init__" else f"{name}.{file.stem}"), file


def cli_page() -> str:
    """Return the page of all commands with their arguments and options."""
    lines = [
        "# Commands",
        "",
        "Every command shows this with `--help`. With `--json`, where a command has it, it prints one JSON object on",
        "standard output and no progress; an error is then printed there too, as",
        '`{"status": "failed", "error": CLASS, "message": TEXT}`. Errors have [exit codes](exit-codes.md); Ctrl-C gives 130.',
    ]
    for group, purpose, commands in groups():
        lines += ["", f"## `confide {group}`", "", purpose]
        for name, command in commands.items():
            lines += ["", f"### `confide {group} {name}`", "", *_command(f"confide {group} {name}", command)]
    return "\n".join(lines) + "\n"


def groups() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield (group, its purpose, its commands by name) for every group of the command line, then for those within it."""
    for group, (module, _, purpose) in cli._GROUPS.items():
        yield from _within(group, purpose, typer.main.get_command(importlib.import_module(module).app))


def _within(name: str, purpose: str, group: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:  # noqa: ANN401  click's
    nested = {key: command for key, command in group.commands.items() if hasattr(command, "commands")}
    yield name, purpose, {key: command for key, command in group.commands.items() if key not in nested}
    for key, command in nested.items():
        yield from _within(f"{name} {key}", _text(command.help), command)


def _command(name: str, command: Any) -> list[str]:  # noqa: ANN401  click has no types of its own here
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    words = [a.metavar if a.required else f"[{a.metavar}]" for a in arguments]
    words += [f"{option.opts[0]}{_value(option)}" for option in options if option.required]
    lines = [_text(command.help), "", "```text", " ".join([name, *words, "[OPTIONS]"]), "```", ""]
    if arguments:
        hints = typing.get_type_hints(inspect.unwrap(command.callback), include_extras=True)
        lines += ["| argument | default | meaning |", "|---|---|---|"]
        # Read from the declaration: click 8.5 forgets what typer 0.20 tells it of an argument.
        told = [(a, hints[a.name].__metadata__[0].help) for a in arguments]
        lines += [f"| `{a.metavar}` | {_default(a)} | {_cell(_text(says))} |" for a, says in told] + [""]
    if options:
        lines += ["| option | default | meaning |", "|---|---|---|"]
        for option in options:
            spelled = " / ".join(f"`{word}{_value(option)}`" for word in [*option.opts, *option.secondary_opts])
            lines.append(f"| {spelled} | {_default(option)} | {_cell(_text(option.help))} |")
        lines.append("")
    return [*lines, *(["```shell", command.epilog.removeprefix("Example: "), "```"] if command.epilog else [])]


def _value(option: Any) -> str:  # noqa: ANN401  click has no types of its own here
    """Return what follows an option's name."""
    if option.is_flag:
        return ""
    return " " + (option.metavar or {"integer": "N", "integer range": "N", "float": "X"}.get(option.type.name, "TEXT"))


def _default(parameter: Any) -> str:  # noqa: ANN401  click has no types of its own here
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False):
        chosen = parameter.opts if parameter.default else parameter.secondary_opts
        return f"`{chosen[0]}`" if chosen else ""
    return "" if parameter.default is None else f"`{parameter.default}`"


def plan_page() -> str:
    """Return the page of all keys of a plan."""
    lines = [
        "# Plan keys",
        "",
        f'A plan is a TOML file that begins with `format = "{plan.FORMAT}"`; a `name` of 1 to 63 of a-z, 0-9',
        "and -, beginning with a letter or digit; and a `purpose`, a text for those who approve the plan.",
        "Then follow the sections below. An unknown key is an error. The digest that a site approves covers",
        "every key but those in `[compute]`.",
    ]
    return "\n".join([*lines, *_keys(plan.reference())]) + "\n"


def policy_page() -> str:
    """Return the page of all keys of a policy."""
    lines = [
        "# Policy keys",
        "",
        f'A policy is a TOML file on the site\'s own disk that begins with `format = "{policy.FORMAT}"` and with `site`, the',
        "site's name. Then follow the sections below. An unknown key is an error, and so is a limit that is missing; a",
        "list that is missing allows nothing. What each is for is told in [The policy](../../explanation/policy.md).",
    ]
    return "\n".join([*lines, *_keys(policy.reference())]) + "\n"


def _keys(rows: Iterable[tuple[str, str, str, str, str]]) -> Iterator[str]:
    """Spell a table for each section."""
    last = ""
    for section, key, default, limit, says in rows:
        if section != last:
            yield from ("", f"## `[{section}]`", "", "| key | default | range | meaning |", "|---|---|---|---|")
            last = section
        shown = default if default in {"required", "absent"} else f"`{default}`"
        yield f"| `{key}` | {_cell(shown)} | {_cell(limit)} | {_cell(says)} |"


def exit_code_page() -> str:
    """Return the page of exit codes, one line per class of `confide.common.errors`."""
    tree = [
        error for error in vars(errors).values() if inspect.isclass(error) and issubclass(error, errors.ConfideError)
    ]
    lines = [
        "# Exit codes",
        "",
        "Every error that Confide raises on purpose has a class, and every class has an exit code of its",
        "own. What may leave a site about an error is the class's name and the one fixed sentence shown",
        "here; the full message is for the person at the machine.",
        "",
        "| code | error | when | what may leave a site |",
        "|---|---|---|---|",
        "| 0 | | Everything asked for was done. | |",
    ]
    for error in sorted(tree, key=lambda error: error.exit_code):
        says = (inspect.getdoc(error) or "").partition("\n")[0]
        lines.append(f"| {error.exit_code} | `{error.__name__}` | {_cell(says)} | {_cell(error.outside)} |")
    return "\n".join(lines) + "\n"


def code_page() -> str:
    """Return the list of modules, package by package."""
    lines = [
        "# Code",
        "",
        "What each file says about itself; names that begin with an underscore are left out.",
    ]
    for package in PACKAGES:
        names = [name for name, _ in modules() if name.split(".")[1] == package]
        lines += ["", "```{toctree}", ":maxdepth: 1", f":caption: {package}/", "", *names, "```"]
    return "\n".join(lines) + "\n"


def module_page(name: str, tree: ast.Module) -> str:
    """Return the page of one module: its docstring, then its public classes and functions in order."""
    lines = [f"# `{name}`", "", *_docstring(tree)]
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and _is_public(node.name):
            lines += _entry(2, node.name, node)
            for method in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef) and _is_public(method.name):
                    lines += _entry(3, f"{node.name}.{method.name}", method)
    return "\n".join(lines).rstrip() + "\n"


def _entry(depth: int, name: str, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    return ["#" * depth + f" `{name}`", "", "```python", *_declaration(node), "```", "", *_docstring(node)]


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _declaration(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Spell the head of a class, with its fields, or of a function."""
    lines = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in [*node.bases, *node.keywords])
        fields = [
            f"    {item.target.id}: {ast.unparse(item.annotation)}"
            for item in node.body
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and _is_public(item.target.id)
        ]
        return [
            *lines,
            f"class {node.name}({bases}):" if bases else f"class {node.name}:",
            *(fields or ["    ..."]),
        ]
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    end = f" -> {ast.unparse(node.returns)}: ..." if node.returns else ": ..."
    arguments = list(_arguments(node.args))
    short = f"{word} {node.name}({', '.join(arguments)}){end}"
    if len(short) <= _WIDEST:
        return [*lines, short]
    return [*lines, f"{word} {node.name}(", *(f"    {argument}," for argument in arguments), f"){end}"]


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Yield the arguments of a function, each spelled as it stands in the file."""

    def spelled(argument: ast.arg, default: ast.expr | None) -> str:
        return ast.unparse(argument) + (f" = {ast.unparse(default)}" if default else "")

    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [*[None] * (len(positional) - len(arguments.defaults)), *arguments.defaults]
    for number, (argument, default) in enumerate(zip(positional, defaults, strict=True), start=1):
        yield spelled(argument, default)
        if number == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield "*" + spelled(arguments.vararg, None)
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield spelled(argument, default)
    if arguments.kwarg:
        yield "**" + spelled(arguments.kwarg, None)


def _docstring(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Turn a docstring into Markdown: headings become bold words, their entries a list, drawings stay."""
    lines: list[str] = []
    # A heading may follow the line above it directly; it begins a block all the same.
    for block in re.split(r"\n\n+", _HEADING.sub(r"\n\g<0>", ast.get_docstring(node) or "").strip("\n")):
        heading = _HEADING.match(block)
        if heading:
            lines += _section(heading[1], heading[2], block.partition("\n")[2])
        elif block.startswith((" ", "\t")):
            lines += ["```text", *textwrap.dedent(block).splitlines(), "```", ""]
        else:
            lines += [_text(block), ""]
    return lines


def _section(title: str, first: str | None, rest: str) -> list[str]:
    """Spell one section: `Guarantee: …` goes on in the same line, `Args:` has entries below."""
    if first:
        return [
            _text(f"{title}: {first}\n{textwrap.dedent(rest)}".rstrip()).replace(f"{title}:", f"**{title}:**", 1),
            "",
        ]
    if title == "Example":
        return ["**Example:**", "", "```text", *textwrap.dedent(rest).splitlines(), "```", ""]
    lines = [f"**{title}:**", ""]
    for line in textwrap.dedent(rest).splitlines():
        entry = _ITEM.fullmatch(line)
        if entry:
            names = ", ".join(f"`{name}`" for name in entry[1].split(", "))
            lines.append(f"- {names}: {_text(entry[2])}")
        else:
            lines.append(f"  {_text(line.strip())}" if lines[-1] else _text(line))
    return [*lines, ""]


def _text(plain: str) -> str:
    """Keep Markdown from reading signs into plain text: outside of `code`, nothing is mark-up."""
    parts = re.split(r"(`[^`]*`)", plain)
    shown = [part if part.startswith("`") else re.sub(r"([\\*_<>\[\]#{}$])", r"\\\1", part) for part in parts]
    return "".join(shown)


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")
