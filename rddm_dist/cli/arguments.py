"""Argument forms shared by the commands: worker counts, step lists, models and datasets by name."""

from __future__ import annotations

from data_pipeline.errors import ConfigError


def single_count(text: str, *, flag: str) -> int:
    """Parse N, or MIN:MAX with MIN = MAX, for --workers and the --actors of rddm sample."""
    least, most = _parse_range(text, flag=flag, example="2")
    if least < 1 or most < least:
        raise ConfigError(f"{flag}={text} must be at least 1, with MIN not above MAX")
    if least != most:
        raise ConfigError(f"{flag}={text}: a range of workers is not supported yet; give one number")
    return least


def count_range(text: str, *, flag: str) -> tuple[int, int]:
    """Parse N or MIN:MAX.   -> (least, most); N is both, 0 means none"""
    least, most = _parse_range(text, flag=flag, example="1:8")
    if (least, most) != (0, 0) and (least < 1 or most < least):
        raise ConfigError(f"{flag}={text} must be at least 1, with MIN not above MAX; 0 works without Ray")
    return least, most


def _parse_range(text: str, *, flag: str, example: str) -> tuple[int, int]:
    """N as (N, N), MIN:MAX as (MIN, MAX)."""
    low, separator, high = text.partition(":")
    try:
        return int(low), int(high if separator else low)
    except ValueError as error:
        raise ConfigError(f"{flag}={text} must be a number or MIN:MAX, for example {flag} {example}") from error


def steps_list(text: str) -> list[int]:
    """Parse --steps N or N,N,...; each once, rising."""
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--steps={text} must be numbers, for example --steps 5 or --steps 1,2,5,10") from error
    if min(steps) < 1 or len(set(steps)) < len(steps):
        raise ConfigError(f"--steps={text} must be at least 1, each number once")
    return sorted(steps)


def name_list(text: str) -> tuple[str, ...]:
    """Parse names with commas between them."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def single_steps(text: str) -> int:
    """Parse --steps N; a list with one entry is the same."""
    parts = [part for part in text.split(",") if part]
    if len(parts) > 1:
        raise ConfigError(f"--steps={text}: several step counts are not supported yet; give one number")
    try:
        steps = int(parts[0])
    except (ValueError, IndexError) as error:
        raise ConfigError(f"--steps={text} must be a number, for example --steps 5") from error
    if steps < 1:
        raise ConfigError(f"--steps={text} must be at least 1")
    return steps
