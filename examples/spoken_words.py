"""MaskedKD on sound: spectrograms of spoken digits, an AST teacher that sees half of the patches, a smaller student.

The words are spoken by espeak-ng (Debian: apt-get install espeak-ng); the voices of the test are not those of the
training. --tones needs no espeak-ng: a word is then a sequence of three tones.

    python examples/spoken_words.py
    python examples/spoken_words.py --tones --steps 100
"""

from __future__ import annotations

import argparse
import random
import shutil
import subprocess

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmkd
from fastmkd.nn.spectrogram import SpectrogramTransformer

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ACCENTS = ["en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-029"]
TRAIN_VOICES, TEST_VOICES = ["m1", "m2", "m3", "m4", "f1", "f2", "f3"], ["m5", "m7", "f4", "f5"]
RATE, SAMPLES = 22050, 16384  # 0.74 s
N_FFT, HOP, MEL_BINS = 512, 256, 32


def speak(word: str, voice: str) -> Tensor:
    """Returns a word (SAMPLES,) at some pitch and speed, cut or padded, without the silence before it."""
    manner = ["-p", str(random.randint(25, 75)), "-s", str(random.randint(130, 220))]
    done = subprocess.run(["espeak-ng", "-v", voice, *manner, "--stdout", word], capture_output=True, check=True)
    wave = torch.frombuffer(bytearray(done.stdout[44:]), dtype=torch.int16).float() / 2**15  # 44 bytes of WAV header
    wave = wave[int((wave.abs() > 0.01).float().argmax()) :][:SAMPLES]
    return F.pad(wave, (0, SAMPLES - len(wave)))


def tones(word: str, voice: str) -> Tensor:
    """Returns the stand-in for a word: three tones of its own, in the key of the voice."""
    steps = torch.tensor([WORDS.index(word) * factor % 11 for factor in (1, 2, 3)])
    pitch = (300 + 20 * random.random() + 7 * sum(map(ord, voice)) % 80) * 2 ** (steps / 4)
    return 0.3 * torch.sin(2 * torch.pi * (pitch.repeat_interleave(SAMPLES // 3 + 1)[:SAMPLES] / RATE).cumsum(0))


def mel_filters() -> Tensor:
    """Triangles that overlap by half, at even steps on the mel scale: (MEL_BINS, N_FFT // 2 + 1)."""
    top = 2595 * torch.log10(torch.tensor(1 + RATE / 2 / 700))
    edges = 700 * (10 ** (torch.linspace(0, 1, MEL_BINS + 2) * top / 2595) - 1)[:, None]  # Hz
    hertz = torch.linspace(0, RATE / 2, N_FFT // 2 + 1)
    width = edges.diff(dim=0)
    return torch.minimum((hertz - edges[:-2]) / width[:-1], (edges[2:] - hertz) / width[1:]).clamp(min=0)


def spectrograms(waves: Tensor) -> Tensor:
    """(B, SAMPLES) -> log-mel (B, 1, MEL_BINS, SAMPLES // HOP), of mean 0 and deviation 1."""
    noisy = waves + 0.02 * torch.randn_like(waves)
    power = torch.stft(noisy, N_FFT, HOP, window=torch.hann_window(N_FFT), return_complex=True).abs().square()
    mel = (mel_filters() @ power[..., :-1] + 1e-4).log()[:, None]
    return (mel - mel.mean()) / mel.std()


def make_set(voices: list[str], repeats: int, source: object) -> tuple[Tensor, Tensor]:
    """Returns spectrograms of all words in all voices, and their classes."""
    spoken = [(word, f"{accent}+{voice}") for word in WORDS for accent in ACCENTS for voice in voices] * repeats
    waves = torch.stack([source(word, voice) for word, voice in spoken])  # type: ignore[operator]
    return spectrograms(waves), torch.tensor([WORDS.index(word) for word, _ in spoken])


def make_ast(embed_dim: int, depth: int) -> SpectrogramTransformer:
    """Returns an AST with 5 x 10 overlapping patches, frequency x time."""
    size, cut = (MEL_BINS, SAMPLES // HOP), {"patch_size": 8, "stride": 6}
    kwargs = {"embed_dim": embed_dim, "depth": depth, "num_heads": embed_dim // 16, "weight_init": "jax"}
    return SpectrogramTransformer(size, **cut, **kwargs, num_classes=len(WORDS))


def train(name: str, method: nn.Module, sounds: Tensor, labels: Tensor, steps: int) -> None:
    """AdamW with one cycle of the learning rate."""
    optimizer = torch.optim.AdamW(method.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    method.train()
    for step in range(1, steps + 1):
        batch = torch.randint(len(sounds), (32,))
        out = method(sounds[batch], labels[batch])
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            print(f"{name}, step {step} of {steps}: loss {out.loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, sounds: Tensor, labels: Tensor) -> float:
    """Share of sounds that the model gets right."""
    hits = [model.eval()(part).argmax(1) for part in sounds.split(250)]
    return (torch.cat(hits) == labels).float().mean().item()


def main() -> None:
    """Makes the sounds; trains the teacher, the student alone, the student by MaskedKD."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tones", action="store_true", help="tones in the place of words")
    parser.add_argument("--repeats", type=int, default=4, help="how often each voice says each training word")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--keep-ratio", type=float, default=0.5)
    args = parser.parse_args()
    if not args.tones and shutil.which("espeak-ng") is None:
        parser.error("espeak-ng is not installed; on Debian: apt-get install espeak-ng. Or use --tones.")
    random.seed(0)
    torch.manual_seed(0)
    source = tones if args.tones else speak
    sounds, labels = make_set(TRAIN_VOICES, args.repeats, source)
    test_sounds, test_labels = make_set(TEST_VOICES, 1, source)
    print(f"{len(sounds)} sounds to train on, {len(test_sounds)} of other voices to test on")

    teacher, alone, student = make_ast(96, 4), make_ast(32, 2), make_ast(32, 2)
    student.load_state_dict(alone.state_dict())
    train("teacher", fastmkd.Supervised(teacher), sounds, labels, args.steps)
    train("student alone", fastmkd.Supervised(alone), sounds, labels, args.steps)
    method = fastmkd.MaskedKD(student, teacher, keep_ratio=args.keep_ratio)
    train("student by MaskedKD", method, sounds, labels, args.steps)
    method.release()
    for name, model in {"teacher": teacher, "student alone": alone, "student by MaskedKD": student}.items():
        print(f"{name}: accuracy {accuracy(model, test_sounds, test_labels):.3f}")


if __name__ == "__main__":
    main()
