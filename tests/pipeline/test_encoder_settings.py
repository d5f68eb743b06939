"""Settings of the encoder reach the trunk: in pre-training, in fine-tuning and as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.hivit import HiViT
from models.itpn import create_itpn
from models.token_reduction import TokenGathering, TokenMigration
from models.weights import load_weights
from pipeline.checkpoint import load_state
from pipeline.config_values import apply_overrides
from pipeline.encoder_settings import plain_encoder_kwargs, pretrained_encoder_kwargs
from pipeline.finetune_config import Task
from pipeline.pretrain_config import PretrainConfig
from tests.models import tiny
from tests.pipeline.finetune_loop import LocalFinetune, finetune_config
from tests.pipeline.loop import LocalRun

NANO = "itpn_nano_patch16_224"
MIGRATE = {"model.migrate_after_block": 0, "model.migrate_keep_ratio": 0.4}
GATHER = {"model.gather_window": 2, "model.gather_tokens": 3, "model.gather_global_every": 2}
MIGRATION = TokenMigration(after_block=0, keep_ratio=0.4)
GATHERING = TokenGathering(window=2, num_tokens=3, global_every=2)


def nano(config: PretrainConfig, settings: dict[str, Any]) -> PretrainConfig:
    return apply_overrides(config, {"model.name": NANO, "optim.num_steps": 2, **settings})


@pytest.mark.parametrize("settings", [MIGRATE, GATHER, MIGRATE | GATHER])
def test_pretraining_with_fewer_tokens_runs_and_its_checkpoint_holds_the_gathering_tokens(
    debug_config: PretrainConfig, settings: dict[str, Any], tmp_path: Path
):
    run = LocalRun(nano(debug_config, settings), tmp_path)
    assert run()["steps"] == 2
    newest = run.checkpointer.latest()
    assert newest is not None
    state = load_state(newest)["model"]
    assert ("encoder.backbone.gathering_tokens" in state) == ("model.gather_window" in settings)


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_fine_tuning_takes_them_too(task: Task, tmp_path: Path):
    config = finetune_config(task, tmp_path / "data")
    settings = {"model.name": NANO, "model.rel_pos_bias": False, **MIGRATE, **GATHER}
    run = LocalFinetune(apply_overrides(config, settings), tmp_path / "run")
    run()
    state = load_state(run.checkpointer.latest())["model"]
    assert len([key for key in state if key.endswith("backbone.gathering_tokens")]) == 1


def test_settings_as_json_make_the_same_trunk_again(debug_config: PretrainConfig):
    config = nano(debug_config, MIGRATE | GATHER)
    kwargs = plain_encoder_kwargs(config.model)
    again = create_itpn(NANO, **json.loads(json.dumps(kwargs))).backbone
    assert (again.token_migration, again.token_gathering) == (MIGRATION, GATHERING)


def test_the_settings_of_a_run_are_read_from_its_config_with_its_weights():
    encoder = create_itpn(NANO, token_migration=MIGRATION, token_gathering=GATHERING)
    facts = {"model": {key.removeprefix("model."): v for key, v in (MIGRATE | GATHER).items()}}
    again = create_itpn(NANO, **pretrained_encoder_kwargs(NANO, 224, encoder.state_dict(), facts))
    load_weights(again, encoder.state_dict())
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(again(images).pyramid, encoder(images).pyramid)


def test_a_bare_trunk_with_gathering_tokens_loads():
    first, second = (tiny.randomize(trunk()) for _ in range(2))
    report = load_weights(second, first.state_dict())
    assert not (report.new or report.dropped)
    assert torch.equal(second.get_parameter("gathering_tokens"), first.gathering_tokens)


def trunk() -> HiViT:
    return create_itpn(NANO, token_gathering=GATHERING).backbone


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.migrate_keep_ratio": 0.0}, r"model.migrate_keep_ratio=0.0 must lie in \(0, 1\]"),
        ({"model.gather_window": -1}, "model.gather_window=-1 must be 0 or more"),
        ({"model.migrate_after_block": 1}, "after_block=1 leaves no block for the tokens that"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    debug_config: PretrainConfig, settings: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message):
        LocalRun(nano(debug_config, settings), tmp_path)()
