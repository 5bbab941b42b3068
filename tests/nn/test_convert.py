"""convert_cnn changes classes and nothing else; the unmasked network stays what it was, to the bit."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import timm
import torch
from random_masks import draw_mask
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from tiny_cnns import TINY, make
from torch import nn

from fastmkd.nn import MaskedConv2d, PackedFeatures, convert_cnn, pack, revert_cnn
from fastmkd.nn.masked_norm import MaskedBatchNorm2d, MaskedSyncBatchNorm
from fastmkd.nn.timm_layers import MaskedBatchNormAct2d, MaskedSyncBatchNormAct

FAMILIES = ("resnet", "resnet_norm_act", "efficientnet_same", "convnextv2", "vgg_bn", "torchvision_mobilenet_v3")
VISIBLE = draw_mask("mixed", 2, (2, 2), 3)


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()))


@pytest.mark.parametrize(
    ("name", "training"), [(name, True) for name in FAMILIES] + [("resnet_norm_act", False), ("convnextv2", False)]
)
def test_the_unmasked_call_is_bit_equal(name, training):
    plain = make(name).float().train(training)
    images = torch.randn(2, 3, 64, 64)
    cnn = convert_cnn(copy.deepcopy(plain), stats="all")
    outputs = []
    for model in (plain, cnn):
        torch.manual_seed(0)
        out = model(images)
        out.square().sum().backward()
        outputs.append(out)
    assert torch.equal(*outputs)
    for a, b in zip(plain.parameters(), cnn.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)
    for a, b in zip(plain.buffers(), cnn.buffers(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", TINY)
def test_converting_and_reverting_leave_everything_but_classes(name):
    cnn = make(name)
    classes = [type(layer) for layer in cnn.modules()]
    attributes = [dict(vars(layer)) for layer in cnn.modules()]
    tensors = {key: value.data_ptr() for key, value in cnn.state_dict().items()}
    assert convert_cnn(cnn, stats="all") is cnn
    converted = [type(layer) for layer in cnn.modules()]
    assert converted != classes
    assert all(issubclass(new, old) for new, old in zip(converted, classes, strict=True))
    assert {key: value.data_ptr() for key, value in cnn.state_dict().items()} == tensors
    assert convert_cnn(cnn) is cnn  # again: only the statistics change
    assert [type(layer) for layer in cnn.modules()] == converted
    assert revert_cnn(cnn) is cnn
    assert [type(layer) for layer in cnn.modules()] == classes
    for layer, before in zip(cnn.modules(), attributes, strict=True):
        assert vars(layer).keys() == before.keys()
        assert all(vars(layer)[key] is value for key, value in before.items())


def test_hooks_still_run():
    cnn, calls = small(), []
    cnn[0].register_forward_hook(lambda layer, args, out: calls.append(type(out)))
    cnn[1][0].register_forward_pre_hook(lambda layer, args: calls.append("before"))
    convert_cnn(cnn)(pack(torch.randn(2, 3, 4, 4), VISIBLE))
    assert calls == [PackedFeatures, "before"]
    revert_cnn(cnn)(torch.randn(2, 3, 4, 4))
    assert calls[2:] == [torch.Tensor, "before"]


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copy_of):
    cnn = convert_cnn(make("resnet_norm_act"), stats="all").eval()
    other, x = copy_of(cnn), pack(torch.randn(2, 3, 64, 64, dtype=torch.float64), VISIBLE)
    assert torch.equal(other(x), cnn(x))
    assert other.bn1.stats == "all"
    assert isinstance(other.bn1, MaskedBatchNormAct2d)


def test_checkpoints_are_the_plain_networks():
    cnn, plain = convert_cnn(make("resnet", 1)), make("resnet", 2)
    buffer = io.BytesIO()
    torch.save(cnn.state_dict(), buffer)
    buffer.seek(0)
    plain.load_state_dict(torch.load(buffer))
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(plain.eval()(images), cnn.eval()(images))


def test_pooled_logits_and_packed_features():
    cnn, x = convert_cnn(make("resnet")), pack(torch.randn(2, 3, 64, 64, dtype=torch.float64), VISIBLE)
    assert cnn(x).shape == (2, 5)
    features = cnn.forward_features(x)
    assert isinstance(features, PackedFeatures)
    assert features.shape == (2, 24, 2, 2)
    assert torch.equal(features.visible, VISIBLE)
    assert cnn.forward_head(features).shape == (2, 5)


def test_a_backbone_gives_packed_maps_at_every_stride():
    net = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4))
    maps = convert_cnn(net)(pack(torch.randn(2, 3, 64, 64), VISIBLE))
    assert [m.shape[2:] for m in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    assert all(isinstance(m, PackedFeatures) for m in maps)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    cnn = convert_cnn(make("resnet"))
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = copy.deepcopy(cnn)
    expected(pack(images, VISIBLE)).sum().backward()
    stage = cnn.layer2

    def checkpointed(x):
        return x.with_values(
            torch.utils.checkpoint.checkpoint(
                lambda v: stage(x.with_values(v)).values, x.values, use_reentrant=reentrant
            ),
            (8, 8),
        )

    x = cnn.layer1(cnn.maxpool(cnn.act1(cnn.bn1(cnn.conv1(pack(images, VISIBLE))))))
    cnn.forward_head(cnn.layer4(cnn.layer3(checkpointed(x)))).sum().backward()
    torch.testing.assert_close(cnn.conv1.weight.grad, expected.conv1.weight.grad, rtol=1e-9, atol=1e-9)


def test_timms_gradient_checkpointing():
    cnn = convert_cnn(make("resnet"))
    expected = copy.deepcopy(cnn)
    cnn.set_grad_checkpointing()
    x = pack(torch.randn(2, 3, 64, 64, dtype=torch.float64), VISIBLE)
    for model in (cnn, expected):
        model(x).sum().backward()
    torch.testing.assert_close(cnn.conv1.weight.grad, expected.conv1.weight.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    cnn = convert_cnn(make("resnet_bottleneck").float()).eval()
    images = torch.randn(2, 3, 64, 64)
    exact = cnn(pack(images, VISIBLE))
    with torch.autocast("cpu", dtype):
        out = cnn(pack(images, VISIBLE))
    out.float().sum().backward()
    assert out.dtype == dtype
    assert all(p.grad.dtype == torch.float32 for p in cnn.parameters())
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_networks(dtype):
    cnn = convert_cnn(make("convnextv2").to(dtype))
    out = cnn(pack(torch.randn(2, 3, 64, 64, dtype=dtype), VISIBLE))
    assert out.dtype == dtype
    assert bool(out.isfinite().all())


def test_sync_batch_norm():
    synced = convert_cnn(nn.SyncBatchNorm.convert_sync_batchnorm(small()))
    assert type(synced[1][0]) is MaskedSyncBatchNorm
    synced(pack(torch.randn(2, 3, 4, 4), VISIBLE)).values.sum().backward()
    of_timm = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNormAct2d(4))
    expected = convert_cnn(copy.deepcopy(of_timm))
    x = pack(torch.randn(2, 3, 4, 4), VISIBLE)
    of_timm = convert_cnn(convert_sync_batchnorm(of_timm))
    assert type(of_timm[1]) is MaskedSyncBatchNormAct
    torch.testing.assert_close(of_timm(x).values, expected(x).values)
    assert type(revert_cnn(synced)[1][0]) is nn.SyncBatchNorm


def test_an_unconverted_network_says_what_to_do():
    with pytest.raises(TypeError, match=r"batch_norm got a packed map \(in 1\.0, a BatchNorm2d\); convert the network"):
        small()(pack(torch.randn(2, 3, 4, 4), VISIBLE))


class OddBatchNorm(nn.BatchNorm2d):
    pass


@pytest.mark.parametrize(
    ("layer", "error", "match"),
    [
        (nn.ConvTranspose2d(4, 4, 2, 2), TypeError, r"1\.0 is a ConvTranspose2d, which has no masked form; replace it"),
        (nn.PixelShuffle(2), TypeError, "1.0 is a PixelShuffle"),
        (
            nn.Upsample(scale_factor=2, mode="bilinear"),
            ValueError,
            "1.0 is a Upsample with mode='bilinear', which would",
        ),
        (nn.UpsamplingBilinear2d(scale_factor=2), ValueError, "1.0 is a UpsamplingBilinear2d with mode='bilinear'"),
        (nn.InstanceNorm2d(4), TypeError, "1.0 is a InstanceNorm2d"),
        (nn.ZeroPad2d(1), TypeError, "1.0 is a ZeroPad2d"),
        (OddBatchNorm(4), TypeError, "1.0 is a OddBatchNorm, a batch norm that fastmkd has no masked form of"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), ValueError, "1.0 is a Conv2d with padding_mode='refl"),
    ],
)
def test_what_cannot_be_converted_is_named_and_nothing_changes(layer, error, match):
    cnn = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(layer))
    with pytest.raises(error, match=match):
        convert_cnn(cnn)
    assert type(cnn[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("model", "options", "error", "match"),
    [
        (small, {}, TypeError, "model is function; expected a torch.nn.Module"),
        (small(), {"stats": "hidden"}, ValueError, "stats is 'hidden'; expected 'visible' or 'all'"),
    ],
)
def test_bad_arguments(model, options, error, match):
    with pytest.raises(error, match=match):
        convert_cnn(model, **options)


def test_layers_outside_the_masked_part_are_named_at_the_first_packed_call():
    cnn = convert_cnn(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Flatten())))
    with pytest.raises(AttributeError, match=r"\.flatten is not supported .* \(in 1\.0, a Flatten\); call \.to_dense"):
        cnn(pack(torch.randn(2, 3, 4, 4), VISIBLE))


def test_a_single_layer():
    conv = nn.Conv2d(3, 4, 1)
    assert convert_cnn(conv) is conv
    assert type(conv) is MaskedConv2d
    assert type(revert_cnn(conv)) is nn.Conv2d
    assert type(convert_cnn(nn.BatchNorm2d(3))) is MaskedBatchNorm2d


def test_nn_without_timm():
    program = (
        "import sys; sys.modules['timm'] = None\n"
        "import torch\n"
        "from fastmkd.nn import MaskedConv2d, PackedFeatures, convert_cnn, pack, revert_cnn\n"
        "cnn = convert_cnn(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)))\n"
        "print(cnn(pack(torch.ones(1, 3, 2, 2), torch.ones(1, 1, 1).bool())).shape)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "torch.Size([1, 4, 2, 2])", done.stderr


COMPILED = (
    "mobilenetv3",
    "efficientnet_same",
    "regnety",
    "vgg_bn",
    "resnet_group_norm",
    "torchvision_resnet",
    "resnet18",
)


@pytest.mark.parametrize("name", ["convnextv2", *(pytest.param(name, marks=pytest.mark.long) for name in COMPILED)])
def test_compiled_networks_have_no_graph_breaks(name):
    torch._dynamo.reset()
    plain = make(name) if name in TINY else timm.create_model(name, num_classes=5).double()
    cnn = convert_cnn(plain)
    compiled = torch.compile(copy.deepcopy(cnn), backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    for seed in (3, 5):  # another mask with other counts
        visible = draw_mask("mixed", 2, (2, 2), seed)
        out, expected = compiled(pack(images, visible)), cnn(pack(images, visible))
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        out.sum().backward()
        expected.sum().backward()
    for a, b in zip(compiled.parameters(), cnn.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-8)
    for a, b in zip(compiled.buffers(), cnn.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_a_training_step_on_the_gpu_reads_nothing_back():
    visible = draw_mask("mixed", 2, (2, 2), 3)
    cnn, images = convert_cnn(make("resnet_bottleneck").float()).cuda(), torch.randn(2, 3, 64, 64, device="cuda")

    def step(visible, count):
        cnn(pack(images, visible, count=count)).sum().backward()

    step(visible.cuda(), int(visible.sum()))  # kernels are built, constants copied
    other = draw_mask("mixed", 2, (2, 2), 5)
    on_gpu, count = other.cuda(), int(other.sum())
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(on_gpu, count)
    finally:
        torch.cuda.set_sync_debug_mode("default")
