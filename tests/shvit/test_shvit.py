"""Everything that timm can ask of a model: registration, arguments, features, training, export."""

import copy
import pickle

import pytest
import timm
import torch
from timm.models.shvit import SHViT as TimmSHViT
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from torch import nn

from shvit import deploy
from shvit.shvit import VARIANTS, to_reference
from tests import forks
from tests.conftest import TINY, assert_close, create_tiny, images, randomize

# --- registration -----------------------------------------------------------------------------------------------------


def python(code: str) -> None:
    """Runs `code` where timm is loaded and we are not; it must end well, and a warning is an error."""
    done = forks.run(code=code, strict=True)
    assert (done.returncode, done.stderr) == (0, "")


OURS = "assert timm.create_model('shvit_s1', device='meta').__class__.__module__ == 'shvit.shvit'"


def test_import_registers_the_models_without_a_warning():
    """After timm; tests/test_cli.py imports us first, in an interpreter of its own."""
    python(f"import timm; import shvit; {OURS}; assert len(timm.list_models('shvit*')) == 4")


def test_import_changes_nothing_of_timm_but_the_four_models():
    """Also after timm listed its models; every registry but for SHViT's entries, and SHViT's weights, stay timm's."""
    python(f"""
import copy, dataclasses, timm
from timm.models import _registry as registry
timm.list_models()
def snapshot():
    tables = {{name: table for name, table in vars(registry).items()
              if isinstance(table, (dict, set)) and not name.startswith("__")}}
    rows = {{name: table if isinstance(table, dict) else dict.fromkeys(table) for name, table in tables.items()}}
    return copy.deepcopy({{name: {{key: value for key, value in table.items() if not key.startswith("shvit")}}
                          for name, table in rows.items()}})
names = [f"shvit_s{{i}}" for i in (1, 2, 3, 4)]
before, cfgs, listed = snapshot(), [timm.get_pretrained_cfg(name) for name in names], timm.list_models(pretrained=True)
assert len(before) > 5
import shvit
assert snapshot() == before
assert timm.list_models(module="shvit") == names
assert timm.list_models(pretrained=True) == listed
assert timm.list_pretrained("shvit*") == [name + ".in1k" for name in names]
for name, cfg in zip(names, cfgs):
    for tagged in (name, name + ".in1k"):
        assert dataclasses.replace(cfg, url=None) == timm.get_pretrained_cfg(tagged)
    assert (cfg.hf_hub_id, cfg.tag) == (f"timm/{{name}}.in1k", "in1k")
{OURS}
""")


def test_every_variant_says_where_its_stem_and_classifier_are():
    for name in VARIANTS:
        model = timm.create_model(name, device="meta")
        assert isinstance(model.get_submodule(model.pretrained_cfg["first_conv"]), nn.Conv2d)
        assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.get_classifier()


# --- arguments of create_model ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_num_classes_and_global_pool_choose_the_head():
    x = images(2, 3, 64, 96)
    features = create_tiny().forward_features(x)  # (2, 32, 1, 2)
    assert create_tiny(num_classes=7)(x).shape == (2, 7)
    assert_close(create_tiny(num_classes=0)(x), features.mean((2, 3)))
    assert_close(create_tiny(num_classes=0, global_pool="max")(x), features.amax((2, 3)))
    assert_close(create_tiny(num_classes=0, global_pool="")(x), features)
    both = create_tiny(global_pool="catavgmax")
    assert both.head_hidden_size == both.get_classifier().in_features == 64
    assert_close(
        both.forward_head(features, pre_logits=True), torch.cat([features.mean((2, 3)), features.amax((2, 3))], 1)
    )
    assert both(x).shape == (2, 10)


def test_classes_without_pooling_are_refused():
    with pytest.raises(ValueError, match="pass num_classes=0"):
        create_tiny(global_pool="")


@pytest.mark.parametrize("in_chans", [1, 4])
def test_in_chans_sets_the_stem(in_chans):
    assert create_tiny(in_chans=in_chans)(images(2, in_chans, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize("layout", ["timm", "reference"])
@pytest.mark.parametrize("distilled", [False, True])
def test_pretrained_weights_adapt_to_channels_and_classes(layout, distilled, tmp_path):
    source = create_tiny(distilled=distilled)
    state_dict = source.state_dict() if layout == "timm" else to_reference(source.state_dict())
    torch.save({"model": state_dict}, tmp_path / "weights.pth")
    options = {**TINY, "distilled": distilled, "pretrained": True}
    overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 10}
    same = timm.create_model("shvit_s1", pretrained_cfg_overlay=overlay, **options).eval()
    x = images(2, 1, 64, 64)
    assert_close(same(x.expand(-1, 3, -1, -1)), source(x.expand(-1, 3, -1, -1)))

    options |= {"in_chans": 1, "num_classes": 5}
    model = timm.create_model("shvit_s1", pretrained_cfg_overlay=overlay, **options).eval()
    assert_close(model.forward_features(x), source.forward_features(x.expand(-1, 3, -1, -1)))
    assert model(x).shape == (2, 5)


@pytest.mark.parametrize("layout", ["timm", "reference"])
@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_pretrained_weights_reach_a_feature_extractor(layout, distilled, tmp_path):
    source = create_tiny(distilled=distilled)
    state_dict = source.state_dict() if layout == "timm" else to_reference(source.state_dict())
    torch.save({"model": state_dict}, tmp_path / "weights.pth")
    model = timm.create_model(
        "shvit_s1",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth"), "num_classes": 10},
        features_only=True,
        **{**TINY, "distilled": distilled, "in_chans": 1, "num_classes": 5},
    ).eval()
    x = images(2, 1, 64, 64)
    expected = source.forward_intermediates(x.expand(-1, 3, -1, -1), intermediates_only=True)
    for feature, stage in zip(model(x), expected, strict=True):
        assert_close(feature, stage)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_checkpoint_path_takes_both_layouts(tiny, tmp_path, suffix):
    from safetensors.torch import save_file

    for state_dict in (tiny.state_dict(), to_reference(tiny.state_dict())):
        (save_file if suffix == ".safetensors" else torch.save)(state_dict, tmp_path / f"tiny{suffix}")
        model = timm.create_model("shvit_s1", checkpoint_path=str(tmp_path / f"tiny{suffix}"), **TINY).eval()
        assert_close(model(images(1, 3, 64, 64)), tiny(images(1, 3, 64, 64)))


def test_drop_rate_drops_pooled_features_in_training_alone():
    model, x = create_tiny(drop_rate=0.5), images(2, 3, 64, 64)
    assert_close(model(x), create_tiny()(x))
    pooled = model.train().forward_head(images(2, 32, 1, 1), pre_logits=True)
    assert 0 < (pooled == 0).sum() < pooled.numel()


def test_drop_path_rate_rises_with_depth_and_acts_in_training_alone():
    model, x = create_tiny(drop_path_rate=0.6), images(8, 3, 64, 64)
    rates = [stage.blocks[i].ffn.drop_path for stage in model.stages for i in range(len(stage.blocks))]
    assert [getattr(rate, "drop_prob", 0) for rate in rates] == pytest.approx([0, 0.2, 0.4, 0.6])
    assert_close(model(x), create_tiny()(x))
    for module in model.modules():  # of what differs in training, stochastic depth is left
        module.training = not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    first, second = model(x), model(x)
    assert not torch.equal(first, second)


def test_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="types"):
        timm.create_model("shvit_s1", types=("i", "s", "s"))


@torch.no_grad()
def test_norm_and_activation_reach_every_layer():
    model = create_tiny(norm_layer=nn.InstanceNorm2d, act_layer=nn.GELU)
    kinds = {type(module) for name, module in model.named_modules() if ".se." not in name}
    assert nn.ReLU not in kinds
    assert {nn.GELU, nn.InstanceNorm2d} <= kinds
    x = images(1, 3, 128, 128)
    assert_close(deploy(model)(x), model(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_makes_and_runs_a_model_in_it(dtype):
    model = randomize(timm.create_model("shvit_s1", dtype=dtype, **TINY)).eval()
    assert {tensor.dtype for tensor in model.state_dict().values()} == {dtype, torch.int64}
    out = model(images(2, 3, 64, 64).to(dtype))
    assert out.dtype == dtype
    assert_close(out, create_tiny()(images(2, 3, 64, 64)), 1e-5 if dtype == torch.float64 else 0.1)


@pytest.mark.parametrize("distilled", [False, True])
def test_meta_device_model_initialises_as_one_made_at_once(distilled):
    model = timm.create_model("shvit_s1", device="meta", distilled=distilled, **TINY)
    assert all(parameter.is_meta for parameter in model.parameters())
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    torch.manual_seed(5)
    model.init_weights()
    torch.manual_seed(5)
    made = timm.create_model("shvit_s1", distilled=distilled, **TINY).state_dict()
    for name, tensor in model.state_dict().items():
        if name in ("head.l.weight", "head_dist.l.weight") and distilled:  # drawn in another order
            assert abs(tensor.std() - made[name].std()) < 5e-3
        else:
            torch.testing.assert_close(tensor, made[name], rtol=0, atol=0)


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("feature_cls", ["list", "dict", "getter", "hook", "fx"])
@pytest.mark.parametrize("out_indices", [(0, 1, 2), (0, -1), (1,), (-2,)])
@torch.no_grad()
def test_features_only_gives_the_stages_asked_for(tiny, feature_cls, out_indices):
    x = images(2, 3, 96, 161)
    stages = tiny.forward_intermediates(x, intermediates_only=True)
    model = timm.create_model("shvit_s1", features_only=True, feature_cls=feature_cls, out_indices=out_indices, **TINY)
    for own, value in zip(model.state_dict().values(), tiny.state_dict().values(), strict=False):  # the wrapper renames
        own.copy_(value)
    features = model.eval()(x)
    features = list(features.values()) if isinstance(features, dict) else features
    for feature, index in zip(features, out_indices, strict=True):
        assert_close(feature, stages[index])
    wanted = [index % 3 for index in out_indices]
    assert model.feature_info.channels() == [TINY["embed_dim"][index] for index in wanted]
    assert model.feature_info.reduction() == [(16, 32, 64)[index] for index in wanted]


@torch.no_grad()
def test_intermediates_can_be_chosen_and_stop_early(tiny):
    x = images(1, 3, 64, 96)
    last, stages = tiny.forward_intermediates(x)
    assert_close(last, tiny.forward_features(x))
    assert_close(last, stages[2])
    for indices, expected in (([0, -1], [0, 2]), (2, [1, 2]), ([1], [1]), (None, [0, 1, 2])):
        taken = tiny.forward_intermediates(x, indices=indices, intermediates_only=True)
        assert len(taken) == len(expected)
        for feature, index in zip(taken, expected, strict=True):
            assert_close(feature, stages[index])
    early, _ = tiny.forward_intermediates(x, indices=[0], stop_early=True)
    assert_close(early, stages[0])
    with pytest.raises(ValueError, match="NCHW"):
        tiny.forward_intermediates(x, output_fmt="NLC")


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_pruning_leaves_the_stages_asked_for(tiny, deployed):
    x = images(1, 3, 64, 64)
    stages = tiny.forward_intermediates(x, intermediates_only=True)
    model = deploy(tiny) if deployed else copy.deepcopy(tiny)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert len(model.stages) == 2
    assert_close(model(x), stages[1], 1e-4)
    assert model.num_classes == 0
    whole = copy.deepcopy(tiny)
    whole.prune_intermediate_layers([2], prune_head=False)
    assert_close(whole(x), tiny(x))


@torch.no_grad()
def test_pruned_model_takes_a_head_for_the_stage_that_it_ends_with(tiny):
    for prune_head in (True, False):
        model = copy.deepcopy(tiny)
        model.prune_intermediate_layers([1], prune_head=prune_head)
        model.reset_classifier(4, "avg")
        assert model.num_features == model.get_classifier().in_features == 24
        assert model(images(1, 3, 64, 64)).shape == (1, 4)


# --- the classifier ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_classifier_is_a_linear_layer_that_can_be_reset(tiny, deployed):
    x = images(1, 3, 64, 64)  # a batch of one: a new head must follow the model into eval mode
    model = deploy(tiny) if deployed else tiny
    classifier = model.get_classifier()
    assert isinstance(classifier, nn.Linear)
    assert classifier.out_features == 10
    model.reset_classifier(4)
    assert model.num_classes == model.get_classifier().out_features == 4
    assert model(x).shape == (1, 4)
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert_close(model(x), model.forward_features(x).mean((2, 3)))
    model.reset_classifier(3, "max")
    assert_close(model.forward_head(images(1, 32, 2, 2), pre_logits=True), images(1, 32, 2, 2).amax((2, 3)))
    model.reset_classifier(2)
    assert model.global_pool.pool_type == "max"  # kept, as by timm's models
    model.reset_classifier(0, "")
    assert_close(model(x), model.forward_features(x))


def test_reset_classifier_starts_as_a_new_one(tiny):
    torch.manual_seed(0)
    for model in (deploy(tiny), tiny.double()):
        before = model.get_classifier().weight.dtype
        model.reset_classifier(1000)
        linear = model.get_classifier()
        assert linear.weight.dtype == before
        assert abs(linear.weight.std().item() - 0.02) < 1e-3
        assert not linear.bias.any()


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_new_modules_follow_the_model_into_its_mode(tiny, deployed, training):
    """Or `deploy` would refuse the model as one in training mode."""
    for change in (
        lambda model: model.reset_classifier(4),
        lambda model: model.reset_classifier(0, ""),
        lambda model: model.prune_intermediate_layers([1]),
    ):
        model = (deploy(tiny) if deployed else copy.deepcopy(tiny)).train(training)
        change(model)
        assert {module.training for module in model.modules()} == {training}
        if not training:
            assert_close(deploy(model)(images(1, 3, 64, 64)), model(images(1, 3, 64, 64)))


# --- distillation -----------------------------------------------------------------------------------------------------


def test_distilled_model_has_two_heads():
    model, x = create_tiny(distilled=True), images(2, 3, 64, 64)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(model(x), (model.head(pooled) + model.head_dist(pooled)) / 2)
    assert not torch.equal(model.head(pooled), model.head_dist(pooled))
    assert [linear.out_features for linear in model.get_classifier()] == [10, 10]

    for module in model.modules():  # training alone, without what training changes in norms
        module.training = not isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    logits, logits_dist = model(x)
    assert_close(logits, model.head(pooled))
    assert_close(logits_dist, model.head_dist(pooled))
    model.set_distilled_training(False)
    assert_close(model(x), (logits + logits_dist) / 2)
    model.set_distilled_training()
    assert isinstance(model(x), tuple)


def test_distilled_heads_reset_together():
    model = create_tiny(distilled=True)
    model.reset_classifier(4)
    assert [linear.out_features for linear in model.get_classifier()] == [4, 4]
    assert model(images(1, 3, 64, 64)).shape == (1, 4)
    model.reset_classifier(0)
    assert model(images(1, 3, 64, 64)).shape == (1, 32)


@torch.no_grad()
def test_deployed_distilled_model_has_one_classifier_that_can_be_reset():
    source, x = create_tiny(distilled=True), images(1, 3, 64, 64)
    model = deploy(source)
    assert_close(model(x), source(x), 1e-4)
    assert isinstance(model.get_classifier(), nn.Linear)
    assert model.get_classifier().out_features == 10
    model.reset_classifier(4)
    assert model.get_classifier().out_features == 4
    assert model.train()(x).shape == (1, 4)  # no pair of logits, and no norm that refuses a batch of one
    model.eval().reset_classifier(0)
    assert_close(model(x), model.forward_features(x).mean((2, 3)))


# --- training ---------------------------------------------------------------------------------------------------------


def test_parameter_groups_run_from_stem_to_head(tiny):
    groups = timm.models.group_parameters(tiny, tiny.group_matcher(), reverse=True)
    assert groups == timm.models.group_parameters(tiny, TimmSHViT().group_matcher(), reverse=True)
    depth = [groups[name] for name, _ in tiny.named_parameters()]
    assert depth == sorted(depth)
    assert set(depth) == set(range(6))  # stem with first block … four blocks, head
    coarse = timm.models.group_parameters(tiny, tiny.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4]


def test_layer_decay_and_weight_decay_reach_the_right_parameters(tiny):
    groups = param_groups_layer_decay(tiny, weight_decay=0.1, layer_decay=0.5)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(tiny.parameters()))
    assert scale[id(tiny.head.l.weight)] == 1
    assert scale[id(tiny.patch_embed[0].c.weight)] == min(scale.values()) < 0.1
    assert tiny.no_weight_decay() == set()
    optimizer = create_optimizer_v2(tiny, opt="adamw", weight_decay=0.1)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(parameter) for parameter in tiny.parameters() if parameter.ndim > 1}


def test_gradient_checkpointing_recomputes_and_gives_the_same_gradients(tiny):
    gradients, calls = [], []
    tiny.train()
    tiny.stages[1].blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for enable in (False, True):
        tiny.zero_grad()
        tiny.set_grad_checkpointing(enable)
        tiny(images(2, 3, 64, 64)).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in tiny.parameters()])
    assert len(calls) == 3  # once, then forward and again in backward
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


# --- inputs and precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(97, 161), (16, 16), (1, 1), (63, 65), (224, 256)])
@torch.no_grad()
def test_any_input_size_works_and_strides_round_up(tiny, size):
    for feature, stride in zip(tiny.forward_intermediates(images(1, 3, *size))[1], (16, 32, 64), strict=True):
        assert feature.shape[2:] == tuple(-(-length // stride) for length in size)
    assert tiny(images(1, 3, *size)).isfinite().all()


@torch.no_grad()
def test_channels_last_changes_the_layout_alone(tiny):
    x = images(2, 3, 128, 96)
    expected = tiny(x)
    tiny.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    assert_close(tiny(x), expected)
    assert tiny.stages[0](tiny.patch_embed(x)).is_contiguous(memory_format=torch.channels_last)


def test_autocast_runs_in_bfloat16_and_trains(tiny):
    x = images(2, 3, 64, 64)
    expected = tiny(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert tiny.patch_embed(x).dtype == torch.bfloat16
        assert_close(tiny(x), expected, 0.1)
        tiny.train()(x).float().square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in tiny.parameters())


# --- compilers, exporters, copies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployed", [False, True])
@torch.no_grad()
def test_compiles_as_one_graph(tiny, deployed):
    x = images(2, 3, 64, 96)
    model = deploy(tiny) if deployed else tiny
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x), tiny(x), 1e-4)


def test_compiled_training_step_has_the_same_gradients(tiny):
    x = images(2, 3, 64, 96)
    other = copy.deepcopy(tiny).train()
    torch.compile(other, fullgraph=True, backend="aot_eager")(x).square().mean().backward()
    tiny.train()(x).square().mean().backward()
    for plain, compiled in zip(tiny.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(plain.grad, compiled.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_gives_the_same_outputs():
    model, x = randomize(timm.create_model("shvit_s1")).eval(), images(2, 3, 128, 128)
    assert_close(torch.compile(model, fullgraph=True)(x), model(x), 1e-4)


@pytest.mark.parametrize("distilled", [False, True])
def test_exports_with_any_batch_size(distilled):
    model = create_tiny(distilled=distilled)
    program = torch.export.export(
        model, (images(2, 3, 64, 96),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    for batch_size in (1, 5):
        x = images(batch_size, 3, 64, 96)
        assert_close(program.module()(x), model(x))


@pytest.mark.parametrize("distilled", [False, True])
@torch.no_grad()
def test_traces_and_scripts(distilled, tmp_path):
    model, x, y = create_tiny(distilled=distilled), images(2, 3, 64, 96), images(3, 3, 97, 64)
    assert_close(torch.jit.trace(model, x)(x), model(x))
    script = torch.jit.script(model)
    script.save(tmp_path / "model.pt")
    for inputs in (x, y):
        assert_close(torch.jit.load(tmp_path / "model.pt")(inputs), model(inputs))


@torch.no_grad()
def test_traces_symbolically_for_torch_fx(tiny):
    x = images(2, 3, 97, 64)
    assert_close(torch.fx.symbolic_trace(tiny)(x), tiny(x))


@torch.no_grad()
def test_pickles_copies_and_loads_by_assignment(tiny):
    x = images(1, 3, 64, 64)
    for other in (pickle.loads(pickle.dumps(tiny)), copy.deepcopy(tiny)):
        assert_close(other(x), tiny(x))
    for state_dict in (tiny.state_dict(), to_reference(tiny.state_dict())):
        names = list(state_dict)
        model = timm.create_model("shvit_s1", device="meta", **TINY).eval()
        model.load_state_dict(state_dict, strict=True, assign=True)
        assert_close(model(x), tiny(x))
        assert list(state_dict) == names  # the argument is left as it was
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({"head.l.bias": torch.zeros(10)})


@torch.no_grad()
def test_reference_names_load_below_a_larger_model(tiny):
    """As in a detector, whose SHViT is below `backbone`."""
    larger = nn.ModuleDict({"backbone": create_tiny(seed=3), "neck": nn.Linear(2, 2)})
    neck = larger["neck"].weight.clone()
    state_dict = {f"backbone.{name}": tensor for name, tensor in to_reference(tiny.state_dict()).items()}
    larger.load_state_dict({**state_dict, "neck.weight": neck, "neck.bias": torch.zeros(2)}, strict=True)
    x = images(1, 3, 64, 64)
    assert_close(larger["backbone"](x), tiny(x))
