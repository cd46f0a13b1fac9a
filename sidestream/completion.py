"""``sidestream completion SHELL``: a script by which a shell completes commands and options.

The script holds all words, so that a Tab costs no start of Python.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any, Final

from sidestream.host.commands import add_command

_HELP: Final = """\
Print a script by which your shell completes commands, options and their values. Once for this shell, or for
good:

    source <(sidestream completion bash)
    sidestream completion bash > ~/.local/share/bash-completion/completions/sidestream
    sidestream completion zsh > "${fpath[1]}/_sidestream"
    sidestream completion fish > ~/.config/fish/completions/sidestream.fish
"""
_BASH: Final = """\
_sidestream() {
  local path=sidestream word before cur="${COMP_WORDS[COMP_CWORD]}"
  before="${COMP_WORDS[COMP_CWORD-1]}"
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case " ${_sidestream_words["$path"]} " in
      *" $word "*) [[ $word == -* ]] || path="$path $word";;
    esac
  done
  if [[ -n ${_sidestream_values["$path $before"]} ]]; then
    COMPREPLY=($(compgen -W "${_sidestream_values["$path $before"]}" -- "$cur"))
  else
    COMPREPLY=($(compgen -W "${_sidestream_words["$path"]}" -- "$cur"))
    [[ ${#COMPREPLY[@]} -eq 0 ]] && compopt -o default 2>/dev/null
  fi
}
complete -F _sidestream sidestream
"""


def add_parser(subparsers: Any, whole: argparse.ArgumentParser) -> None:
    """Add ``completion``; ``whole`` is the parser that it is of."""
    parser = add_command(subparsers, "completion", run, "print a script by which a shell completes", _HELP)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="which shell")
    parser.set_defaults(whole=whole)


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(script(args.whole, args.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for a shell.

    Args:
        parser: With all commands.
        shell: ``bash``, ``zsh`` or ``fish``.
    """
    if shell == "fish":
        return "".join(f"{line}\n" for line in _fish(parser, ()))
    words, values = dict[str, str](), dict[str, str]()
    for path, one in _walk(parser, ("sidestream",)):
        words[" ".join(path)] = " ".join(dict.fromkeys([*_commands(one), *_options(one)]))
        for option, choices in _choices(one):
            values[f"{' '.join(path)} {option}"] = " ".join(choices)
    tables = [
        f"declare -gA {name}=(" + " ".join(f"[{key!r}]={text!r}" for key, text in table.items()) + ")"
        for name, table in (("_sidestream_words", words), ("_sidestream_values", values))
    ]
    head = "#compdef sidestream\nautoload -U +X bashcompinit && bashcompinit\n" if shell == "zsh" else ""
    body = _BASH.replace('["', "[").replace('"]', "]") if shell == "zsh" else _BASH
    return f"{head}{chr(10).join(tables)}\n{body}"


def _walk(
    parser: argparse.ArgumentParser, path: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], argparse.ArgumentParser]]:
    yield path, parser
    for name, one in _commands(parser).items():
        yield from _walk(one, (*path, name))


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(found[0]) if found else {}


def _options(parser: argparse.ArgumentParser) -> list[str]:
    return [
        option for action in parser._actions for option in action.option_strings if option.startswith("--")
    ]


def _choices(parser: argparse.ArgumentParser) -> Iterator[tuple[str, list[str]]]:
    for action in parser._actions:
        if action.choices and not isinstance(action, argparse._SubParsersAction):
            for option in action.option_strings:
                yield option, [str(choice) for choice in action.choices]


def _fish(parser: argparse.ArgumentParser, path: tuple[str, ...]) -> Iterator[str]:
    inner = _commands(parser)
    seen = "; and ".join(f"__fish_seen_subcommand_from {name}" for name in path) or "__fish_use_subcommand"
    if path and inner:
        seen += f"; and not __fish_seen_subcommand_from {' '.join(inner)}"
    for name in inner:
        yield f"complete -c sidestream -n '{seen}' -f -a {name}"
    choices = dict(_choices(parser))
    for option in _options(parser):
        more = f" -x -a '{' '.join(choices[option])}'" if option in choices else ""
        yield f"complete -c sidestream -n '{seen}' -l {option.removeprefix('--')}{more}"
    for name, one in inner.items():
        yield from _fish(one, (*path, name))
