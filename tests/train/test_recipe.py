"""Recipes: YAML and options become one checked object, and every mistake is named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from fastmkd.train.errors import UserError, shorten
from fastmkd.train.recipe import differences, identity, load_recipe, recipe_from_dict, with_defaults

ROOT = Path(__file__).parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_options_win_over_the_file_and_changes_over_both(tmp_path):
    path = write(tmp_path, "name: a\noptim: {lr: 0.1, accumulate: 3}\nschedule: {epochs: 9}\n")
    recipe = load_recipe(path, ["--optim.lr=0.2", "--schedule.epochs=7"], {"schedule.epochs": 5, "ema": {"decay": 0.5}})
    assert (recipe.optim.lr, recipe.optim.accumulate, recipe.schedule.epochs) == (0.2, 3, 5)
    assert recipe.ema is not None
    assert recipe.ema.decay == 0.5


def test_other_defaults_give_way_to_the_file(tmp_path):
    defaults = {"optim.lr": 0.7, "optim.name": "sgd", "student.kwargs": {"depth": 3}, "seed": 8, "name": "1e3"}
    recipe = load_recipe(write(tmp_path, "optim: {lr: 0.1}"), ["--student.kwargs.num_heads=2"], defaults=defaults)
    assert (recipe.optim.lr, recipe.optim.name, recipe.seed, recipe.name) == (0.1, "sgd", 8, "1e3")
    assert recipe.student.kwargs == {"depth": 3, "num_heads": 2}
    assert defaults["student.kwargs"] == {"depth": 3}


@pytest.mark.parametrize("text", ["method: MaskedKD", "method: {class_path: fastmkd.MaskedKD}"])
def test_method_by_name_or_path_and_its_arguments_as_options(tmp_path, text):
    recipe = load_recipe(write(tmp_path, text), ["--method.init_args.keep_ratio=0.25"])
    assert recipe.method.class_path.endswith("MaskedKD")
    assert recipe.method.init_args["keep_ratio"] == 0.25
    assert not {"student", "teacher"} & set(recipe.method.init_args)


WEIGHTED = (
    "name: w\nmethod: {class_path: fastmkd.MaskedKD, init_args: {weight: 7.0, keep_ratio: 0.3}}\noptim: {lr: 1e-2}"
)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--method=FeatureKD"], {"weight": None, "base": "kd"}),
        (["--method=FeatureKD", "--method.base=fitnet"], {"weight": None, "base": "fitnet"}),
        (["--method.weight=2", "--method=FeatureKD"], {"weight": 2.0}),
        (["--method={class_path: FeatureKD, init_args: {weight: 3}}", "--optim.name=sgd"], {"weight": 3.0}),
        (["--method=MaskedKD"], {"weight": 7.0, "keep_ratio": 0.3}),
        (["--method=fastmkd.methods.maskedkd.MaskedKD"], {"weight": 7.0, "keep_ratio": 0.3}),
        (["--method.keep_ratio=0.4"], {"weight": 7.0, "keep_ratio": 0.4}),
        (["--optim.name=sgd"], {"weight": 7.0, "keep_ratio": 0.3}),
    ],
)
def test_a_method_of_another_class_begins_with_its_own_defaults(tmp_path, options, kept):
    path = write(tmp_path, WEIGHTED)
    recipe = load_recipe(path, options)
    assert {name: recipe.method.init_args[name] for name in kept} == kept
    assert (recipe.name, recipe.optim.lr) == ("w", 0.01)
    assert ("keep_ratio" in recipe.method.init_args) is (recipe.method.class_path.endswith("MaskedKD"))
    changes = {"method": "FeatureKD", "method.init_args.temperature": 2}
    changed = load_recipe(path, changes=changes)
    assert changed.method.init_args == load_recipe(changes=changes).method.init_args


def test_so_it_does_where_the_old_one_is_merged_in(tmp_path):
    text = "student: &all\n  kwargs: {method: {class_path: fastmkd.MaskedKD, init_args: {weight: 7.0}}}\n"
    path = write(tmp_path, text.replace("&all\n  kwargs: {", "\n  kwargs: &all {") + "<<: *all\n")
    assert load_recipe(path).method.init_args["weight"] == 7.0
    assert load_recipe(path, ["--method=FeatureKD"]).method.init_args["weight"] is None


def test_a_mistake_in_a_recipe_whose_method_gives_way_is_still_blamed_on_it(tmp_path):
    path = write(tmp_path, f"{WEIGHTED}\nrun: {{precision: fp8}}")
    with pytest.raises(UserError, match=r"recipe\.yaml is not right: run\.precision is fp8"):
        load_recipe(path, ["--method=FeatureKD"])
    with pytest.raises(UserError, match=r"^method\.init_args\.layers is 3"):
        load_recipe(write(tmp_path, WEIGHTED), ["--method=FeatureKD", "--method.layers=3"])


@pytest.mark.parametrize("path", ["fastmkd.MaskedKD", "fastmkd.DPK", "fastmkd.methods.FeatureKD"])
@pytest.mark.parametrize("value", [True, False, "max-autotune"])
def test_how_the_teacher_is_compiled_is_a_key(tmp_path, path, value):
    recipe = load_recipe(write(tmp_path, f"method: {{class_path: {path}, init_args: {{teacher_compile: {value}}}}}"))
    assert repr(recipe.method.init_args["teacher_compile"]) == repr(value)  # no 1 for True
    again = recipe_from_dict(json.loads(json.dumps(dataclasses.asdict(recipe), default=str)))
    assert identity(again) == identity(recipe)


def test_teacher_recipe_is_found_beside_the_recipe(tmp_path):
    recipe = load_recipe(write(tmp_path, "teacher: {recipe: other.yaml, options: {schedule.epochs: 2}}"))
    assert recipe.teacher is not None
    assert recipe.teacher.recipe == str(tmp_path / "other.yaml")
    assert recipe.teacher.options == {"schedule.epochs": 2}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("nam: x", r"nam is not known; did you mean name\?"),
        ("data: {batchsize: 3}", r"data\.batchsize is not known; did you mean data\.batch_size"),
        ("optim: {learning_rate: 1}", r"optim\.learning_rate is not known; optim has name, lr, lr_images"),
        ("optim: 3", "optim is 3; it takes keys"),
        ("optim: null", "optim is null; it takes keys"),
        ("ema: 3", r"ema is 3; it takes keys, as --ema\.KEY=VALUE, or null"),
        ("data: {batch_size: many}", "data.batch_size"),
        (
            "method: {class_path: MaskedKD, init_args: {keepratio: 0.5}}",
            r"did you mean method\.init_args\.keep_ratio\?",
        ),
        ("method: {class_path: MaskedKD, init_args: {keep_ratio: half}}", "keep_ratio"),
        ("method: {class_path: MaskedKD, init_args: {teacher_compile: quick}}", "teacher_compile"),
        ("method: {class_path: MaskedKD, init_args: {micro_batches: two}}", "micro_batches"),
        ("method: {class_path: collections.OrderedDict}", r"method is collections\.OrderedDict; known are DMAE, DPK"),
        ("method: NoSuchMethod", "method is NoSuchMethod; known are DMAE, DPK"),
        ("data: [1, 2", "YAML|config|expected"),
        ("run: {precision: fp8}", "fp8"),
        ("optim: {lr: -1}", "optim.lr"),
        ("optim: {lr: .nan}", "optim.lr"),
        ("augment: {flip: 1.5}", "augment.flip"),
        ("augment: {mixup: 0.5}\ndata: {batch_size: 7}", "even"),
        ("schedule: {epochs: 2, warmup_epochs: 3}", "schedule.warmup_epochs"),
        ("schedule: {epochs: 0}", "schedule.epochs"),
        ("teacher: {kwargs: {depth: 3}}", "teacher.recipe"),
        (
            "teacher: {recipe: a.yaml, name: b}",
            r"teacher\.name would not be read; change that recipe by teacher\.options",
        ),
        ("teacher: {recipe: a.yaml, kwargs: {depth: 3}}", r"so that teacher\.kwargs would not be read"),
        ("teacher: {recipe: a.yaml, name: b, pretrained: true}", r"teacher\.name and teacher\.pretrained would not be"),
        ("teacher: {name: a, options: {seed: 1}}", r"teacher\.options has seed, but there is no teacher\.recipe"),
        ("name: a/b", "name"),
        ("name: ..", "name"),
    ],
)
def test_mistakes_are_named(tmp_path, text, named):
    with pytest.raises(UserError, match=named) as caught:
        load_recipe(write(tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--run.device=cuda", "run.device is cuda; it takes cpu or null (cpu forces the CPU; null, the default, "
         "takes the GPU if there is one)."),
        ("--optim.learning_rate=1e-3", "--optim.learning_rate is not known; optim has name, lr, lr_images, "
         "weight_decay, layer_decay, clip_grad, accumulate, skip_nonfinite, kwargs."),
        ("--schedule.epoch=7", "--schedule.epoch is not known; did you mean --schedule.epochs? schedule has epochs, "
         "warmup_epochs, warmup_lr, min_lr, milestones, gamma, last_lr, last_epochs."),
        ("--lr=1", "--lr is not known; did you mean --optim.lr?"),
        ("--method=MaskdKD", "method is MaskdKD; known are DMAE, DPK, MKD, DenseKD, FeatureKD, MaskedDINO, MaskedKD, "
         "MoCoV3, Supervised. One of your own is given by the import path of its class, a DistillMethod."),
        ("--method.linear_probe=maybe", "method.init_args.linear_probe is maybe; it takes true or false."),
        ("--ema.deca=0.5", "ema.deca is not known; did you mean ema.decay? ema has decay, warmup."),
        ("--ema.decay=high", "ema.decay is high; it takes a number."),
        ("--data.mean=[a]", "data.mean is ['a']; a in it should be a number."),
        ("--data.mean=3", "data.mean is 3; it takes a list, such as [3] or null (per channel, to normalise with; null "
         "takes the set's own)."),
        ("--optim=3", "optim is 3; it takes keys, as --optim.KEY=VALUE."),
        ("more", "more is one word too many; what belongs to an option stands behind it, as --key=value."),
    ],
)  # fmt: skip
def test_a_wrong_option_is_not_blamed_on_the_recipe(tmp_path, option, said):
    with pytest.raises(UserError) as caught:
        load_recipe(write(tmp_path, "name: a"), [option])
    assert str(caught.value) == said


def test_a_wrong_recipe_is_blamed_whatever_the_options_are(tmp_path):
    path = write(tmp_path, "run: {precision: fp8}")
    with pytest.raises(UserError, match=r"recipe\.yaml is not right: run\.precision is fp8; it takes no, bf16"):
        load_recipe(path, ["--seed=1"])


def test_yaml_runs_no_code(tmp_path):
    victim = tmp_path / "made"
    with pytest.raises(UserError, match="python/object"):
        load_recipe(write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{victim}']"))
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a\noptim: {lr: 0.1}\nseed: 1\noptim: {name: sgd}", "the key optim stands twice, in lines 2 and 4"),
        ("student:\n  kwargs: {depth: 3,\n    num_heads: 2,\n    depth: 4}", "depth stands twice, in lines 2 and 4"),
        ('name: a\n"name": b', "name stands twice, in lines 1 and 2"),
        ("data: {name: digits, name: digits}", "name stands twice, in lines 1 and 1"),
        ("augment: {scale: [0.5, 1.0]}\nteacher:\n  options: {a: {b: 1, b: 1}}", "b stands twice, in lines 3 and 3"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path, text, said):
    with pytest.raises(UserError, match=rf"recipe\.yaml is not right: .*{said}; join the two"):
        load_recipe(write(tmp_path, text))


def test_a_key_may_replace_one_that_is_merged_in(tmp_path):
    text = "optim: &usual {lr: 0.1, accumulate: 3}\nteacher:\n  name: x\n  kwargs: {<<: *usual, lr: 0.2}"
    assert load_recipe(write(tmp_path, text)).teacher.kwargs == {"lr": 0.2, "accumulate": 3}


def test_missing_file_and_unknown_option():
    with pytest.raises(UserError, match="does not exist"):
        load_recipe("nowhere.yaml")
    with pytest.raises(UserError, match=r"optim\.lrr"):
        load_recipe(options=["--optim.lrr=3"])


def test_identity_ignores_where_and_how_but_not_what():
    base = identity(load_recipe())
    for option in ("--run.root=elsewhere", "--run.log_every=3", "--data.workers=7", "--data.root=x"):
        assert identity(load_recipe(options=[option])) == base, option
    for option in ("--seed=1", "--run.precision=bf16", "--student.kwargs.depth=3", "--method=MaskedKD"):
        assert identity(load_recipe(options=[option])) != base, option
    assert "optim.lr is 0.001 there and 0.5 here" in differences(
        base, identity(load_recipe(options=["--optim.lr=0.5"]))
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], ""),
        (["--method.linear_probe=true"], "method.init_args.linear_probe is False there and True here"),
        (["--student.backbone=x"], "student.backbone is None there and 'x' here"),
        (["--data.label_fraction=0.1"], "data.label_fraction is None there and 0.1 here"),
    ],
)
def test_a_run_older_than_a_key_had_its_default(options, said):
    old = identity(load_recipe(options=["--method=Supervised"]))
    arguments = [f"method.init_args.{name}" for name in ("linear_probe", "batch_norm")]
    for key in (*arguments, "student.backbone", "data.label_fraction", "data.subset_seed"):
        del old[key]
    old["method.init_args"] = {}  # as a group without keys is kept
    now = load_recipe(options=["--method=Supervised", *options])
    new = identity(now)
    assert differences(with_defaults(old, new, dataclasses.asdict(now)), new) == said


def test_recipe_survives_json():
    options = ["--method=MaskedKD", "--method.teacher_dtype=torch.bfloat16", "--augment.scale=[0.5,1.0]", "--ema={}"]
    recipe = load_recipe(options=options)
    again = recipe_from_dict(json.loads(json.dumps(dataclasses.asdict(recipe), default=str)))
    assert identity(again) == identity(recipe)
    assert again.method.init_args["teacher_dtype"] is recipe.method.init_args["teacher_dtype"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_right(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    if recipe.teacher is not None and recipe.teacher.recipe is not None:
        assert load_recipe(recipe.teacher.recipe, changes=recipe.teacher.options).data.name == recipe.data.name


def test_shorten():
    assert shorten(map(str, range(5)), limit=3) == "0, 1, 2 and 2 more"
