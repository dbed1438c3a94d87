"""Short trainings on real photographs, from packing to the score: the figures of docs/reproducing.md.

    python benchmarks/trainings.py --data FOLDER

FOLDER holds clean photographs: bsds500/train to learn from, kodak24 to score on. Two tasks: Gaussian noise of sigma 25,
scored on whole Kodak crops against the best Gaussian blur; and inpainting the centre of 64-pixel images, scored inside
the hole against the mean colour of what is visible. Each command is shown as it is run; a second start with the same
--work continues.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from support.report import Report, make_parser, print_table, run_main

from data_pipeline.errors import DataError, EnvironmentFault
from data_pipeline.reader import Dataset
from data_pipeline.sources import scan_images
from rddm_dist.evaluation.protocol import PROTOCOLS, score

CONFIGS = Path(__file__).parent / "configs"
PACKAGES = ("torch", "numpy", "deepspeed", "ray")
BLURS = (0.8, 1.0, 1.2, 1.4, 1.6)
SMALL, TRAIN_SIDE = 64, 80  # pixels: images to score on, and the shorter side of those to learn from
LIMIT_S = 3600


def main() -> None:
    options = parse_arguments()
    report = Report("trainings", PACKAGES)
    train, test = options.data / "bsds500" / "train", options.data / "kodak24"
    for folder in (train, test):
        if not folder.is_dir():
            raise DataError(f"--data={options.data} has no {folder.relative_to(options.data)}; see --help")
    results = {}
    if "denoise" in options.tasks:
        results["denoise"] = denoise(options, train, test)
    if "inpaint" in options.tasks:
        results["inpaint"] = inpaint(options, train, test)
    rows = [(task, name, f"{value:.2f}") for task, values in results.items() for name, value in values.items()]
    print_table(("task", "images", "PSNR, dB"), rows)
    report.write(options.json, settings={"workers": options.workers}, results=results)


def denoise(options: argparse.Namespace, train: Path, test: Path) -> dict[str, float]:
    """PSNR of whole images: noisy, blurred as well as it can be, restored."""
    clean, data = options.work / "clean", options.work / "noisy"
    rddm("pack", "--clean", train, "--out", clean)
    rddm("pack", "--clean", test, "--degrade", "noise(sigma=25)", "--out", data)
    report = train_and_evaluate(options, "short_denoise", clean, data)
    pairs = [(sample.input, sample.target) for sample in read(data)]
    blurred = {sigma: mean_psnr([(blur(x, sigma), y) for x, y in pairs]) for sigma in BLURS}
    best = max(blurred, key=lambda sigma: blurred[sigma])
    scores = report["scores"]
    return {
        "noisy": scores["input_psnr"]["mean"],
        f"Gaussian blur of sigma {best:g}, the best of {len(BLURS)} on these images": blurred[best],
        "restored": scores["psnr"]["mean"],
    }


def inpaint(options: argparse.Namespace, train: Path, test: Path) -> dict[str, float]:
    """PSNR inside the hole: filled with the mean colour of the rest, restored."""
    clean, data = options.work / "small", options.work / "holes"
    shrink(train, options.work / "small_photos", TRAIN_SIDE, is_square=False)
    rddm("pack", "--clean", options.work / "small_photos", "--out", clean)
    shrink(test, options.work / "small_test_photos", SMALL, is_square=True)
    rddm("pack", "--clean", options.work / "small_test_photos", "--degrade", "inpaint(mask=center)", "--out", data)
    train_and_evaluate(options, "short_inpaint", clean, data)
    filled, restored = [], []
    for sample in read(data):
        hole = sample.mask[:, :, 0] > 127
        image = np.asarray(Image.open(options.work / "short_inpaint" / "report" / "images" / f"{sample.key}.png"))
        truth, mean = sample.target[hole][None], sample.target[~hole].mean(axis=0).round().astype(np.uint8)
        filled.append((np.broadcast_to(mean, truth.shape), truth))
        restored.append((image[hole][None], truth))
    return {"hole filled with the mean colour": mean_psnr(filled), "hole restored": mean_psnr(restored)}


def shrink(source: Path, folder: Path, side: int, *, is_square: bool) -> None:
    """Write the photographs of `source` with their shorter side, or both, of `side` pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in scan_images(source, flag="--data").items():
        with Image.open(path) as file:
            image = file.convert("RGB")
        scale = side / min(image.size)
        size = (side, side) if is_square else (round(image.width * scale), round(image.height * scale))
        image.resize(size, Image.Resampling.BICUBIC).save(folder / f"{name}.png")


def train_and_evaluate(options: argparse.Namespace, name: str, clean: Path, data: Path) -> dict[str, Any]:
    """Train configs/NAME.yaml into WORK/NAME and score it.   -> report.json"""
    config, run = CONFIGS / f"{name}.yaml", options.work / name
    workers = str(options.workers)
    rddm(
        "train", config, "--storage", options.work, "--run", name, "--workers", workers,
        f"data.uri={json.dumps(str(clean))}",
    )  # fmt: skip
    rddm("evaluate", run, "--data", data, "--actors", workers, "--save-images")
    return json.loads((run / "report" / "report.json").read_text())


def rddm(*arguments: Any) -> None:
    """Run a command of this package, shown as a user would type it."""
    words = [str(argument) for argument in arguments]
    print(f"$ rddm {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "rddm_dist.cli.main", *words], timeout=LIMIT_S, check=False)
    if done.returncode:
        raise EnvironmentFault(f"rddm {words[0]} ended with {done.returncode}; its own message stands above")


def read(data: Path) -> list[Any]:
    """The samples of a packed dataset, whole."""
    dataset = Dataset(str(data))
    return [dataset.whole(entry) for entry in dataset.images()]


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """(H, W, 3) uint8 -> the same"""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


def mean_psnr(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean over images of PSNR in dB, all channels together.   pairs: of (H, W, 3) uint8"""
    return float(np.mean([score(PROTOCOLS["rgb"], x, y, metrics=("psnr",))["psnr"] for x, y in pairs]))


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__, "trainings")
    parser.add_argument("--data", type=Path, required=True, help="folder with bsds500/train and kodak24")
    parser.add_argument("--work", type=Path, default=Path("runs/trainings"), help="where runs go (runs/trainings)")
    parser.add_argument("--workers", type=int, default=2, help="training workers and evaluation actors (2)")
    parser.add_argument("--tasks", nargs="+", choices=("denoise", "inpaint"), default=("denoise", "inpaint"))
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
