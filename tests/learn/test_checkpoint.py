import pytest

from dpo_ray.learn.checkpoint import load_checkpoint, save_checkpoint

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
