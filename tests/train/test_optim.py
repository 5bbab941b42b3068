"""The optimizer of a recipe: nothing in it is ignored in silence, and a run with it can go on from a checkpoint."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from timm.optim import list_optimizers
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from fastmkd.train.engine import train
from fastmkd.train.errors import UserError
from fastmkd.train.optim import build_optimizer
from fastmkd.train.recipe import load_recipe
from fastmkd.train.schema import OptimRecipe


def build(name: str = "adamw", **kwargs):
    return build_optimizer(OptimRecipe(name=name, kwargs=kwargs), nn.Linear(3, 2), nn.ModuleDict(), 1)


@pytest.mark.parametrize(
    ("name", "kwargs", "said"),
    [
        ("adamw", {"weight_decay": 0.3}, "optim.kwargs has weight_decay, .* no effect there; say optim.weight_decay"),
        ("adamw", {"layer_decay": 0.5}, "layer_decay, .*; say optim.layer_decay instead"),
        ("adamw", {"lr": 0.5}, "has lr, .*; say optim.lr instead"),
        ("adamw", {"opt": "sgd"}, "has opt, .*; say optim.name instead"),
        ("adamw", {"filter_bias_and_bn": False}, "has filter_bias_and_bn, .*; remove it"),
        ("adamw", {"param_group_fn": None}, "has param_group_fn, .*; remove it"),
        ("muon", {"fallback_list": ["head"]}, "has fallback_list, .*; remove it"),
        ("adamw", {"momentum": 0.5}, "has momentum, which optim.name 'adamw' does not use; remove it"),
        ("sgd", {"betas": [0.9, 0.95]}, "has betas, which optim.name 'sgd' does not use"),
        ("sgd", {"eps": 1e-3}, "has eps, which optim.name 'sgd' does not use"),
        ("adamw", {"beta": 0.9}, "timm cannot make optim.name 'adamw' with .*beta"),
        ("adamww", {}, "timm cannot make optim.name 'adamww'"),
        ("adahessian", {}, "needs second derivatives"),
    ],
)
def test_arguments_without_effect_are_refused(name, kwargs, said):
    with pytest.raises(UserError, match=said):
        build(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [("sgd", "momentum", 0.5), ("adamw", "betas", (0.8, 0.9)), ("adamw", "eps", 1e-3), ("lion", "foreach", False)],
)
def test_arguments_with_effect_arrive(name, key, value):
    assert all(group[key] == value for group in build(name, **{key: value}).param_groups)


def test_another_optimizer_on_the_command_line_drops_the_arguments_of_the_recipes(tmp_path):
    """As the message about them says."""
    (tmp_path / "recipe.yaml").write_text("optim: {name: sgd, kwargs: {momentum: 0.8, nesterov: false}}")
    optim = load_recipe(tmp_path / "recipe.yaml", ["--optim.name=adamw"]).optim
    with pytest.raises(UserError, match=r"momentum, which .*'adamw' does not use; .*--optim.kwargs=\{\} drops"):
        build_optimizer(optim, nn.Linear(3, 2), nn.ModuleDict(), 1)
    optim = load_recipe(tmp_path / "recipe.yaml", ["--optim.name=adamw", "--optim.kwargs={}"]).optim
    assert build_optimizer(optim, nn.Linear(3, 2), nn.ModuleDict(), 1).defaults["betas"] == (0.9, 0.999)


def test_a_negative_weight_decay_is_refused():
    with pytest.raises(UserError, match=r"optim.weight_decay is -1.0; expected a number from 0 to inf"):
        load_recipe(options=["--optim.weight_decay=-1"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lookahead_adamw", "another optimizer inside it holds it"),
        ("adafactorbv", "torch.dtype"),
        ("cadafactorbvc", "torch.dtype"),
        pytest.param("kron", "list", marks=pytest.mark.long),  # compiles for ten seconds
    ],
)
def test_optimizers_that_no_checkpoint_holds_are_refused(name, why):
    """Timm's Lookahead would make a further step at every save; adafactorbv would end the run at the first."""
    with pytest.raises(UserError, match=f"the state of optim.name '{name}' cannot be kept in a checkpoint .*{why}"):
        build(name)


def test_nothing_random_is_drawn_by_the_trial():
    torch.manual_seed(3)
    student, expected = nn.Linear(3, 2), torch.rand(3)
    torch.manual_seed(3)
    student = nn.Linear(3, 2)
    build_optimizer(OptimRecipe(), student, nn.ModuleDict(), 1)
    assert torch.equal(torch.rand(3), expected)


REFUSED = {"adafactorbv", "adafactorbvc", "adahessian", "cadafactorbv", "cadafactorbvc", "kron", "kronc", "kronw"}
OTHERS = [name for name in list_optimizers() if name not in REFUSED and not name.startswith(("bnb", "fused"))]  # GPUs


def small(name: str):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    return student, build_optimizer(OptimRecipe(name=name, lr=1e-2), student, nn.ModuleDict(), 1)


def steps(student: nn.Module, optimizer, first: int, last: int) -> None:
    for number in range(first, last):
        generator = torch.Generator().manual_seed(number)
        for parameter in student.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_optimizer_goes_on_to_the_bit(name):
    """Saved and taken up as a run does it; one for which that fails has to be refused."""
    how = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    straight, optimizer = small(name)
    steps(straight, optimizer, 0, 15)
    saved, optimizer = small(name)
    steps(saved, optimizer, 0, 7)
    weights, state = copy.deepcopy(get_state_dict(saved, optimizer, options=how))
    steps(saved, optimizer, 7, 15)
    resumed, optimizer = small(name)
    how = StateDictOptions(full_state_dict=True)
    set_state_dict(resumed, optimizer, model_state_dict=weights, optim_state_dict=state, options=how)
    steps(resumed, optimizer, 7, 15)
    for expected, one, other in zip(*(list(m.parameters()) for m in (straight, saved, resumed)), strict=True):
        assert torch.equal(one, expected), "being saved has changed something"
        assert torch.equal(other, expected), "it does not go on"


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "muon"])
def test_saving_changes_nothing(recipes, name):
    """A run that saves after each update ends as one that saves once."""
    options = [f"--optim.name={name}", "--schedule.epochs=2"]
    for every in (0, 1):
        train(load_recipe("teacher.yaml", [*options, f"--name=every{every}", f"--run.save_every={every}"]))
    ours, theirs = (load_file(f"runs/every{every}/model.safetensors") for every in (1, 0))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
