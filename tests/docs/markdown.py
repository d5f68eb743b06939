"""Code blocks of the documentation, and the commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPO_ROOT

PAGES = [
    REPO_ROOT / "README.md",
    *sorted((REPO_ROOT / "docs").glob("*.md")),
    REPO_ROOT / "docker" / "README.md",
    REPO_ROOT / "CONTRIBUTING.md",
]
ELSEWHERE = re.compile(r"needs (a cluster|a GPU|Docker|Kubernetes|Slurm)", re.IGNORECASE)
"""What a reader finds at a command that no test here can run: in a comment on its line or the one
above it; in the last line before the block it holds for all of the block."""
_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)\n(?P<text>.*?)^ *```$", re.DOTALL | re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of code."""

    page: Path
    line: int
    """Of its first fence, from 1."""
    language: str
    text: str
    before: str
    """The last line of text before it."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPO_ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A line of a shell block, continuations joined, without its comment."""

    text: str
    is_elsewhere: bool
    """It says itself that it cannot be run here."""


def read_blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text()
    blocks = []
    for match in _FENCE.finditer(text):
        above = [line for line in text[: match.start()].splitlines() if line.strip()]
        line = text[: match.start()].count("\n") + 1
        body = re.sub(f"^{match['indent']}", "", match["text"], flags=re.M)
        blocks.append(Block(page, line, match["language"], body, above[-1] if above else ""))
    return blocks


def commands_of(block: Block) -> list[Command]:
    """The commands of a shell block."""
    joined = re.sub(r"\s*\\\n\s*", " ", block.text)
    commands, is_above = [], False
    for line in joined.splitlines():
        code, comment = split_comment(line)
        says_so = bool(ELSEWHERE.search(comment))
        if code:
            is_elsewhere = says_so or is_above or bool(ELSEWHERE.search(block.before))
            commands.append(Command(code, is_elsewhere))
            is_above = False
        elif comment:
            is_above = says_so
    return commands


def split_comment(line: str) -> tuple[str, str]:
    """Code and comment of a line; a # inside quotes is code."""
    match = re.match(r"""((?:[^'"#]|'[^']*'|"[^"]*"|(?<=\S)#)*)(#.*)?$""", line)
    assert match is not None, line
    return match[1].strip(), (match[2] or "").lstrip("# ")
