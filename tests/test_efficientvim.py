"""The hidden state mixer as a strategy, and EfficientViM: blocks, classifier, official weights, timm as a witness."""

import golden_cases
import pytest
import torch
from engine_support import CONFIGS, read_config
from timm.models.efficientvim import EfficientViM as TimmModel
from timm.models.efficientvim import EfficientViMDistilled as TimmDistilledModel

import vision_ssm
from vision_ssm.backbones.efficientvim import EfficientViM, SharedBlock
from vision_ssm.layers import HiddenStateHead
from vision_ssm.scans import build_scan
from vision_ssm.weights import load_state_dict

CASES = golden_cases.load("ops/efficientvim_hsm_ssd")["cases"]
OURS = {
    "BCdt_proj.conv.weight": "in_proj.weight",
    "dw.conv.weight": "conv.weight",
    "hz_proj.conv.weight": "hidden_in_weight",
    "out_proj.conv.weight": "hidden_out_weight",
    "A": "A",
    "D": "D",
}


@pytest.mark.parametrize("case", CASES, ids=[case["tag"] for case in CASES])
def test_golden_mixer(case):
    arrays = {name: torch.tensor(value, dtype=torch.float64) for name, value in case["inputs"].items()}
    options = dict(state_dim=case["state_dim"], expand=case["ssd_expand"], inert_decay=True)
    mixer = build_scan(dict(type="hidden_state", **options), case["d_model"]).double()
    shapes = {name: parameter.shape for name, parameter in mixer.named_parameters()}
    mixer.load_state_dict({OURS[name]: arrays[name].view(shapes[OURS[name]]) for name in OURS})
    x = arrays["x"].unflatten(2, (case["H"], case["W"])).permute(0, 2, 3, 1).requires_grad_()  # (B, H, W, C)
    y, hidden = mixer.mix(x)
    outputs = {"y": y.permute(0, 3, 1, 2), "h": hidden.transpose(1, 2)}  # the original's axes
    sum((outputs[k] * torch.tensor(grad, dtype=torch.float64)).sum() for k, grad in case["grad_output"].items()).backward()
    for name, output in outputs.items():
        expected = torch.tensor(case["outputs"][name], dtype=torch.float64)
        torch.testing.assert_close(output, expected.view(output.shape), rtol=1e-9, atol=1e-9)
    grads = {name: dict(mixer.named_parameters())[ours].grad for name, ours in OURS.items()}
    grads["x"] = x.grad.permute(0, 3, 1, 2).flatten(2)
    assert set(grads) == set(case["grad_inputs"])
    for name, grad in grads.items():
        expected = torch.tensor(case["grad_inputs"][name], dtype=torch.float64).view(grad.shape)
        torch.testing.assert_close(grad, expected, rtol=1e-9, atol=1e-9, msg=name)
    assert not grads["A"].any()
    torch.testing.assert_close(mixer(x), y)


def test_initial_values():
    model = vision_ssm.create_model("efficientvim_micro")
    block = model.stages[2].blocks[1]
    assert torch.equal(block.alpha, torch.full((4, 48), 1e-4)) and torch.equal(block.mixer.D, torch.ones(1))
    assert 1 <= block.mixer.A.min() and block.mixer.A.max() <= 16
    assert all(torch.equal(module.weight, torch.ones_like(module.weight)) for module in block.modules() if hasattr(module, "running_var"))
    bound = 48**-0.5  # a convolution's own
    assert 0.9 * bound < block.mlp.fc1.weight.abs().max() <= bound
    assert 0.9 * bound < block.mixer.hidden_in_weight.abs().max() <= bound
    head = model.head.label
    assert torch.equal(head.weights, torch.ones(4)) and not head.map.bias.any() and 0.018 < head.map.weight.std() < 0.022


def test_a_block_mixes_in_shares():
    block = SharedBlock(16, dict(type="hidden_state", state_dim=3)).eval()
    x = torch.randn(1, 4, 5, 16)
    with torch.no_grad():
        block.alpha.fill_(-40.0)  # a share of 0: every branch is left out
        torch.testing.assert_close(block(x)[0], x)
        block.alpha[0] = 40.0  # a share of 1: the first convolution takes the place of its input
        torch.testing.assert_close(block(x)[0], block.conv1(x))
        block.alpha[0] = 0.0
        torch.testing.assert_close(block(x)[0], (x + block.conv1(x)) / 2)
    assert block(x)[1].shape == (1, 3, 16)


TINY = dict(embed_dim=(16, 24, 32), depths=(1, 2, 1), state_dim=(5, 4, 3), num_classes=7)


def timm_model(cls):
    torch.manual_seed(0)
    model = cls(**TINY).eval()
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(value + 0.3 * torch.rand_like(value))  # no parameter and no statistic is left as it starts
    return model


@pytest.mark.parametrize("size", [(64, 64), (80, 131)], ids=str)
@pytest.mark.parametrize("distilled", [False, True])
def test_timm_computes_the_same(distilled, size):
    theirs = timm_model(TimmDistilledModel if distilled else TimmModel)
    config = {**TINY, "distillation": distilled}
    ours = vision_ssm.import_official("efficientvim", config, theirs.state_dict())
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)
        for got, want in zip(ours.forward_intermediates(x), theirs.forward_intermediates(x, intermediates_only=True), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_distilled_head_has_two_answers_in_training():
    model = vision_ssm.create_model("efficientvim_micro", distilled=True, num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    label, teacher = model(x)
    assert label.shape == teacher.shape == (2, 5) and not torch.equal(label, teacher)
    model.eval()
    features = model.forward_features(x)
    model.head.train()
    pair = model.forward_head(features)
    torch.testing.assert_close(model.head.eval()([*features[:3]], features[3].mean((2, 3))), sum(pair) / 2)


def test_features_are_hidden_states_and_a_map():
    model = vision_ssm.create_model("efficientvim_micro", num_classes=5).eval()
    x = torch.randn(2, 3, 64, 96)
    features = model.forward_features(x)
    assert [tuple(feature.shape) for feature in features] == [(2, 6, 32), (2, 5, 32), (2, 4, 48), (2, 48, 1, 2)]
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), features[3].mean((2, 3)))
    logits = model.forward_head(features)
    changed = [features[0] + torch.randn_like(features[0]), *features[1:]]
    assert not torch.allclose(model.forward_head(changed), logits), "hidden states of the first stage reach the classifier"


@pytest.mark.parametrize("scan", ["multi_direction", False])
def test_without_hidden_states_the_classifier_sees_the_map(scan):
    model = vision_ssm.create_model("efficientvim_micro", num_classes=5, scan=scan).eval()
    x = torch.randn(1, 3, 64, 64)
    features = model.forward_features(x)
    assert isinstance(features, torch.Tensor) and features.shape == (1, 48, 1, 1)
    torch.testing.assert_close(model(x), model.head.label.map(features.mean((2, 3))))
    assert {key for key in model.state_dict() if key.startswith("head")} == {"head.label.map.weight", "head.label.map.bias"}
    assert EfficientViM.recognises(set(model.state_dict()))


def test_options_of_the_own_strategy():
    model = vision_ssm.create_model("efficientvim_micro", scan=dict(expand=2.0))
    assert [stage.blocks[0].mixer.hidden_out_weight.shape[1] for stage in model.stages] == [64, 64, 96]
    plain = vision_ssm.create_model("efficientvim_micro", scan="hidden_state")
    assert [stage.blocks[0].mixer.conv.weight.shape[0] for stage in plain.stages] == [18, 15, 12]
    assert not any(key.endswith(".A") for key in plain.state_dict()) and plain.hidden_dims == [32, 32, 48]
    with pytest.raises(ValueError, match="state_dim and expand [*] dim must be at least 1, got .* 0.01 [*] 16"):
        build_scan(dict(type="hidden_state", expand=0.01), 16)
    with pytest.raises(ValueError, match="depths, dims and states must have one entry per stage"):
        vision_ssm.create_model("efficientvim_micro", states=(1, 2))


def test_new_classes_keep_the_norms_of_the_features():
    model = vision_ssm.create_model("efficientvim_micro", num_classes=5).eval()
    norms = model.head.norms
    with torch.no_grad():
        norms[0].weight.fill_(2.0)
    model.reset_classifier(3)
    assert isinstance(model.head, HiddenStateHead) and model.head.norms is norms
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    other = vision_ssm.create_model("efficientvim_micro", num_classes=7)
    report = load_state_dict(other, model.state_dict(), reset_head=True)
    assert report.complete and torch.equal(other.head.norms[0].weight, norms[0].weight)


def test_only_its_own_keys_are_recognised():
    for family in sorted(path.name for path in golden_cases.ROOT.iterdir() if path.name != "ops"):
        for name in golden_cases.names(family):
            keys = set(golden_cases.load(name)["state_dict"])
            assert EfficientViM.recognises(keys) == (family == "efficientvim"), name
    for name in vision_ssm.list_models("*_micro"):
        keys = set(vision_ssm.create_model(name).state_dict())
        assert EfficientViM.recognises(keys) == (name == "efficientvim_micro"), name


@pytest.mark.parametrize("name", ["efficientvim_m1", "efficientvim_m2", "efficientvim_m3", "efficientvim_m4"])
def test_both_trainings_of_the_plain_models(name):
    """450 epochs, whose weights are the variant's, and 300; both with 10 more at the last rate."""
    (shorter,) = EfficientViM.published[name]["also"]
    trainings = {"": (EfficientViM.published[name], 450), "_300e": (shorter, 300)}
    for ending, (published, epochs) in trainings.items():
        path = CONFIGS / "classification" / f"{name}_8xb256_in1k{ending}.py"
        reported = f"reported top-1 {published['top1_reported']} % (arXiv 2411.15241), {epochs} epochs"
        assert reported in path.read_text().splitlines()[0] and f"_e{epochs}.pth" in published["file"]
        cfg = read_config(path)
        assert (cfg.model.backbone.name, cfg.train_cfg.max_epochs) == (name, epochs + 10)
        assert cfg.param_scheduler[1].end == epochs and cfg.optim_wrapper.optimizer.lr == 2e-3
        size = EfficientViM.published[name]["input_size"][1]
        assert cfg.train_dataloader.dataset.transform.input_size == cfg.val_dataloader.dataset.transform.input_size == size


def test_wrong_official_config():
    with pytest.raises(ValueError, match="unknown hyperparameters of an original EfficientViM: embed_dims. Did you mean 'embed_dim'"):
        EfficientViM.from_official_config(dict(embed_dims=[1]), set())
