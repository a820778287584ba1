"""Shared layers: what they compute and what they keep for the backward pass."""

import pytest
import timm.layers
import torch
from torch import nn

import vision_ssm
from vision_ssm.layers import add_norm, build_mlp, get_norm, synchronize_batch_norms


def kept_bytes(function):
    """Bytes of what autograd keeps for backward in `function`, parameters and inputs aside."""
    sizes = {}

    def pack(tensor):
        if tensor.grad_fn is not None:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function()
    return output, sum(sizes.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast bfloat16"])
@pytest.mark.parametrize("frozen", [False, True])
def test_mlp_equals_timms_and_keeps_half(dtype, frozen):
    ours = build_mlp(8, 32)
    theirs = timm.layers.Mlp(8, 32)
    theirs.load_state_dict(ours.state_dict())
    ours.fc2.requires_grad_(not frozen)
    theirs.fc2.requires_grad_(not frozen)
    x = torch.randn(2, 3, 5, 8)
    results = []
    for mlp in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            y, size = kept_bytes(lambda mlp=mlp, leaf=leaf: mlp(leaf))
        y.float().square().sum().backward()
        results.append((size, y, leaf.grad, [parameter.grad for parameter in mlp.parameters()]))
    (small, y, grad_x, grads), (large, *want) = results
    hidden = x[..., 0].numel() * 32 * (4 if dtype is None else 2)
    assert small <= large - (0 if frozen else hidden)
    torch.testing.assert_close([y, grad_x, *grads], [want[0], want[1], *want[2]], rtol=1e-5, atol=1e-6)


def test_mlp_calls_its_layers_where_somebody_watches():
    mlp, seen = build_mlp(8, 16), []
    mlp.fc2.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape))
    mlp(torch.randn(4, 8))
    assert seen == [(4, 16)]


def test_norms_are_called_where_somebody_watches():
    block = vision_ssm.create_model("vmamba_micro").stages[0].blocks[0]
    seen, x = [], torch.randn(1, 4, 4, 16)
    plain = block(x)
    norms = {"norm1": block.norm1, "norm2": block.norm2, "out_norm": block.mixer.out_norm}
    for name, norm in norms.items():
        norm.register_forward_hook(lambda module, inputs, output, name=name: seen.append(name))
    watched = block(x)
    assert seen == ["norm1", "out_norm", "norm2"]
    torch.testing.assert_close(watched[0], plain[0])
    torch.testing.assert_close(watched[1][0], plain[1][0])


def test_mlp_without_gradients_and_with_dropout():
    mlp = build_mlp(8, 16, dropout=0.5)
    x = torch.randn(4, 8)
    assert not torch.equal(mlp(x), mlp(x))
    with torch.no_grad():
        plain = mlp.eval()(x)
    torch.testing.assert_close(mlp(x), plain)


@pytest.mark.parametrize("name", ["layer", "rms", "batch", "none"])
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_add_norm(name, drop):
    """The sum and its norm, with the samples that drop path lets through."""
    norm, drop_path = get_norm(name, 6), timm.layers.DropPath(drop)
    x, branch = torch.randn(8, 3, 4, 6), torch.randn(8, 3, 4, 6)
    torch.manual_seed(1)
    s, y = add_norm(norm, x, branch, drop_path)
    factor = ((s - x) / branch).flatten(1)
    assert torch.allclose(factor, factor[:, :1].expand_as(factor), atol=1e-3)
    assert set(factor[:, 0].round().tolist()) == ({1.0} if not drop else {0.0, 2.0})
    torch.testing.assert_close(y, norm(s))
    assert torch.equal(add_norm(norm, x)[0], x)
    torch.testing.assert_close(add_norm(norm, x)[1], norm(x))


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_add_norm_gives_what_the_next_layer_takes(name):
    norm, x = get_norm(name, 6), torch.randn(2, 3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s, y = add_norm(norm, x, torch.randn(2, 3, 6, dtype=torch.bfloat16), nn.Identity())
        assert norm(x).dtype == norm(x.bfloat16()).dtype == torch.float32
        assert norm(x.double()).dtype == add_norm(norm, x.double(), x)[1].dtype == torch.float64
    assert s.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_add_norm_calls_a_norm_that_is_watched_or_changed(name):
    """The fused operator stands for the plain norms alone; the result is the same either way."""
    norm, seen = get_norm(name, 6), []
    norm.weight.data.uniform_(0.5, 2)
    x, branch = torch.randn(2, 3, 6), torch.randn(2, 3, 6)
    plain = add_norm(norm, x, branch)
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    watched = add_norm(norm, x, branch, nn.Identity())
    assert len(seen) == 1 and torch.equal(seen[0], plain[0])
    torch.testing.assert_close(watched, plain)
    handle.remove()
    add_norm(norm, x, branch)
    assert len(seen) == 1

    class Doubled(type(norm)):
        def forward(self, x):
            return 2 * super().forward(x)

    doubled = Doubled(6, eps=norm.eps)
    doubled.load_state_dict(norm.state_dict())
    torch.testing.assert_close(add_norm(doubled, x, branch)[1], 2 * plain[1])


def test_rms_norm_is_pytorchs():
    ours, theirs, x = get_norm("rms", 6, eps=1e-3), nn.RMSNorm(6, eps=1e-3), torch.randn(2, 3, 6)
    ours.weight.data.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.normalise(x, torch.bfloat16), theirs(x).bfloat16())
    s, y = add_norm(ours, x, x)
    assert torch.equal(s, 2 * x)
    torch.testing.assert_close(y, theirs(2 * x))


def test_synchronized_batch_norms_keep_layout_activation_and_weights():
    """Compared in evaluation: in training they need several GPUs."""
    names = ("vcmamba_micro", "vssd_micro", "spatialmamba_micro")  # channel-last norms, timm's with activations, torch's
    for name in names:
        model = vision_ssm.create_model(name, num_classes=3).eval()
        image = torch.randn(2, 3, 64, 96)
        with torch.no_grad():
            before, keys = model(image), list(model.state_dict())
            parameters = [id(parameter) for parameter in model.parameters()]
            model = synchronize_batch_norms(model)
            torch.testing.assert_close(model(image), before)
        assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
        norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(isinstance(module, nn.SyncBatchNorm) for module in norms)
