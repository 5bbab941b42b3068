"""Every example runs to its end and says what it promises to say."""

from __future__ import annotations

import re
from pathlib import Path

import fresh
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
RUNS = {
    "bare_loop.py": (["--steps", "60"], ("sklearn",), r"student accuracy (0\.\d+)"),
    "lightning.py": (["--steps", "3"], ("sklearn", "pytorch_lightning"), r"accuracy \S+ ce (\d+\.\d+) kd \d"),
    "hf_trainer.py": (["--steps", "3"], ("sklearn", "transformers", "accelerate"), r"training loss (\d+\.\d+)"),
    "spark_pretraining.py": (
        ["--epochs", "2", "--tune-epochs", "1", "--labels", "32"],
        ("sklearn", "matplotlib"),
        r"pre-training, epoch 1 of 2: loss (\d\.\d+)[\s\S]*from scratch: accuracy \d",
    ),
    "spoken_words.py": (
        ["--tones", "--steps", "30", "--repeats", "1"],
        (),
        r"student alone: accuracy 0\.\d+\nstudent by MaskedKD: accuracy (0\.\d+)",
    ),
    "dino.py": (
        ["--data", "digits", "--images", "300", "--steps", "4", "--batch", "8"],
        ("sklearn",),
        r"untrained: k-NN accuracy 0\.\d+[\s\S]*\ntrained: k-NN accuracy (0\.\d+)",
    ),
    "timm_loop.py": (["--steps", "2", "--batch", "2", "--device", "cpu"], (), r"step 1 ce (\d+\.\d+) kd \d"),
}


def test_every_example_is_run():
    assert sorted(RUNS) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.parametrize("name", RUNS)
def test_example(name, tmp_path):
    arguments, packages, promise = RUNS[name]
    for package in packages:
        pytest.importorskip(package)
    run = fresh.run(EXAMPLES / name, *arguments, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    number = re.search(promise, run.stdout)
    assert number, run.stdout
    if name == "bare_loop.py":
        assert float(number[1]) > 0.3  # chance is 0.1
    if name == "spark_pretraining.py":
        assert float(re.search(r"epoch 2 of 2: loss (\S+)", run.stdout)[1]) < 0.9 * float(number[1])
        assert (tmp_path / "spark.png").stat().st_size > 10_000


def test_examples_are_short():
    for path in EXAMPLES.glob("*.py"):
        longer = path.name in ("spark_pretraining.py", "spoken_words.py")
        assert len(path.read_text().splitlines()) <= (150 if longer else 80), path.name
