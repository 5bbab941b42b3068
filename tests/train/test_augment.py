"""Augmentations alone and in odd company: smoothing without mixing, RandAugment of grey pictures, wrong ranges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup

from fastmkd.train.augment import Finisher, picture_transform
from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import AugmentRecipe
from fastmkd.train.seeds import seed_all


@pytest.mark.parametrize("count", [1, 3, 4])
def test_labels_are_smoothed_in_batches_of_any_size(count):
    """To the bits that timm's Mixup gives without mixing, which takes even batches alone."""
    images = torch.randint(0, 256, (count, 1, 4, 4), dtype=torch.uint8)
    labels = torch.arange(count) % 3
    plain, _ = Finisher([0.5], [0.5], 3)(images, labels)
    found, soft = Finisher([0.5], [0.5], 3, AugmentRecipe(label_smoothing=0.3))(images, labels)
    assert torch.equal(found, plain)
    theirs = Mixup(prob=0.0, label_smoothing=0.3, num_classes=3)
    _, expected = theirs(torch.zeros(2 * count, 1), torch.cat([labels, labels]))
    assert torch.equal(soft, expected[:count])
    assert soft[0, 0] == pytest.approx(0.8)


def test_a_run_with_an_odd_batch_smooths_labels(recipes):
    options = ["--data.batch_size=15", "--augment.label_smoothing=0.1"]
    assert train(load_recipe("teacher.yaml", options))["updates"] == 4


def test_mixing_still_takes_even_batches():
    with pytest.raises(UserError, match=r"data\.batch_size is 15; mixup and cutmix pair images"):
        load_recipe(options=["--data.batch_size=15", "--augment.cutmix=1.0"])


@pytest.mark.parametrize("policy", ["rand-m9-n9-mstd0.5", "rand-m9-n9-inc1", "rand-m5-n3-p0.8"])
def test_rand_augment_of_grey_is_that_of_grey_in_colours(policy):
    """Timm fills what comes in with a colour, which a picture of one channel cannot take."""
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8))
    transform = picture_transform(AugmentRecipe(rand_augment=policy), 16)
    changed = 0
    for seed in range(20):
        seed_all(seed, "test")
        found = transform(grey)
        seed_all(seed, "test")
        coloured = transform(grey.convert("RGB"))
        assert found.shape == (1, 16, 16)
        assert torch.equal(found.expand(3, -1, -1), coloured)
        changed += not torch.equal(found[0], torch.from_numpy(np.array(grey)))
    assert changed > 10


def test_a_run_on_grey_digits_with_rand_augment(recipes):
    options = ["--augment.rand_augment=rand-m9-mstd0.5-inc1", "--data.workers=0"]
    result = train(load_recipe("teacher.yaml", options))
    assert result["updates"] == 4
    assert not result["bad_pictures"]


@pytest.mark.parametrize("scale", ["[1.0, 0.08]", "[0.0, 1.0]", "[0.5, 3.0]", "[-1, 0.5]", "[.nan, 1.0]"])
def test_a_wrong_share_of_the_area_is_refused(scale):
    with pytest.raises(UserError, match=r"augment.scale is \[.*\]; expected two shares of the area .* at most 1"):
        load_recipe(options=[f"--augment.scale={scale}"])
    assert load_recipe(options=["--augment.scale=[0.25, 0.25]"]).augment.scale == (0.25, 0.25)
