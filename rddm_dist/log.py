"""Logging: quiet on the console, complete in a file, with the chatter of the frameworks in that file too."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
OURS = ("rddm_dist", "data_pipeline", "cluster")
CHATTY = ("DeepSpeed", "deepspeed", "ray", "mlflow", "alembic", "torch", "urllib3", "py.warnings")


def quiet_frameworks() -> None:
    """Environment that keeps telemetry off and start-up messages out of the console. Set before the imports."""
    defaults = {
        "DO_NOT_TRACK": "1",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DEDUP_LOGS": "1",
        "DS_IGNORE_CUDA_DETECTION": "1",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def configure(path: Path, *, level: int = logging.INFO) -> None:
    """Send every log record to `path` (appended). Called again with another path it closes the earlier file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = logging.FileHandler(path)
    file.setFormatter(logging.Formatter(FORMAT))
    file.setLevel(level)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if isinstance(handler, logging.FileHandler) or type(handler) is logging.StreamHandler:
            root.removeHandler(handler)
            handler.close()
    root.addHandler(file)
    root.setLevel(level)
    for name in CHATTY:
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a disk that takes no more records is not worth a traceback per record


class _Console(logging.Handler):
    """Our own warnings on stderr, as plain lines."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] in OURS:
            sys.stderr.write(f"{record.levelname.lower()}: {record.getMessage()}\n")


def configure_console() -> None:
    """What the command line shows of the logs, until and besides a log file."""
    root = logging.getLogger()
    if not any(isinstance(handler, _Console) for handler in root.handlers):
        root.addHandler(_Console(logging.WARNING))
