import pytest

from dpo_ray.learn.checkpoint import copy_state, load_checkpoint, save_checkpoint, write_state

from . import tiny, training

PAIRS = tiny.build_pairs(13)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_resumed_training_equals_uninterrupted(policies, tmp_path):
    """Without any process group: steps 2-5 after loading give exactly the metrics of the run that went on."""
    plan = training.plan(PAIRS, 1, 100, batch_size=5, epochs=2)
    model = training.build(policies["qwen2"], None)
    optimizer = training.build_adamw(model)
    training.train(model, optimizer, PAIRS, plan[:2])
    save_checkpoint(tmp_path, model, optimizer, 2)
    uninterrupted = training.train(model, optimizer, PAIRS, plan, start_step=2)

    model = training.build(policies["qwen2"], None)
    optimizer = training.build_adamw(model)
    step = load_checkpoint(tmp_path, model, optimizer)
    assert step == 2
    assert training.train(model, optimizer, PAIRS, plan, start_step=step) == uninterrupted


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_checkpoint_copied_state_is_that_of_its_step_though_training_went_on(policies, tmp_path):
    """Copied after steps 1 and 2, into the same memory; written after step 5."""
    plan = training.plan(PAIRS, 1, 100, batch_size=5, epochs=2)
    model = training.build(policies["qwen2"], None)
    optimizer = training.build_adamw(model)
    training.train(model, optimizer, PAIRS, plan[:1])
    first = copy_state(model, optimizer, 1)
    training.train(model, optimizer, PAIRS, plan[:2], start_step=1)
    second = copy_state(model, optimizer, 2, into=first)
    uninterrupted = training.train(model, optimizer, PAIRS, plan, start_step=2)
    write_state(second, tmp_path)

    model = training.build(policies["qwen2"], None)
    optimizer = training.build_adamw(model)
    assert load_checkpoint(tmp_path, model, optimizer) == 2
    assert training.train(model, optimizer, PAIRS, plan, start_step=2) == uninterrupted
    weights = [name for name in first["model"] if first["model"][name] is second["model"][name]]
    assert weights == list(second["model"])
