"""The terminal's side of `shoal chat`: reads lines, shows answers as they come and what they took.

Answers go to standard output. At a terminal everything else does too; in a script it goes to standard error, so that
the output is the answers alone.
"""

from __future__ import annotations

import difflib
import io
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress

from rich.console import Console
from rich.text import Text

from cluster.cli.chat_client import Answer, ChatError, Conversation

__all__ = ["Terminal", "run"]

_PROMPT = "> "
_INTERRUPTED = 130
_FAILED = 1
# A model's output could otherwise drive the terminal: escape sequences begin with one of these.
_HARMLESS = dict.fromkeys((*(i for i in range(32) if chr(i) not in "\n\t"), *range(0x7F, 0xA0)), "\ufffd")


def run(conversation: Conversation, message: str | None) -> int:
    """Asks one `message`, or what standard input says; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may say what this terminal cannot show
    interactive = message is None and sys.stdin.isatty()
    out = Console(highlight=False, soft_wrap=True)
    terminal = Terminal(
        conversation, out, out if interactive else Console(stderr=True, highlight=False, soft_wrap=True)
    )
    if message is not None:
        return terminal.ask_all([message], commands=False)
    if not interactive:
        return terminal.ask_all(line.rstrip("\n") for line in sys.stdin)
    with suppress(ImportError):
        import readline  # noqa: F401, it gives input() editing and history; not every Python has it
    return terminal.talk(input)


class Terminal:
    """One conversation. `notes` is where everything goes that is no answer."""

    def __init__(self, conversation: Conversation, out: Console, notes: Console) -> None:
        self._conversation = conversation
        self._out = out
        self._notes = notes
        self._left = False
        self._commands: dict[str, tuple[Callable[[str], None], str]] = {
            "/reset": (self._reset, "forget what was said"),
            "/system": (self._system, "set the system message, or show it"),
            "/help": (self._help, "show this"),
            "/exit": (self._exit, "leave; Ctrl-D does too"),
        }

    def talk(self, read_line: Callable[[str], str]) -> int:
        """Until the user leaves; Ctrl-C only ends the answer or the line that is being typed."""
        try:
            names = ", ".join(self._conversation.server.model_names())
        except ChatError as error:
            self._note(str(error), "red")
            return _FAILED
        self._note(f"{names} at {self._conversation.server.address}. /help shows the commands.", "dim")
        while not self._left:
            try:
                self._take(read_line(_PROMPT))
            except EOFError:
                self._notes.print()
                break
            except KeyboardInterrupt:
                self._note("\nCtrl-D or /exit leaves.", "dim")
            except ChatError:
                pass  # it has been shown, and the next question may fare better
        return 0

    def ask_all(self, lines: Iterator[str] | list[str], *, commands: bool = True) -> int:
        """For scripts: one question a line; the first that fails ends it."""
        for line in lines:
            try:
                answer = self._take(line) if commands else self._ask(line)
            except ChatError:
                return _FAILED
            except KeyboardInterrupt:
                return _INTERRUPTED
            if answer is not None and answer.interrupted:
                return _INTERRUPTED
            if self._left:
                break
        return 0

    def _take(self, line: str) -> Answer | None:
        """A command or a question. Raises ChatError, which has been shown."""
        line = line.strip()
        if not line:
            return None
        if not line.startswith("/"):
            return self._ask(line)
        name, _, rest = line.partition(" ")
        if name in self._commands:
            self._commands[name][0](rest.strip())
            return None
        near = difflib.get_close_matches(name, self._commands, n=1)
        self._note(
            f"There is no {name}. " + (f"Did you mean {near[0]}?" if near else "/help shows the commands."), "red"
        )
        return None

    def _ask(self, question: str) -> Answer:
        # What a terminal sends is not always text in its own encoding.
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        try:
            answer = self._conversation.ask(question, self._show)
        except ChatError as error:
            self._note(f"\n{error}" if self._out is self._notes else str(error), "red")
            raise
        self._out.print()
        self._note(_summary(answer), "dim")
        return answer

    def _show(self, text: str) -> None:
        # Not through rich, which would expand tabs: a script gets what the model said.
        self._out.file.write(text.translate(_HARMLESS))
        self._out.file.flush()

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        self._note("Forgotten.", "dim")

    def _system(self, rest: str) -> None:
        if rest:
            self._conversation.system = rest
        self._note(f"System message: {self._conversation.system or 'none'}", "dim")

    def _help(self, rest: str) -> None:
        for name, (_, meaning) in self._commands.items():
            self._note(f"{name:<8} {meaning}", "dim")
        self._note("Ctrl-C   interrupt an answer", "dim")

    def _exit(self, rest: str) -> None:
        self._left = True

    def _note(self, text: str, style: str) -> None:
        self._notes.print(Text(text.translate(_HARMLESS)), style=style)


def _summary(answer: Answer) -> str:
    parts = [f"{answer.num_tokens} token{'' if answer.num_tokens == 1 else 's'}"]
    if answer.first_token_s is not None:
        parts.append(f"first after {answer.first_token_s:.2f} s")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.at_limit:
        parts.append("cut at the token limit")
    if answer.interrupted:
        parts.append("interrupted")
    return " · ".join(parts)
