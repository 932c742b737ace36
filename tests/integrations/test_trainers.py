"""How optimizers are handed to trainers, and what becomes of K-FAC's hooks there."""

import pytest
import torch

from lowbit_optim import KFAC, Shampoo, param_groups
from lowbit_optim.preconditioners.layers import Layer
from tests.contract import backward, each_class, net, same_models, small
from tests.integrations import runs, trainers
from tests.integrations.runs import BATCH, DATA, HALF

pytestmark = pytest.mark.filterwarnings(*trainers.WARNINGS)


@each_class
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo's own
def test_a_compiled_model_trains_as_the_model(make):
    torch._dynamo.reset()  # which has compiled models of this kind with the hooks of others
    (plain, first), (model, second) = ((own, make(own)) for own in (net(), net()))
    compiled = torch.compile(model, backend="eager")
    for step in range(6):
        backward(plain, step)
        first.step()
        second.zero_grad()
        images = runs.contract.random(12, 3, 4, 4, seed=step)
        torch.nn.functional.cross_entropy(compiled(images), torch.arange(12) % 5).backward()
        second.step()
    assert same_models(model, plain)
    assert not same_models(model, net())


def hf_trainer(folder, model, **how):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )
    return transformers.Trainer(model, arguments, train_dataset=DATA, **how)


def test_hugging_face_makes_the_optimizer(tmp_path):
    """With groups of its own, and the rate of the keywords, not of its arguments."""
    settings = {**small, "bits": 4, "weight_decay": 0.3}
    trainer = hf_trainer(tmp_path, runs.net(torch.float32, 0), optimizer_cls_and_kwargs=(Shampoo, settings))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is Shampoo
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]  # those of TrainingArguments
    assert {group["bits"] for group in optimizer.param_groups} == {4}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {small["lr"]}
    assert all(int(own["step"]) == 4 for own in optimizer.state.values())


def test_hugging_face_makes_kfac_by_a_factory(tmp_path):
    """The Trainer takes a keyword "model" for parameters, so K-FAC gets its model otherwise."""
    model = runs.net(torch.float32, 0)
    with pytest.raises(TypeError, match="needs the module whose layers"):
        hf_trainer(tmp_path, model, optimizer_cls_and_kwargs=(KFAC, {"model": model})).train()

    def kfac():
        return lambda model, **settings: KFAC(param_groups(model), model=model, **settings)

    trainer = hf_trainer(tmp_path, model, optimizer_cls_and_kwargs=(kfac, small))
    trainer.train()
    own = trainer.optimizer.optimizer.state[model.hidden.weight]
    assert own["left.updates"].tolist() == own["right.updates"].tolist() == [2]


@pytest.mark.parametrize("package", trainers.PACKAGES)
def test_hooks_see_every_batch_of_an_accumulated_step(package, tmp_path, monkeypatch):
    """One statistic a step, of as many rows as there are examples, and no statistic that failed."""
    if package not in trainers.TRAINERS:
        pytest.skip(f"{package} is not installed")
    seen, statistic = [], Layer.statistic

    def spy(self, side, *rest):
        if self.name.endswith("hidden") and side == "left":
            seen.append(self.rows)
        return statistic(self, side, *rest)

    monkeypatch.setattr(Layer, "statistic", spy)
    made = trainers.TRAINERS[package](tmp_path, "kfac", torch.float32, 0, False)
    examples = {"lightning": len(DATA) // HALF}.get(package, BATCH)
    assert seen == [examples] * HALF  # in every second step, from all its batches
    for own in made["optimizer"]["state"].values():
        assert all(int(own[key].sum()) == 0 for key in ("left.failures", "right.failures") if key in own)


def test_kfac_of_models_of_transformers():
    """Every matrix of a ViT has factors; those of GPT-2, which are no nn.Linear, are left to the base."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))
    images, labels = runs.contract.random(4, 3, 8, 8), torch.tensor([0, 1, 0, 1])
    optimizer = KFAC(vit.parameters(), model=vit, statistics_frequency=1)
    vit(pixel_values=images, labels=labels).loss.backward()
    optimizer.step()
    matrices = [name for name, module in vit.named_modules() if isinstance(module, torch.nn.Linear)]
    assert len(matrices) == 7
    for name in matrices:
        own = optimizer.state[vit.get_parameter(f"{name}.weight")]
        assert own["left.updates"].tolist() == own["right.updates"].tolist() == [1]

    config = transformers.GPT2Config(vocab_size=64, n_positions=8, n_embd=32, n_layer=1, n_head=2)
    gpt = transformers.GPT2LMHeadModel(config)
    treatments = KFAC(gpt.parameters(), model=gpt).treatments()
    assert treatments["transformer.h.0.mlp.c_fc.weight"] == "no layer that has Kronecker factors"
    assert treatments["transformer.wpe.weight"].startswith("KFAC")
