"""Processes of a Ray that a test has started; the title of a worker says which task or actor runs in it."""

import os

import psutil


def family(pid: int | None = None) -> list[psutil.Process]:
    """A process, by default this one, and all below it that live."""
    try:
        first = psutil.Process(pid or os.getpid())
        found = [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []
    return [process for process in found if _alive(process)]


def title(process: psutil.Process) -> str:
    """Empty where it has ended meanwhile."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def titled(*parts: str, pid: int | None = None) -> list[psutil.Process]:
    """Those of the family, the first process left out, whose title has any of these."""
    return [process for process in family(pid)[1:] if any(part in title(process) for part in parts)]


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
